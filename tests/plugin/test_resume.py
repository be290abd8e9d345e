"""A run that is resumed ends as one that was not interrupted: the same bits, the same rows."""

import json
import shutil
import signal
from pathlib import Path

import killed
import pytest
from conftest import OGPSA, assert_same_run, rows_of, run_here, same_weights
from forks import fork

from llamafactory_ogpsa.run.checkpoint import STATE_NAME


# K = 3 divides neither 4 nor 5. An epoch has 6 steps.
BASE = {"max_steps": 7, "ogpsa_update_interval": 3, "learning_rate": 0.003}
SAVING = {"save_strategy": "steps", "save_steps": 1}
LORA = {"finetuning_type": "lora", "lora_dropout": 0.1}
PAIRS = {"dataset": "safety_pairs", "ogpsa_dataset": "helpful_pairs,truthful_pairs"}

RUNS = {
    "full": {},
    "full bf16": {"bf16": True},
    "full pure bf16": {"pure_bf16": True, "ogpsa_scope": "global"},
    "lora": LORA,
    "lora bf16": {**LORA, "bf16": True, "ogpsa_scope": "global", "ogpsa_method": "conflict"},
    "samples in turn, more directions": {"ogpsa_refresh_samples": 3, "ogpsa_rank": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 2},
    "fp16 with its scaler": {"fp16": True},
    "dpo": {"stage": "ogpsa_dpo", **PAIRS, **LORA},
}


def states_in(folder):
    return sorted(path.name for path in Path(folder).glob("*ogpsa*"))


