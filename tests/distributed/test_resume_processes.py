"""Two gloo processes, one of which is killed or has values that are not finite."""

import shutil
import signal
from pathlib import Path

import killed
import poisoned
import pytest
from conftest import OGPSA, assert_same_run, read_rows
from forks import fork, run_forked
from test_processes import on_two


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
    run_forked(tmp_path, killed.train, whole, processes=2)

    cut = {**args, "save_strategy": "steps", "save_steps": 2}
    finished = fork(tmp_path, killed.train, cut, "SIGKILL", target, number, processes=2)
    assert finished.codes[1] == -signal.SIGKILL, finished.output[-8000:]
    out = Path(cut["output_dir"])
    complete = [path.parent for path in sorted(out.glob("checkpoint-*/trainer_state.json"))]
    assert int(complete[-1].name.rpartition("-")[2]) % 3 != 0
    assert len(list(complete[-1].glob("ogpsa_state-*.safetensors"))) == (1 if engine == "ddp" else 2)
    run_forked(tmp_path, killed.train, {**cut, "resume_from_checkpoint": str(complete[-1])}, processes=2)

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
    run_forked(tmp_path, killed.train, args, processes=2)
    out, whole = Path(args["output_dir"]), tmp_path / "whole"
    shutil.copytree(out, whole)
    checkpoint = take_checkpoint(out, 4, tmp_path / "taken")

    run_forked(tmp_path, killed.train, {**args, "resume_from_checkpoint": str(checkpoint)}, processes=2)
    assert not (out / "checkpoint-4").exists()  # which a run from the start would have saved
    assert_same_run(out, whole)


def test_values_that_are_not_finite_in_one_process(base_args, tmp_path):
    args = on_two({**base_args, **OGPSA, "max_steps": 4}, "ddp")
    output = run_forked(tmp_path, poisoned.train, args, processes=2)
    steps, refreshes = read_rows(args["output_dir"])
    assert [row.get("non_finite_steps", 0) for row in steps] == [0, 0, 0, 1]
    assert all(0 < row["removed"] < 1 and row["residual"] < 1e-5 for row in steps[:3])
    assert [row["rank"] for row in refreshes] == [2, 2]
    assert all(0 < loss < 10 for row in refreshes for loss in row["reference_loss"].values())
    assert "did not project 1 gradient(s): they held inf or NaN" in output
