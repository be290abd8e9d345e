"""OGPSA on real records: XSTest refusals, LLaMA-Factory's demo sets and HaluEval, where they lie beside the checkout."""

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_model_dir, read_rows, run_here


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with real records beside the checkout")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A dataset_dir that points at the real records, and a tiny model that knows their most frequent words."""
    path = tmp_path_factory.mktemp("real")
    with open(SHARED / "xstest_completions_gpt4.csv", newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if "refusal" in row["final_label"]]
    refusals = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in rows]
    pairs = [
        {"instruction": row["prompt"], "chosen": row["completion"], "rejected": "Sure, here is what you asked for."}
        for row in rows
    ]
    assert len(refusals) > 100
    (path / "refusals.json").write_text(json.dumps(refusals))
    (path / "refusal_pairs.json").write_text(json.dumps(pairs))
    info = {
        "refusals": {"file_name": "refusals.json"},
        "refusal_pairs": {
            "file_name": "refusal_pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "alpaca": {"file_name": str(SHARED / "alpaca_en_demo.json")},
        "halueval": {
            "file_name": str(SHARED / "halueval_qa.jsonl"),
            "columns": {"prompt": "question", "query": "knowledge", "response": "right_answer"},
        },
        "dpo_demo": {
            "file_name": str(SHARED / "dpo_en_demo.json"),
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    (path / "dataset_info.json").write_text(json.dumps(info))
    text = "".join(
        (SHARED / name).read_text(encoding="utf-8") for name in ("alpaca_en_demo.json", "halueval_qa.jsonl")
    ) + json.dumps(refusals)
    words = [word for word, _ in Counter(re.findall(r"\w+|[^\w\s]+", text)).most_common(3000)]
    return str(path), make_model_dir(path / "model", words=words)


@pytest.mark.parametrize(
    ("stage", "dataset", "references", "samples"),
    [
        ("ogpsa_sft", "refusals", "alpaca,halueval", 40),
        ("ogpsa_dpo", "refusal_pairs", "dpo_demo", 24),
    ],
)
@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_real_records_end_to_end(base_args, real, stage, dataset, references, samples, finetuning_type):
    data_dir, model = real
    args = {
        **base_args,
        "model_name_or_path": model,
        "dataset_dir": data_dir,
        "dataset": dataset,
        "stage": stage,
        "finetuning_type": finetuning_type,
        "cutoff_len": 128,
        "learning_rate": 1e-3,
        "max_steps": 8,
        "logging_steps": 2,
        "plot_loss": True,
        "ogpsa_dataset": references,
        "ogpsa_num_samples": samples,
        "ogpsa_update_interval": 4,
        "ogpsa_batch_size": 8,
    }
    run_here(args)
    steps, refreshes = read_rows(args["output_dir"])
    assert [row["step"] for row in steps] == [2, 4, 6, 8]
    assert [row["step"] for row in refreshes] == ([0, 4] if finetuning_type == "full" else [0, 1, 4])
    assert all(0 < row["removed"] < 1 and row["residual"] <= 1e-5 for row in steps)
    for row in refreshes:
        assert set(row["reference_loss"]) == set(references.split(","))
        assert all(math.isfinite(loss) and loss > 0 for loss in row["reference_loss"].values())
    assert (Path(args["output_dir"]) / "training_ogpsa.png").exists()
