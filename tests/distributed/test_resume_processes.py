"""Two gloo processes, one of which is killed or has values that are not finite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import OGPSA, assert_same_run, free_port, read_rows
from test_processes import TWO, on_two


pytestmark = pytest.mark.cli

KILLED = Path(__file__).parent.parent / "plugin" / "killed.py"
POISONED = Path(__file__).with_name("poisoned.py")

# The engine, how it differs, and what the second process dies in: K = 3, checkpoints at the steps 2, 4 and 6.
RUNS = {
    "ddp full, in a refresh": ("ddp", {}, "llamafactory_ogpsa.run.refresh:orthonormalise_", 2),
    "ddp lora bf16, in a step": (
        "ddp",
        {"finetuning_type": "lora", "lora_dropout": 0.1, "bf16": True},
        "torch.optim.adamw:AdamW.step",
        6,
    ),
    "zero2 full, in a checkpoint": ("zero2", {"ogpsa_scope": "global"}, "llamafactory_ogpsa.storage:save_file", 2),
}


def train_on_two(args, tmp_path, script, *words):
    """Run two processes of a script on a YAML made of `args`."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(args))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command = [*launcher, str(script), str(config), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **TWO})


def take_checkpoint(out, step, to):
    """Leave a run nothing but a checkpoint and its log, both in another folder; return the checkpoint."""
    to.mkdir()
    checkpoint = (out / f"checkpoint-{step}").rename(to / f"checkpoint-{step}")
    (out / "ogpsa_log.jsonl").rename(to / "ogpsa_log.jsonl")
    shutil.rmtree(out)
    return checkpoint


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_which_a_process_was_killed_goes_on(base_args, tmp_path, name):
    engine, changes, target, number = RUNS[name]
    args = {**base_args, **OGPSA, "ogpsa_update_interval": 3, "max_steps": 7, "learning_rate": 0.003, **changes}
    args = on_two(args, engine)
    whole = {**args, "output_dir": str(tmp_path / "whole")}
    finished = train_on_two(whole, tmp_path, KILLED)
    assert finished.returncode == 0, finished.stderr[-4000:]

    cut = {**args, "save_strategy": "steps", "save_steps": 2}
    killed = train_on_two(cut, tmp_path, KILLED, "SIGKILL", target, str(number))
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    out = Path(cut["output_dir"])
    complete = [path.parent for path in sorted(out.glob("checkpoint-*/trainer_state.json"))]
    assert int(complete[-1].name.rpartition("-")[2]) % 3 != 0
    assert len(list(complete[-1].glob("ogpsa_state-*.safetensors"))) == (1 if engine == "ddp" else 2)
    resumed = train_on_two({**cut, "resume_from_checkpoint": str(complete[-1])}, tmp_path, KILLED)
    assert resumed.returncode == 0, resumed.stderr[-4000:]

    assert_same_run(out, whole["output_dir"])


# At step 4 the basis of step 3 is in use.
@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("zero1", {"finetuning_type": "lora", "lora_dropout": 0.1}),
        ("zero2 offload", {"gradient_accumulation_steps": 2}),
        ("zero3", {"stage": "ogpsa_dpo", "dataset": "safety_pairs", "ogpsa_loss": "sft"}),
        ("zero3 offload", {"ogpsa_scope": "global", "ogpsa_rank": 4}),
    ],
)
def test_a_run_goes_on_from_a_checkpoint(base_args, tmp_path, engine, changes):
    args = {**base_args, **OGPSA, "ogpsa_update_interval": 3, "max_steps": 6, "learning_rate": 0.003, **changes}
    args = {**on_two(args, engine), "save_strategy": "steps", "save_steps": 4}
    finished = train_on_two(args, tmp_path, KILLED)
    assert finished.returncode == 0, finished.stderr[-4000:]
    out, whole = Path(args["output_dir"]), tmp_path / "whole"
    shutil.copytree(out, whole)
    checkpoint = take_checkpoint(out, 4, tmp_path / "taken")

    resumed = train_on_two({**args, "resume_from_checkpoint": str(checkpoint)}, tmp_path, KILLED)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert not (out / "checkpoint-4").exists()  # which a run from the start would have saved
    assert_same_run(out, whole)


def test_values_that_are_not_finite_in_one_process(base_args, tmp_path):
    args = on_two({**base_args, **OGPSA, "max_steps": 4}, "ddp")
    finished = train_on_two(args, tmp_path, POISONED)
    assert finished.returncode == 0, finished.stderr[-4000:]
    steps, refreshes = read_rows(args["output_dir"])
    assert [row.get("non_finite_steps", 0) for row in steps] == [0, 0, 0, 1]
    assert all(0 < row["removed"] < 1 and row["residual"] < 1e-5 for row in steps[:3])
    assert [row["rank"] for row in refreshes] == [2, 2]
    assert all(0 < loss < 10 for row in refreshes for loss in row["reference_loss"].values())
    assert "did not project 1 gradient(s): they held inf or NaN" in finished.stderr + finished.stdout
