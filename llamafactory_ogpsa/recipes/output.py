"""Writing samples for LLaMA-Factory: JSON files and their entries in dataset_info.json."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..files import replacing
from .errors import RecipeError
from .samples import Sample


INFO = "dataset_info.json"

# A recipe's sets are named `<recipe>_<kind><suffix>`.
KINDS, SUFFIXES = ("sft", "dpo"), ("", "_heldout")

# LLaMA-Factory's names for the roles of the columns that have other names here.
_ROLES = {"instruction": "prompt", "input": "query", "output": "response"}


def write(folder: Path, recipe: str, train: list[Sample], held_out: list[Sample]) -> dict[str, int]:
    """Write the plain and the ranking file of both splits and enter them into dataset_info.json.

    The datasets are `<recipe>_sft` and, if all samples have a rejected answer, `<recipe>_dpo`; those of `held_out`,
    which may be empty, end in `_heldout`. Returns the number of samples by dataset name.

    Raises:
        RecipeError: dataset_info.json is not a JSON object, or has another entry of such a name, or has a set of the
            recipe that these samples do not give.
    """
    samples = [*train, *held_out]
    kinds = KINDS if all(sample.rejected for sample in samples) else KINDS[:1]
    turns = any(sample.history for sample in samples)

    counts, entries, files = {}, {}, {}
    for suffix, part in zip(SUFFIXES, (train, held_out), strict=True):
        for kind in kinds if part else ():
            name = f"{recipe}_{kind}{suffix}"
            records = [record_of(sample, kind, turns) for sample in part]
            columns = {_ROLES.get(column, column): column for column in records[0]}
            ranking = {"ranking": True} if kind == "dpo" else {}
            entries[name] = {"file_name": f"{name}.json", **ranking, "columns": columns}
            lines = (json.dumps(record, ensure_ascii=False) for record in records)
            files[f"{name}.json"] = "[\n" + ",\n".join(lines) + "\n]\n"
            counts[name] = len(part)

    info = merge(read_info(folder / INFO), entries, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    replace_all(folder, {**files, INFO: json.dumps(info, indent=2, ensure_ascii=False) + "\n"})
    return counts


def record_of(sample: Sample, kind: str, turns: bool) -> dict[str, Any]:
    """Return the record of a sample in a plain or a ranking file, with or without earlier turns."""
    plain = {"output": sample.answer}
    ranking = {"chosen": sample.answer, "rejected": sample.rejected}
    record = {"instruction": sample.prompt, "input": sample.query, **(plain if kind == "sft" else ranking)}
    return {**record, "history": sample.history} if turns else record


def merge(info: dict[str, Any], entries: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Add a recipe's entries to `info`.

    Raises:
        RecipeError: `info` has another entry of the same name or file, or a set of the recipe from another dataset.
    """
    own = {f"{recipe}_{kind}{suffix}" for kind in KINDS for suffix in SUFFIXES}
    stale = [name for name in info if name in own - entries.keys()]
    if stale:
        rule = "which this run does not write; choose another --output, or remove these entries first"
        raise RecipeError(f"{INFO} has {', '.join(stale)}, {rule}.")
    files = {entry["file_name"] for entry in entries.values()}
    for name, entry in info.items():
        file = os.path.normpath(str(entry.get("file_name"))) if isinstance(entry, dict) else None
        if entry != entries.get(name, entry) or (name not in entries and file in files):
            raise RecipeError(f"{INFO} has another entry {name}, which is kept; choose another --output.")
    return {**info, **entries}


def read_info(path: Path) -> dict[str, Any]:
    """Read dataset_info.json, which may be missing; raise a RecipeError if it is not a JSON object."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info, dict):
            raise TypeError("it holds something else")
        return info
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as err:
        raise RecipeError(f"{path} is not a JSON object ({err}); it was not changed.") from err


def replace_all(folder: Path, texts: dict[str, str]) -> None:
    """Write files under temporary names, then rename them in the order given: a write that fails changes nothing."""
    with ExitStack() as stack:
        for name, text in reversed(texts.items()):  # what is entered last is renamed first
            temporary = Path(stack.enter_context(replacing(folder / name)))
            temporary.write_text(text, encoding="utf-8", newline="\n")
