"""Two gloo processes under DistributedDataParallel against one process with the same global batch."""

import pytest
import torch
from conftest import load_weights, read_rows, run_cli, run_here


pytestmark = pytest.mark.cli

TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}

RUNS = {
    "sft full": {"stage": "ogpsa_sft", "ogpsa_dataset": "helpful,truthful"},
    "sft lora global conflict": {
        "stage": "ogpsa_sft",
        "finetuning_type": "lora",
        "ogpsa_dataset": "helpful,truthful",
        "ogpsa_scope": "global",
        "ogpsa_method": "conflict",
    },
    "dpo lora": {
        "stage": "ogpsa_dpo",
        "finetuning_type": "lora",
        "dataset": "safety_pairs",
        "ogpsa_dataset": "helpful_pairs,truthful_pairs",
    },
    # BCO's loss communicates, and the last batch of a set is one process's alone.
    "bco full": {
        "stage": "ogpsa_dpo",
        "dataset": "safety_pairs",
        "ogpsa_dataset": "helpful_pairs",
        "ogpsa_num_samples": 3,
        "ogpsa_batch_size": 1,
        "pref_bco_weight": 0.5,
    },
}


@pytest.mark.parametrize(("name", "optim"), [*((name, "sgd") for name in RUNS), ("sft full", "adamw_torch")])
def test_two_processes_do_what_one_does(base_args, tmp_path, name, optim):
    one = {
        **base_args,
        **RUNS[name],
        "disable_shuffling": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "optim": optim,
        "learning_rate": 0.1 if optim == "sgd" else 1e-3,
        "lr_scheduler_type": "constant",
        "ogpsa_update_interval": 2,
        "output_dir": str(tmp_path / "one"),
    }
    two = {**one, "per_device_train_batch_size": 2, "ddp_backend": "gloo", "output_dir": str(tmp_path / "two")}
    run_here(one)
    run_cli(two, tmp_path, env=TWO)

    expected, weights = load_weights(one["output_dir"]), load_weights(two["output_dir"])
    difference = torch.cat([(weights[k].double() - expected[k].double()).flatten() for k in expected]).norm()
    norm = torch.cat([expected[k].double().flatten() for k in expected]).norm()
    assert difference / norm <= (1e-5 if optim == "sgd" else 1e-4)

    steps, refreshes = read_rows(two["output_dir"])
    expected_steps, expected_refreshes = read_rows(one["output_dir"])
    for row, other in zip(steps, expected_steps, strict=True):
        assert row["removed"] == pytest.approx(other["removed"], rel=1e-3, abs=1e-6)
        assert "conflict" in name or row["residual"] <= 1e-5
    for row, other in zip(refreshes, expected_refreshes, strict=True):
        assert row["step"] == other["step"]
        assert row["reference_loss"] == pytest.approx(other["reference_loss"], rel=1e-5)


def test_a_process_without_a_reference_sample_waits_for_the_other(base_args, tmp_path):
    args = {
        **base_args,
        "stage": "ogpsa_sft",
        "ogpsa_dataset": "helpful",
        "ogpsa_num_samples": 1,
        "ddp_backend": "gloo",
    }
    run_cli(args, tmp_path, env=TWO)
    steps, refreshes = read_rows(args["output_dir"])
    assert len(steps) == 3
    assert refreshes[0]["rank"] == 1