@pytest.fixture
def cpu_bf16(monkeypatch):
    """Let runs have bfloat16 weights, which LLaMA-Factory allows on accelerators only."""
    from llamafactory.hparams import parser

    monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("cpu_scaler", "cpu_bf16")
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(base_args, tmp_path, name):
    args = {**base_args, **OGPSA, **BASE, **RUNS[name]}
    whole, saving = {**args, "output_dir": str(tmp_path / "whole")}, {**args, **SAVING}
    saving["output_dir"] = str(tmp_path / "saving")
    run_here(whole)
    run_here(saving)
    assert_same_run(saving["output_dir"], whole["output_dir"])
    # The next step refreshes after 3 and 6 alone; the plainest run goes on from every other kind of place as well.
    for step in (1, 3, 4, 5) if name == "full" else (3, 5):
        resumed = {**args, "output_dir": str(tmp_path / f"from-{step}")}
        run_here({**resumed, "resume_from_checkpoint": f"{saving['output_dir']}/checkpoint-{step}"})
        assert_same_run(resumed["output_dir"], whole["output_dir"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return what makes a run with a checkpoint at every step, once, and then its output folder."""
    folder = tmp_path_factory.mktemp("saved") / "run"

    def run(args):
        if not folder.exists():
            run_here({**args, **SAVING, "output_dir": str(folder)})
        return folder

    return run


@pytest.mark.parametrize("choice", [None, True])
def test_the_last_checkpoint_is_found(base_args, tmp_path, saved, choice):
    args = {**base_args, **OGPSA, **BASE, "output_dir": str(tmp_path / "again")}
    whole = saved(args)
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(whole / name, tmp_path / "again" / name)
    with open(tmp_path / "again" / "ogpsa_log.jsonl", "w") as f:
        f.write("".join((whole / "ogpsa_log.jsonl").read_text().splitlines(keepends=True)[:8]) + '{"step": 7, "rem')
    run_here(args if choice is None else {**args, "resume_from_checkpoint": choice})
    assert_same_run(tmp_path / "again", whole)


def test_what_a_checkpoint_holds(base_args, saved):
    folder = saved({**base_args, **OGPSA, **BASE})
    basis = "ogpsa_state-00000-of-00001.safetensors"
    for step in range(1, 8):
        # Where the next step refreshes there is no basis to keep.
        expected = [STATE_NAME] if step % 3 == 0 else [basis, STATE_NAME]
        assert states_in(folder / f"checkpoint-{step}") == expected
    size = (folder / "checkpoint-4" / basis).stat().st_size
    assert 2 * 20864 * 4 < size < 2 * 20864 * 4 * 1.2  # rank, parameters, float32; the rest is the header
    state = json.loads((folder / "checkpoint-4" / STATE_NAME).read_text())
    assert (state["step"], state["refreshed_at"], state["moved"], state["searching"]) == (4, 3, True, False)


def test_a_basis_that_is_not_kept_is_computed_anew(base_args, tmp_path, saved, said):
    args = {**base_args, **OGPSA, **BASE, "ogpsa_save_state": False, "output_dir": str(tmp_path / "out")}
    whole = saved({**base_args, **OGPSA, **BASE})
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.copytree(whole / name, tmp_path / "out" / name)
    # The checkpoints of this run replace those that are there, with the state that those had.
    run_here({**args, **SAVING, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-3")})
    assert not any("recomputes" in message for message in said())
    assert same_weights(tmp_path / "out", whole)
    assert states_in(tmp_path / "out" / "checkpoint-4") == []

    args["output_dir"] = str(tmp_path / "anew")
    run_here({**args, "resume_from_checkpoint": str(whole / "checkpoint-4")})
    assert any("recomputes its basis at step 4" in m and "`ogpsa_save_state` is false" in m for m in said())
    assert not same_weights(tmp_path / "anew", whole)
    assert [row["step"] for row in rows_of(tmp_path / "anew")[1]] == [0, 3, 4, 6]


def test_a_stock_checkpoint_goes_on_with_a_new_basis(base_args, tmp_path, said):
    stock = {**base_args, "max_steps": 4, **SAVING, "output_dir": str(tmp_path / "stock")}
    run_here(stock)
    args = {**base_args, **OGPSA, **BASE, "resume_from_checkpoint": str(tmp_path / "stock" / "checkpoint-4")}
    run_here(args)
    assert any("recomputes its basis at step 4" in m and "checkpoint-4 holds no basis" in m for m in said())
    steps, refreshes = rows_of(args["output_dir"])
    assert [row["step"] for row in steps] == [5, 6, 7]
    assert [row["step"] for row in refreshes] == [4, 6]


def test_save_only_model_keeps_no_state(base_args):
    run_here({**base_args, **OGPSA, "ogpsa_update_interval": 100, **SAVING, "save_only_model": True})
    assert states_in(Path(base_args["output_dir"]) / "checkpoint-1") == []
    assert (Path(base_args["output_dir"]) / "checkpoint-1" / "model.safetensors").exists()


def edit(**changes):
    """Change what the state file says."""

    def change(folder):
        path = folder / STATE_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def delete(name):
    return lambda folder: (folder / name).unlink()


BASIS = "ogpsa_state-00000-of-00001.safetensors"

# What happens to the state of checkpoint-4, what is changed in the run that resumes, and what the message must hold.
BROKEN = {
    "state is not JSON": (cut(STATE_NAME, 20), {}, "ogpsa_state.json cannot be read"),
    "state is empty": (cut(STATE_NAME, 0), {}, "ogpsa_state.json cannot be read"),
    "state is a list": (lambda f: (f / STATE_NAME).write_text("[]"), {}, "is of a format that this version"),
    "state is of another version": (edit(format=99), {}, "is of a format that this version"),
    "state lacks an entry": (lambda f: (f / STATE_NAME).write_text('{"format": 1}'), {}, "has no 'step'"),
    "state has a wrong entry": (edit(refreshed_at="3"), {}, "has '3' for 'refreshed_at'"),
    "state of another step": (edit(step=3), {}, "is of step 3, the checkpoint of step 4"),
    "state of more processes": (edit(pieces=2), {}, "has a basis in 2 piece.s., this run has one in 1"),
    "state is missing": (delete(STATE_NAME), {}, "is missing, but there is a basis beside it"),
    "basis is missing": (delete(BASIS), {}, "00001.safetensors cannot be read"),
    "basis is cut off": (cut(BASIS, 100_000), {}, "00001.safetensors cannot be read"),
    "basis is empty": (cut(BASIS, 0), {}, "00001.safetensors cannot be read"),
    "other sets": (
        None,
        {"ogpsa_dataset": "truthful,helpful"},
        "was made with `ogpsa_dataset` .'helpful', 'truthful'",
    ),
    "other rank": (None, {"ogpsa_rank": 4}, "was made with `ogpsa_rank` 2, this run has 4"),
    "other scope": (None, {"ogpsa_scope": "global"}, "`ogpsa_scope` 'parameter', this run has 'global'"),
    "other dtype": (None, {"ogpsa_basis_dtype": "bfloat16"}, "`ogpsa_basis_dtype` 'float32', this run has 'bfloat16'"),
    "other parameters": (
        None,
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        "has 'basis.model.*, a parameter that this run does not train",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_state_that_does_not_fit_is_an_error(base_args, tmp_path, saved, name):
    damage, changes, message = BROKEN[name]
    whole = saved({**base_args, **OGPSA, **BASE})
    checkpoint = tmp_path / "out" / "checkpoint-4"
    shutil.copytree(whole / "checkpoint-4", checkpoint)
    shutil.copy(whole / "ogpsa_log.jsonl", tmp_path / "out")
    if damage is not None:
        damage(checkpoint)
    args = {**base_args, **OGPSA, **BASE, **changes, "resume_from_checkpoint": str(checkpoint)}
    if "finetuning_type" in changes:
        (checkpoint / "optimizer.pt").unlink()  # of other parameters: the Trainer would refuse it first
    with pytest.raises(ValueError, match=message) as raised:
        run_here(args)
    assert "`ogpsa_save_state: false`" in str(raised.value)
    assert (tmp_path / "out" / "ogpsa_log.jsonl").read_text() == (whole / "ogpsa_log.jsonl").read_text()
    if damage is not None:
        run_here({**args, "ogpsa_save_state": False})
        assert len(rows_of(tmp_path / "out")[0]) == 7


# Where the process dies in the run below, which refreshes before the steps 1, 4 and 7 and saves after 2, 4 and 6.
DEATHS = {
    "in a step": ("SIGKILL", "torch.optim.adamw:AdamW.step", 6),
    "in a step, asked to": ("SIGTERM", "torch.optim.adamw:AdamW.step", 6),
    "in a refresh": ("SIGKILL", "llamafactory_ogpsa.run.refresh:orthonormalise_", 2),
    "in a refresh, by the user": ("SIGINT", "llamafactory_ogpsa.reference:accumulate_gradient", 4),
    "in a checkpoint, before the basis": ("SIGTERM", "llamafactory_ogpsa.storage:save_file", 2),
    "in a checkpoint, between basis and state": ("SIGKILL", "llamafactory_ogpsa.run.checkpoint:asdict", 2),
    "in a checkpoint, after the state": ("SIGKILL", "transformers:Trainer._save_rng_state", 2),
    "in the log": ("SIGKILL", "llamafactory_ogpsa.run.run:append_row", 8),
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_run_that_was_killed_goes_on(base_args, tmp_path, saved, name):
    kind, target, number = DEATHS[name]
    args = {**base_args, **OGPSA, **BASE, "save_strategy": "steps", "save_steps": 2}
    finished = fork(tmp_path, killed.train, args, kind, target, number)
    if kind == "SIGINT":
        assert finished.codes[0] != 0
        assert finished.output.rstrip().splitlines().count("KeyboardInterrupt") == 1
    else:
        assert finished.codes[0] == -getattr(signal, kind), finished.output[-2000:]
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    with open(out / "ogpsa_log.jsonl", "a") as f:
        f.write('{"step": 5, "rem')

    complete = [path.parent for path in sorted(out.glob("checkpoint-*/trainer_state.json"))]
    assert complete
    run_here({**args, "resume_from_checkpoint": str(complete[-1])})
    assert_same_run(out, saved({**base_args, **OGPSA, **BASE}))
