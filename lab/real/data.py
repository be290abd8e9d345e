"""Data sets of the lab on a real model: the project's own, or published ones, as LLaMA-Factory reads them.

An entry of the plan names a file or a data set on the hub, its `format`, and which records it takes:

    general_helpful: {file: alpaca_en_demo.json, format: alpaca, skip: 100, count: 200}
    safety_dpo: {hub: Anthropic/hh-rlhf/harmless-base, format: hh}

Published sets are read by the recipes of `llamafactory-ogpsa prepare`, which know their columns and leave out records
that are broken or duplicates.
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

from llamafactory_ogpsa.recipes.output import record_of
from llamafactory_ogpsa.recipes.prepare import RECIPES
from llamafactory_ogpsa.recipes.refusal_rule import is_refusal
from llamafactory_ogpsa.recipes.source import find_schema, iterate, load


PAIR_COLUMNS = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
PAIR_EXTRAS = {"query": "input", "history": "history"}
LONGEST = 600
KEYS = {"file", "folder", "hub", "format", "skip", "count"}


def first_sentences(text, count=2):
    """Give the first sentences of a text."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:count])


def read_samples(recipe, source):
    """Read a published set.

    Args:
        recipe: The recipe that knows its columns.
        source: Path of a file, or name on the hub.

    Returns:
        A list of the recipes' `Sample`.

    Raises:
        RecipeError: It cannot be read, or has other columns.
    """
    recipe, drops = RECIPES[recipe], Counter()
    rows = load(str(source), recipe.config, recipe.splits)
    columns = find_schema(rows.column_names, str(source), *recipe.schemas)
    return recipe.schemas[columns](iterate(rows, drops), drops)


def read_records(source):
    """Read the project's own files."""
    return json.loads(Path(source).read_text(encoding="utf-8"))


def read_alpaca(source):
    """Read instructions with answers; only the beginning of a long answer is kept, so that training is quick."""
    # Safety-Tuned LLaMAs has alpaca's columns.
    records = [record_of(sample, "sft", turns=False) for sample in read_samples("safety", source) if sample.answer]
    return [rec | {"output": first_sentences(rec["output"])} for rec in records]


def read_safety_tuned(source):
    """Read the unsafe instructions of Safety-Tuned LLaMAs that are refused; keep two sentences of the refusal."""
    return [rec for rec in read_alpaca(source) if is_refusal(rec["output"])]


def read_halueval(source):
    """Read HaluEval's questions with their text; `answers` are those that count as right."""
    records = [record_of(sample, "sft", turns=False) for sample in read_samples("truthful", source)]
    return [rec | {"answers": [rec["output"]]} for rec in records]


def read_hh(source):
    """Read hh-rlhf's pairs whose preferred answer refuses and whose other one does not.

    Earlier turns become the `history`; conversations of more than `LONGEST` characters are left out.
    """
    records = []
    for sample in read_samples("safety", source):
        record = record_of(sample, "dpo", turns=True)
        chosen, rejected = (first_sentences(record[key]) for key in ("chosen", "rejected"))
        length = len(sample.prompt) + sum(len(text) for turn in sample.history for text in turn)
        if length <= LONGEST and is_refusal(chosen) and rejected and not is_refusal(rejected):
            records.append(record | {"chosen": chosen, "rejected": rejected})
    return records


def read_xstest(source, label):
    """Read XSTest's prompts labelled `safe` or `unsafe`, with types in turn: the first ones are of all types."""
    rows = load(str(source), None, ("test", "train"))
    find_schema(rows.column_names, str(source), ("prompt", "label", "type"))
    by_type = {}
    for row in rows:
        if row["label"] == label:
            by_type.setdefault(row["type"], []).append({"instruction": row["prompt"]})
    turns = itertools.zip_longest(*by_type.values())
    return [rec for turn in turns for rec in turn if rec is not None]


def read_malicious(source):
    """Read I-MaliciousInstructions."""
    return [{"instruction": text} for text in read_records(source)["instructions"]]


