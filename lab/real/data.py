"""Data sets of the lab on a real model: the project's own, or raw files of published sets, as LLaMA-Factory reads them.

An entry of the plan names a file, its `format`, and which records it takes:

    general_helpful: {file: alpaca_en_demo.json, format: alpaca, skip: 100, count: 200}
"""

import csv
import itertools
import json
import re
from pathlib import Path

from llamafactory_ogpsa.recipes.refusal_rule import is_refusal


PAIR_COLUMNS = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
PAIR_EXTRAS = {"query": "input", "history": "history"}
LONGEST = 600
TURN = re.compile(r"\n\n(Human|Assistant): ")


def first_sentences(text, count=2):
    """Give the first sentences of a text."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:count])


def read_records(path):
    """Read the project's own files."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_alpaca(path):
    """Read instructions with answers; only the beginning of a long answer is kept, so that training is quick."""
    return [
        {"instruction": rec["instruction"], "input": rec.get("input", ""), "output": first_sentences(rec["output"])}
        for rec in read_records(path)
        if rec["output"].strip()
    ]


def read_safety_tuned(path):
    """Read the unsafe instructions of Safety-Tuned LLaMAs that are refused, with the first two sentences of the refusal."""
    return [rec for rec in read_alpaca(path) if is_refusal(rec["output"])]


def read_halueval(path):
    """Read HaluEval's questions with their text; `answers` are those that count as right."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        {
            "instruction": rec["question"],
            "input": rec["knowledge"],
            "output": rec["right_answer"],
            "answers": [rec["right_answer"]],
        }
        for rec in records
    ]


def read_hh(path):
    """Read hh-rlhf's pairs whose preferred answer refuses and whose other one does not.

    Earlier turns become the `history`; conversations of more than `LONGEST` characters are left out.
    """
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        (*before, chosen), (*same, rejected) = (TURN.split(pair[key])[2::2] for key in ("chosen", "rejected"))
        chosen, rejected = first_sentences(chosen), first_sentences(rejected)
        is_pair = before == same and len(before) % 2 and sum(map(len, before)) <= LONGEST
        if is_pair and is_refusal(chosen) and rejected and not is_refusal(rejected):
            *history, prompt = (turn.strip() for turn in before)
            turns = [list(turn) for turn in zip(history[::2], history[1::2], strict=True)]
            records.append({"instruction": prompt, "history": turns, "chosen": chosen, "rejected": rejected})
    return records


def read_xstest(path, label):
    """Read XSTest's prompts with a label, `safe` or `unsafe`."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{"instruction": row["prompt"]} for row in csv.DictReader(file) if row["label"] == label]


def read_malicious(path):
    """Read I-MaliciousInstructions."""
    return [{"instruction": text} for text in json.loads(path.read_text(encoding="utf-8"))["instructions"]]


FORMATS = {
    "records": read_records,
    "alpaca": read_alpaca,
    "safety_tuned": read_safety_tuned,
    "halueval": read_halueval,
    "hh": read_hh,
    "xstest_safe": lambda path: read_xstest(path, "safe"),
    "xstest_unsafe": lambda path: read_xstest(path, "unsafe"),
    "malicious": read_malicious,
}


def read_entry(name, entry, folder):
    """Read one data set.

    Args:
        name: Its name.
        entry: Its entry in the plan: `file`, `format` and, where it does not take all records, `skip` and `count`.
        folder: Folder that the file's path starts from.

    Returns:
        Its records.

    Raises:
        ValueError: The entry is wrong, the file is missing or holds too few records.
    """
    unknown = entry.keys() - {"file", "format", "skip", "count"}
    if unknown or "file" not in entry:
        raise ValueError(f"Data set {name!r} has {sorted(entry)}; allowed: file, format, skip and count.")
    layout, path = entry.get("format", "records"), Path(folder) / entry["file"]
    if layout not in FORMATS:
        raise ValueError(f"Data set {name!r} has format {layout!r}; allowed: {', '.join(FORMATS)}.")
    if not path.is_file():
        raise ValueError(f"Data set {name!r} needs {path}, which is not there.")
    records, skip = FORMATS[layout](path), entry.get("skip", 0)
    count = entry.get("count", len(records) - skip)
    if count < 1 or len(records) < skip + count:
        raise ValueError(f"Data set {name!r} asks for {count} records after {skip}; {path} has {len(records)}.")
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
