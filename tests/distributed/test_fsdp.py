"""FSDP2 end to end: `accelerate launch` with two gloo processes against one process with the same global batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import OGPSA, WORDS, load_weights, make_model_dir, read_rows, rows_of, run_here
from test_resume_processes import take_checkpoint


pytestmark = pytest.mark.cli

HERE = Path(__file__).parent

CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": False,
    },
    "machine_rank": 0,
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": True,
}

RUNS = {
    "sft full": {},
    "sft lora": {"finetuning_type": "lora", "ogpsa_scope": "global", "ogpsa_method": "conflict"},
    "inputs full": {"ogpsa_scope": "inputs", "ogpsa_rank": 5},
    "dpo full": {"stage": "ogpsa_dpo", "dataset": "safety_pairs", "ogpsa_loss": "sft", "ogpsa_rank": 4},
}


def launch(args, tmp_path, **changes):
    """Run `accelerate launch` on LLaMA-Factory, with changes of the FSDP settings; return the finished process."""
    config = {**CONFIG, "fsdp_config": {**CONFIG["fsdp_config"], **changes}}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(args))
    words = ["launch", "--config_file", tmp_path / "accelerate.yaml", "-m", "llamafactory.launcher"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, tmp_path / "run.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{HERE / 'fsdp_on_cpu'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


def load_sharded(checkpoint, tmp_path):
    """Load the weights of a sharded checkpoint by name."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint / "pytorch_model_fsdp_0", tmp_path / "weights.pt")
    return torch.load(tmp_path / "weights.pt", weights_only=True)["model"]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(base_args, tmp_path, name):
    args = {
        **base_args,
        **OGPSA,
        "ogpsa_num_samples": 11,
        **RUNS[name],
        "model_name_or_path": make_model_dir(tmp_path / "model", words=[*WORDS, "more"], tie=False),
        "disable_shuffling": True,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    two = {**args, "per_device_train_batch_size": 2, "ddp_backend": "gloo", "output_dir": str(tmp_path / "two")}
    process = launch(two, tmp_path)
    assert process.returncode == 0, process.stderr[-6000:]
    run_here(args)

    (steps, refreshes), (expected_steps, expected_refreshes) = map(read_rows, (two["output_dir"], args["output_dir"]))
    for row, other in zip(steps, expected_steps, strict=True):
        assert row["removed"] == pytest.approx(other["removed"], rel=1e-3, abs=1e-6)
        for key in ("cosine", "update_cosine", "update_share"):
            assert row.get(key) == pytest.approx(other.get(key), rel=1e-3, abs=1e-4)
        assert args.get("ogpsa_method") == "conflict" or row["residual"] <= 1e-5
    for row, other in zip(refreshes, expected_refreshes, strict=True):
        assert row["reference_loss"] == pytest.approx(other["reference_loss"], rel=1e-5)
    norms = [
        [
            entry["grad_norm"]
            for entry in json.loads((Path(run["output_dir"]) / "checkpoint-4" / "trainer_state.json").read_text())[
                "log_history"
            ]
        ]
        for run in (two, args)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)

    if args["finetuning_type"] == "full":
        weights = load_sharded(Path(two["output_dir"]) / "checkpoint-4", tmp_path)
        expected = load_weights(args["output_dir"])
        assert weights.keys() == expected.keys()
        difference = torch.cat([(weights[k].double() - expected[k].double()).flatten() for k in expected]).norm()
        assert difference / torch.cat([expected[k].double().flatten() for k in expected]).norm() <= 1e-5


# SGD, because accelerate 1.11.0 loses AdamW's state of sharded checkpoints, in stock runs too.
def test_a_run_goes_on_from_a_checkpoint(base_args, tmp_path):
    args = {**base_args, **OGPSA, "ddp_backend": "gloo", "ogpsa_update_interval": 3, "max_steps": 6}
    args |= {"model_name_or_path": make_model_dir(tmp_path / "model", tie=False)}
    args |= {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}
    finished = launch(args, tmp_path)
    assert finished.returncode == 0, finished.stderr[-6000:]
    out, whole = Path(args["output_dir"]), tmp_path / "whole"
    shutil.copytree(out, whole)
    checkpoint = take_checkpoint(out, 4, tmp_path / "taken")

    resumed = launch({**args, "resume_from_checkpoint": str(checkpoint)}, tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert not (out / "checkpoint-2").exists()  # which a run from the start would have saved
    weights, expected = (load_sharded(run / "checkpoint-6", tmp_path) for run in (out, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert rows_of(out) == rows_of(whole)


def test_fsdp1_is_refused_by_name(base_args, tmp_path):
    process = launch(
        {**base_args, **OGPSA, "ddp_backend": "gloo"},
        tmp_path,
        fsdp_version=1,
        fsdp_reshard_after_forward="FULL_SHARD",
    )
    assert process.returncode != 0
    assert "`fsdp_version` is 1 under OGPSA; allowed: 2 (FSDP2, PyTorch's `fully_shard`)." in process.stderr