FORMATS = {
    "records": read_records,
    "alpaca": read_alpaca,
    "safety_tuned": read_safety_tuned,
    "halueval": read_halueval,
    "hh": read_hh,
    "xstest_safe": lambda source: read_xstest(source, "safe"),
    "xstest_unsafe": lambda source: read_xstest(source, "unsafe"),
    "malicious": read_malicious,
}
FILES_ALONE = {"records", "malicious"}


def read_entry(name, entry, folder):
    """Read one data set.

    Args:
        name: Its name.
        entry: Its entry in the plan: `file` or `hub`, `format`, `folder` if the file is not in the folder of the
            others, and, if it does not take all records, `skip` and `count`.
        folder: Folder that the file's path starts from.

    Returns:
        Its records.

    Raises:
        ValueError: The entry is wrong, the file is missing, cannot be read, or holds too few records.
    """
    if entry.keys() - KEYS or len(entry.keys() & {"file", "hub"}) != 1:
        raise ValueError(
            f"Data set {name!r} has {sorted(entry)}; allowed: file or hub, folder, format, skip and count."
        )
    layout = entry.get("format", "records")
    if layout not in FORMATS:
        raise ValueError(f"Data set {name!r} has format {layout!r}; allowed: {', '.join(FORMATS)}.")
    if "hub" in entry and layout in FILES_ALONE:
        raise ValueError(f"Data set {name!r} has hub and format {layout!r}, which is read from a file alone.")
    source = entry["hub"] if "hub" in entry else Path(entry.get("folder", folder)) / entry["file"]
    if "file" in entry and not source.is_file():
        raise ValueError(f"Data set {name!r} needs {source}, which is not there.")
    records, skip = FORMATS[layout](source), entry.get("skip", 0)
    count = entry.get("count", len(records) - skip)
    if count < 1 or len(records) < skip + count:
        raise ValueError(f"Data set {name!r} asks for {count} records after {skip}; {source} has {len(records)}.")
    return records[skip : skip + count]


def make_pairs(name, entry, plain):
    """Make pairs that prefer the answer of a plain set to a refusal.

    Args:
        name: The data set's name.
        entry: Its entry: `pairs_of` and `refusals_of` name two plain sets.
        plain: The plain sets' records by name.

    Returns:
        Its records.

    Raises:
        ValueError: The entry is wrong.
    """
    if entry.keys() != {"pairs_of", "refusals_of"} or not plain.keys() >= set(entry.values()):
        raise ValueError(f"Data set {name!r} has {entry}; allowed: pairs_of and refusals_of, each with a plain set.")
    refusals = [rec["output"] for rec in plain[entry["refusals_of"]]]
    return [
        {"instruction": rec["instruction"], "input": rec["input"], "chosen": rec["output"], "rejected": refusal}
        for rec, refusal in zip(plain[entry["pairs_of"]], itertools.cycle(refusals), strict=False)
    ]


def render(entries, folder):
    """Read the data sets and write them as LLaMA-Factory reads them.

    Args:
        entries: Entries of the plan by data set name.
        folder: Folder that the files' paths start from.

    Returns:
        The files' texts by name, `dataset_info.json` among them.
    """
    files, info = {}, {}
    plain = {name: read_entry(name, entry, folder) for name, entry in entries.items() if "pairs_of" not in entry}
    for name, entry in entries.items():
        records = plain[name] if name in plain else make_pairs(name, entry, plain)
        info[name] = {"file_name": f"{name}.json"}
        if "chosen" in records[0]:
            more = {column: key for column, key in PAIR_EXTRAS.items() if key in records[0]}
            info[name] |= {"ranking": True, "columns": PAIR_COLUMNS | more}
        elif "input" not in records[0]:
            info[name] |= {"columns": {"prompt": "instruction"}}
        files[f"{name}.json"] = json.dumps(records, ensure_ascii=False)
    files["dataset_info.json"] = json.dumps(info)
    return files
