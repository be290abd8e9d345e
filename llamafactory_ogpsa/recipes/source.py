"""Reading a published dataset through `datasets`: from the hub, a local folder or a local file."""

import glob
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError


if TYPE_CHECKING:
    from datasets import Dataset


# Rows decoded at a time; a row of UltraFeedback takes some 20 kB.
BATCH = 256

# What names a local file, and no dataset on the hub.
_FILES = (".csv", ".gz", ".json", ".jsonl", ".parquet")

NOT_UTF8 = "text that is not UTF-8"


def load(source: str, config: str | None, splits: Sequence[str]) -> "Dataset":
    """Load one split of a dataset.

    Args:
        source: a hub id, or the path of a folder or of a file.
        config: the configuration to take where the dataset has several.
        splits: the splits to take, the first that is there.

    Returns:
        the split, memory-mapped.

    Raises:
        RecipeError: it cannot be read; says where, and what to do.
    """
    import datasets

    # What it logs before an exception would stand above the one sentence that tells the user what to do.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path = Path(source)
    try:
        if path.is_file():
            # Only the folder is resolved: the hub's own cache holds links to files that have other names. What
            # `data_files` takes is a pattern.
            folder = path.parent.resolve()
            loaded = datasets.load_dataset(str(folder), data_files=[glob.escape(str(folder / path.name))])
        elif not path.exists() and (path.suffix in _FILES or source.startswith((".", "/", "~"))):
            raise RecipeError(f"{source} does not exist.")
        else:
            names = datasets.get_dataset_config_names(source)
            loaded = datasets.load_dataset(source, choose(source, "configuration", names, [config, "default"]))
    except RecipeError:
        raise
    except Exception as err:
        raise RecipeError(explain(source, err)) from err

    return loaded[choose(source, "split", list(loaded), splits)]


def choose(source: str, kind: str, found: Sequence[str], wanted: Sequence[str | None]) -> str:
    """Return the first wanted name that is there, or the only one there is.

    Raises:
        RecipeError: several, and none of them wanted.
    """
    for name in wanted:
        if name in found:
            return name

    if len(found) != 1:
        names = ", ".join(name for name in wanted if name)
        raise RecipeError(f"{source} has no {kind} {names}; found: {', '.join(found)}.")
    return found[0]


def explain(source: str, err: Exception) -> str:
    """Say in one sentence why a dataset could not be loaded."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl")) if path.is_dir() else []
    for file in files:
        problem = find_bad_line(file) if file.suffix in (".jsonl", ".ndjson", ".json") else None
        if problem:
            return f"{file}: {problem}."

    if not path.exists():
        return (
            f"{source} is no local file or folder, and the hub did not give it ({type(err).__name__}); download it "
            "where there is access, and name its path with --from."
        )
    reason = " ".join(str(err.__cause__ or err).split())
    return f"{source} cannot be read by the datasets library ({reason[:200]})."


def find_bad_line(file: Path) -> str | None:
    """Look for the first line of a JSON-lines file that is none; None where there is no such line."""
    count = 0
    with open(file, "rb") as f:
        for count, line in enumerate(f, 1):
            if count == 1 and line.lstrip().startswith(b"["):
                return None if is_json(line + f.read()) else "it is not complete JSON, so it may be cut off"
            if line.strip() and not is_json(line):
                cut = " and does not end in a newline, so the file may be cut off" if not line.endswith(b"\n") else ""
                return f"line {count} is not JSON{cut}; download the file again, or delete that line"
    return None if count else "the file is empty"


def is_json(text: bytes) -> bool:
    """Tell whether bytes are one JSON value; those that are not UTF-8 are judged by the rest."""
    try:
        json.loads(text.decode("utf-8", errors="replace"))
    except ValueError:
        return False
    return True


def require_columns(dataset: "Dataset", source: str, *schemas: Sequence[str]) -> int:
    """Return the index of the first schema whose columns are all there.

    Raises:
        RecipeError: none is; says which columns are missing from each, and which were found.
    """
    found = dataset.column_names
    missing = [[name for name in schema if name not in found] for schema in schemas]
    for index, names in enumerate(missing):
        if not names:
            return index

    lacks = " or ".join(f"[{', '.join(names)}]" for names in missing)
    raise RecipeError(f"{source} has another schema: the columns {lacks} are missing; found: [{', '.join(found)}].")


def iterate(dataset: "Dataset", columns: Sequence[str], drops: Counter) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset with some of its columns, and show the progress.

    Args:
        dataset: as `load` returns it.
        columns: those to decode.
        drops: counts the rows whose text cannot be decoded.
    """
    from tqdm import tqdm

    dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
    with tqdm(total=len(dataset), desc="Reading", unit=" records", disable=None) as progress:
        for start in range(0, len(dataset), BATCH):
            stop = min(start + BATCH, len(dataset))
            try:
                yield from rows_of(dataset[start:stop])
            except UnicodeDecodeError:
                for index in range(start, stop):
                    try:
                        row = dataset[index]
                    except UnicodeDecodeError:
                        drops[NOT_UTF8] += 1
                    else:
                        yield row
            progress.update(stop - start)


def rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn columns into rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
