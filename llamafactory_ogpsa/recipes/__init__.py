"""`llamafactory-ogpsa prepare` makes datasets for LLaMA-Factory; `evaluate` and `compare` make results.

A recipe (`prepare`) reads one published dataset (`source`), makes samples from its records (`safety`, `helpful`,
`truthful`, `transcripts`), splits them (`samples`) and writes them with their entries in dataset_info.json (`output`).
"""
