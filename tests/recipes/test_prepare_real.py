"""`llamafactory-ogpsa prepare` on real records, and on as many as published sets have."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from raw_records import pku_record
from test_prepare import cache, prepare, read  # noqa: F401

from llamafactory_ogpsa.recipes.refusal_rule import is_refusal


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
HALUEVAL = DATA / "halueval_qa.jsonl"
TRANSCRIPTS = DATA / "real" / "hh_harmless_test.jsonl"
INSTRUCTIONS = DATA / "real" / "safety_tuned_llamas.json"


@pytest.mark.skipif(not HALUEVAL.is_file(), reason="no ../shared/data/halueval_qa.jsonl beside the checkout")
def test_real_halueval_records(tmp_path, capsys):
    assert prepare("truthful", HALUEVAL, tmp_path) == 0
    published = {r["question"].strip(): r for r in map(json.loads, HALUEVAL.read_text(encoding="utf-8").splitlines())}
    written = read(tmp_path, "truthful_dpo") + read(tmp_path, "truthful_dpo_heldout")
    assert len(written) > 450
    for record in written:
        original = published[record["instruction"]]
        assert record["chosen"] == original["right_answer"].strip()
        assert record["rejected"] == original["hallucinated_answer"].strip()
        assert record["input"] == original["knowledge"].strip()


@pytest.mark.parametrize("recipe", ["safety", "helpful"])
@pytest.mark.skipif(not TRANSCRIPTS.is_file(), reason="no ../shared/data/real/hh_harmless_test.jsonl")
def test_real_transcripts_reach_llamafactory_turn_by_turn(recipe, tmp_path, capsys):
    """Put together again, what LLaMA-Factory reads is what was published, but for the white space around turns."""
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list

    def bare(text):
        return "".join(text.split())

    pairs = [json.loads(line) for line in TRANSCRIPTS.read_text(encoding="utf-8").splitlines()]
    published = {kind: {bare(pair[kind]) for pair in pairs} for kind in ("chosen", "rejected")}
    assert prepare(recipe, TRANSCRIPTS, tmp_path, "--num-samples", "5000") == 0
    report = capsys.readouterr().out
    counted = sum(int(line.split()[0]) for line in report.splitlines()[1:-1] if "_dpo" not in line)
    assert counted == len(pairs) == 2312

    (attributes,) = get_dataset_list([f"{recipe}_dpo"], str(tmp_path))
    convert = get_dataset_converter("alpaca", attributes, None)
    records = read(tmp_path, f"{recipe}_dpo")
    # The figures of docs/recipes.md.
    samples = records + read(tmp_path, f"{recipe}_dpo_heldout")
    assert (len(samples), sum(is_refusal(sample["chosen"]) for sample in samples)) == (2253, 188)
    for record in records:
        read_back = convert(record)
        speakers = [f"{ {'user': 'Human', 'assistant': 'Assistant'}[turn['role']] }:" for turn in read_back["_prompt"]]
        turns = [speaker + turn["content"] for speaker, turn in zip(speakers, read_back["_prompt"], strict=True)]
        for kind, answer in zip(("chosen", "rejected"), read_back["_response"], strict=True):
            assert bare("".join([*turns, "Assistant:", answer["content"]])) in published[kind]


@pytest.mark.skipif(not INSTRUCTIONS.is_file(), reason="no ../shared/data/real/safety_tuned_llamas.json")
def test_real_unsafe_instructions_have_no_ranking(tmp_path, capsys):
    published = {(r["instruction"].strip(), r["output"].strip()) for r in json.loads(INSTRUCTIONS.read_text("utf-8"))}
    assert prepare("safety", INSTRUCTIONS, tmp_path / "own", "--num-samples", "2000") == 0
    assert list(read(tmp_path / "own", "dataset_info")) == ["safety_sft", "safety_sft_heldout"]
    written = read(tmp_path / "own", "safety_sft") + read(tmp_path / "own", "safety_sft_heldout")
    assert len(written) == 2200
    assert {(record["instruction"], record["output"]) for record in written} <= published

    assert prepare("safety", INSTRUCTIONS, tmp_path / "ours", "--num-samples", "2000", "--refusals", "templates") == 0
    refused = read(tmp_path / "ours", "safety_sft")
    assert [record["instruction"] for record in refused] == [r["instruction"] for r in written[:2000]]
    assert all(is_refusal(record["output"]) and "{" not in record["output"] for record in refused)
    assert prepare("helpful", INSTRUCTIONS, tmp_path / "other") == 2
    assert "has another schema" in capsys.readouterr().err


MEASURE = """
import resource, sys
from llamafactory_ogpsa.cli import main

code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def test_100_000_records_take_less_than_2_gib(tmp_path):
    rng = random.Random(0)
    text = " ".join(f"w{rng.randrange(5000):04}" for _ in range(5000))
    source = tmp_path / "raw.jsonl"
    with open(source, "w") as f:
        for index in range(100_000):
            starts = (rng.randrange(len(text) - 600) for _ in range(3))
            prompt, *answers = (
                text[start : start + size] for start, size in zip(starts, (120, 600, 600), strict=True)
            )
            f.write(json.dumps(pku_record(f"{prompt} {index}", answers)) + "\n")
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, "prepare", "safety", "--from", str(source), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert process.returncode == 0, process.stderr
    assert "100000 records" in process.stdout
    assert "10000  in safety_sft" in process.stdout
    assert int(process.stdout.split()[-1]) < 2 * 2**30
