"""From published data to files that LLaMA-Factory trains on: `llamafactory-ogpsa prepare`.

A recipe reads one published dataset (`source`), makes samples of its records (`safety`, `helpful`, `truthful`), splits
them (`samples`) and writes them with their entries in dataset_info.json (`output`); `prepare` does all four.
"""
