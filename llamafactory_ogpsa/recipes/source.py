"""Reading a published dataset through `datasets`: from the hub, a local folder or a local file."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError


if TYPE_CHECKING:
    from datasets import Dataset


# Rows decoded at a time; a row of UltraFeedback takes some 20 kB.
BATCH = 256

# Suffixes of local files; the id of a dataset on the hub never ends in one.
_FILES = (".csv", ".gz", ".json", ".jsonl", ".parquet")


def load(source: str, config: str | None, splits: Sequence[str]) -> "Dataset":
    """Load one split of a dataset, memory-mapped.

    Args:
        source: a hub id, followed by a folder of the dataset if only that is wanted
            (`Anthropic/hh-rlhf/harmless-base`); or the path of a folder or of a file.
        config: the configuration to take if the dataset has several.
        splits: the names of splits; the first one that is there is taken.

    Raises:
        RecipeError: it cannot be read; says which file or dataset, and why.
    """
    import datasets

    # Its log messages would be printed before the one sentence of the error.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path = Path(source)
    try:
        if path.is_file() and not path.stat().st_size:
            raise RecipeError(f"{source} is empty.")
        if path.is_file():
            # Only the folder is resolved: the hub's cache holds links to files with other names. `data_files` takes
            # patterns.
            folder = path.parent.resolve()
            loaded = datasets.load_dataset(str(folder), data_files=[glob.escape(str(folder / path.name))])
        elif not path.exists() and (path.suffix in _FILES or source.startswith((".", "/", "~"))):
            raise RecipeError(f"{source} does not exist.")
        else:
            parts = [source] if path.exists() else source.split("/", 2)
            hub_id, folder = "/".join(parts[:2]), parts[2] if len(parts) > 2 else None
            names = datasets.get_dataset_config_names(hub_id)
            config = choose(source, "configuration", names, [config, "default"])
            loaded = datasets.load_dataset(hub_id, config, data_dir=folder)
    except RecipeError:
        raise
    except Exception as err:
        if not path.exists():
            raise RecipeError(
                f"{source} is no local file or folder, and the hub did not provide it ({type(err).__name__}); download "
                "it where there is access, and give the path of the file or folder instead."
            ) from err
        reason = " ".join(str(err.__cause__ or err).split())[:200].rstrip(".")
        raise RecipeError(f"{source} cannot be read, so it may be cut off: {reason}.") from err

    return loaded[choose(source, "split", list(loaded), splits)]


def choose(source: str, kind: str, found: Sequence[str], wanted: Sequence[str | None]) -> str:
    """Return the first wanted name that was found, or the only one found; else raise a RecipeError."""
    for name in wanted:
        if name in found:
            return name

    if len(found) != 1:
        names = ", ".join(name for name in wanted if name)
        raise RecipeError(f"{source} has no {kind} {names}; found: {', '.join(found)}.")
    return found[0]


def find_schema(found: Sequence[str], source: str, *schemas: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first schema whose columns were all found; else raise a RecipeError that lists the missing ones."""
    missing = [[name for name in schema if name not in found] for schema in schemas]
    if [] in missing:
        return schemas[missing.index([])]
    lacks = " or ".join(f"[{', '.join(names)}]" for names in missing)
    raise RecipeError(f"{source} has another schema: the columns {lacks} are missing; found: [{', '.join(found)}].")


def iterate(dataset: "Dataset", drops: Counter) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset and show the progress; `drops` counts those whose text cannot be decoded."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(dataset), BATCH), "Reading", unit=" records", unit_scale=BATCH, disable=None):
        part = dataset.select(range(start, min(start + BATCH, len(dataset))))
        try:
            yield from part.to_list()
        except UnicodeDecodeError:
            for index in range(len(part)):
                try:
                    row = part[index]
                except UnicodeDecodeError:
                    drops["text that is not UTF-8"] += 1
                else:
                    yield row
