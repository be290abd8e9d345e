"""`llamafactory-ogpsa prepare` makes datasets for LLaMA-Factory of published data; `evaluate` and `compare` results.

A recipe (`prepare`) reads one published dataset (`source`), makes samples of its records (`safety`, `helpful`,
`truthful`, `transcripts`), splits them (`samples`) and writes them with their entries in dataset_info.json (`output`).
"""
