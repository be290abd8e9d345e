"""Writing samples where LLaMA-Factory finds them: JSON files and their entries in dataset_info.json.

All files are written under temporary names before the first of them gets its own, dataset_info.json last: what fails
while it is written changes nothing, and whenever the process is killed, dataset_info.json names only whole files.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .samples import Sample


INFO = "dataset_info.json"

# The columns of a plain and of a ranking file: what LLaMA-Factory calls them, and in which field of a sample they are.
_COLUMNS = {
    "sft": {"prompt": ("instruction", "prompt"), "query": ("input", "query"), "response": ("output", "answer")},
    "dpo": {
        "prompt": ("instruction", "prompt"),
        "query": ("input", "query"),
        "chosen": ("chosen", "answer"),
        "rejected": ("rejected", "rejected"),
    },
}


def write(folder: Path, recipe: str, train: list[Sample], held_out: list[Sample]) -> dict[str, int]:
    """Write the plain and the ranking file of both splits and enter them into dataset_info.json.

    Args:
        folder: made where it does not exist.
        recipe: the first word of the datasets' names.
        train: the samples of `<recipe>_sft` and `<recipe>_dpo`.
        held_out: the samples of `<recipe>_sft_heldout` and `<recipe>_dpo_heldout`, which may be none.

    Returns:
        the number of samples by dataset name.

    Raises:
        RecipeError: dataset_info.json is not what it should be, or has an entry of such a name that is not ours.
    """
    files = {
        f"{recipe}_{kind}{suffix}": (kind, samples)
        for suffix, samples in [("", train), ("_heldout", held_out)]
        for kind in (_COLUMNS if samples else ())
    }
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        info = merge(read_info(folder / INFO), {name: entry_of(name, kind) for name, (kind, _) in files.items()})
        contents = {f"{name}.json": dump_records(samples, kind) for name, (kind, samples) in files.items()}
        replace_all(folder, {**contents, INFO: [json.dumps(info, indent=2, ensure_ascii=False), "\n"]})
    return {name: len(samples) for name, (_, samples) in files.items()}


def entry_of(name: str, kind: str) -> dict[str, Any]:
    """Describe a file to LLaMA-Factory."""
    columns = {role: column for role, (column, _) in _COLUMNS[kind].items()}
    return {"file_name": f"{name}.json", **({"ranking": True} if kind == "dpo" else {}), "columns": columns}


def merge(info: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """Add entries to those that are there, which stay as they are.

    Raises:
        RecipeError: there is another entry of such a name or for such a file, which would be overwritten.
    """
    files = {entry["file_name"] for entry in entries.values()}
    for name, entry in info.items():
        file = os.path.normpath(str(entry.get("file_name"))) if isinstance(entry, dict) else None
        if entry != entries.get(name, entry) or (name not in entries and file in files):
            raise RecipeError(f"{INFO} has another entry {name}, which stays as it is; take another --output.")
    return {**info, **entries}


def read_info(path: Path) -> dict[str, Any]:
    """Read dataset_info.json, which may be missing.

    Raises:
        RecipeError: it is not a JSON object.
    """
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as err:
        raise RecipeError(f"{path} is not JSON ({err}); it was left as it is.") from err
    if not isinstance(info, dict):
        raise RecipeError(f"{path} is not a JSON object; it was left as it is.")
    return info


def dump_records(samples: list[Sample], kind: str) -> Iterator[str]:
    """Yield a JSON array of records, one a line."""
    start = "[\n"
    for sample in samples:
        record = {column: getattr(sample, field) for column, field in _COLUMNS[kind].values()}
        yield start + json.dumps(record, ensure_ascii=False)
        start = ",\n"
    yield "\n]\n"


def replace_all(folder: Path, contents: dict[str, Iterable[str]]) -> None:
    """Write files under temporary names; once all are written, give them their own, in the order of `contents`.

    Args:
        folder: locked by the caller, so that only a process that was killed can have left a temporary name.
        contents: the parts of each file's text by its name.
    """
    temporary = {name: folder / f".{name}.tmp" for name in contents}
    try:
        for name, parts in contents.items():
            with open(temporary[name], "w", encoding="utf-8", newline="\n") as f:
                f.writelines(parts)
                f.flush()
                os.fsync(f.fileno())
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other preparations out of a folder: two of them at once would lose one's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
