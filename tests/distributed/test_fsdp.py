"""FSDP2 end to end: two gloo processes against one process with the same global batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsdp
import pytest
import torch
import yaml
from conftest import OGPSA, WORDS, load_weights, make_model_dir, read_rows, rows_of, run_here
from forks import fork, run_forked
from test_resume_processes import take_checkpoint


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


# What `accelerate launch` hands to the processes.
ENV = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no"}
for key, value in CONFIG["fsdp_config"].items():
    ENV[key.upper()] = value if isinstance(value, str) else str(value).lower()


def launch(args, tmp_path):
    """Run `accelerate launch` on LLaMA-Factory."""
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(args))
    words = ["launch", "--config_file", tmp_path / "accelerate.yaml", "-m", "llamafactory.launcher"]
    process = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, tmp_path / "run.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{HERE / 'fsdp_on_cpu'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert process.returncode == 0, process.stderr[-6000:]


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
    if name == "sft full":
        launch(two, tmp_path)
    else:
        run_forked(tmp_path, fsdp.train, two, processes=2, env=ENV)
    run_here(args)

    (steps, refreshes), (expected_steps, expected_refreshes) = map(read_rows, (two["output_dir"], args["output_dir"]))
    for row, other in zip(steps, expected_steps, strict=True):
        assert row["removed"] == pytest.approx(other["removed"], rel=1e-3, abs=1e-6)
        assert row.keys() == other.keys()
        for key in {"cosine", "update_cosine", "update_share"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4)
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
    run_forked(tmp_path, fsdp.train, args, processes=2, env=ENV)
    out, whole = Path(args["output_dir"]), tmp_path / "whole"
    shutil.copytree(out, whole)
    checkpoint = take_checkpoint(out, 4, tmp_path / "taken")

    run_forked(tmp_path, fsdp.train, {**args, "resume_from_checkpoint": str(checkpoint)}, processes=2, env=ENV)
    assert not (out / "checkpoint-2").exists()  # which a run from the start would have saved
    weights, expected = (load_sharded(run / "checkpoint-6", tmp_path) for run in (out, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert rows_of(out) == rows_of(whole)


def test_fsdp1_is_refused_by_name(base_args, tmp_path):
    args = {**base_args, **OGPSA, "ddp_backend": "gloo"}
    env = {**ENV, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
    finished = fork(tmp_path, fsdp.train, args, processes=2, env=env)
    assert any(finished.codes)
    assert "`fsdp_version` is 1 under OGPSA; allowed: 2 (FSDP2, PyTorch's `fully_shard`)." in finished.output
