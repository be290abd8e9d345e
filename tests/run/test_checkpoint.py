"""The state in a checkpoint: what is written is what is read, to the last bit, or an error that says what is wrong."""

import os
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llamafactory_ogpsa import storage
from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.geometry import assign_groups, orthonormalise_
from llamafactory_ogpsa.run import checkpoint
from llamafactory_ogpsa.run.checkpoint import STATE_NAME, RunState, save_state
from llamafactory_ogpsa.run.refresh import GradientBasis
from llamafactory_ogpsa.subspace import Subspace


MADE_BY = {"ogpsa_scope": "parameter", "ogpsa_dataset": ["a", "b"]}
STATE = RunState(5, 3, True, False, 7, 2, 4, 1, {"a": 0.1, "b": 1 / 3}, MADE_BY)
BASIS = "ogpsa_state-00000-of-00001.safetensors"


def make_run(dtype=torch.float32, scope="parameter", equal=False):
    """Make an engine, a basis for it, and what makes one of a checkpoint's tensors."""
    engine = ReplicatedEngine(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(3, size, generator=generator).to(dtype) for size in engine.sizes]
    for row in rows if equal else ():
        row[1:] = row[:1]
    groups = assign_groups(len(rows), scope)
    subspace = Subspace(engine.names, *orthonormalise_(rows, groups), groups)

    settings = SimpleNamespace(
        rank=3, scope=scope, basis_dtype=str(dtype).removeprefix("torch."), basis_device="auto", kernel="torch"
    )
    return engine, subspace, GradientBasis(settings, 3, engine).restore


def load_state(folder, step, made_by, engine, restore):
    return checkpoint.load_state(folder, step, made_by, engine, False, restore)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("equal", [False, True])
def test_what_is_written_is_read_to_the_last_bit(tmp_path, dtype, scope, equal):
    engine, subspace, restore = make_run(dtype, scope, equal)
    save_state(tmp_path, STATE, subspace, engine, writes=True)
    state, loaded = load_state(tmp_path, 5, MADE_BY, engine, restore)
    basis, geometry = loaded.basis, loaded.geometry
    assert state == replace(STATE, pieces=1)
    assert len(basis) == len(subspace.basis)
    assert all(torch.equal(one, other) for one, other in zip(basis, subspace.basis, strict=True))
    assert geometry.ranks == subspace.geometry.ranks
    for name in ("whitening", "references", "shares", "norms"):
        assert torch.equal(getattr(geometry, name), getattr(subspace.geometry, name))
    assert sorted(os.listdir(tmp_path)) == [BASIS, STATE_NAME]


def test_a_basis_can_be_left_out_and_replaces_one_that_was_there(tmp_path):
    engine, subspace, restore = make_run()
    save_state(tmp_path, STATE, subspace, engine, writes=True)
    save_state(tmp_path, replace(STATE, step=6), None, engine, writes=True)
    assert os.listdir(tmp_path) == [STATE_NAME]
    assert load_state(tmp_path, 6, MADE_BY, engine, restore) == (replace(STATE, step=6), None)
    (tmp_path / STATE_NAME).unlink()
    assert load_state(tmp_path, 6, MADE_BY, engine, restore) is None


def test_a_process_that_does_not_write_leaves_the_folder_alone(tmp_path):
    engine, subspace, _ = make_run()
    save_state(tmp_path / "new", STATE, subspace, engine, writes=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("module", "function"), [(storage, "save_file"), (checkpoint, "asdict")])
def test_a_write_that_fails_leaves_no_state_that_is_taken_for_complete(tmp_path, monkeypatch, module, function):
    engine, subspace, restore = make_run()
    save_state(tmp_path, STATE, subspace, engine, writes=True)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, function, fail)
    with pytest.raises(OSError, match="no space left"):
        save_state(tmp_path, replace(STATE, step=6), subspace, engine, writes=True)
    assert not (tmp_path / STATE_NAME).exists()
    if function == "asdict":
        with pytest.raises(ValueError, match="is missing, but there is a basis beside it"):
            load_state(tmp_path, 6, MADE_BY, engine, restore)


@pytest.mark.parametrize("name", [STATE_NAME, BASIS])
def test_any_byte_that_is_lost_or_changed_is_an_error_or_does_not_matter(tmp_path, name):
    engine, subspace, restore = make_run()
    save_state(tmp_path, STATE, subspace, engine, writes=True)
    path, rng, errors = tmp_path / name, random.Random(0), []
    good = path.read_bytes()
    expected = load_state(tmp_path, 5, MADE_BY, engine, restore)
    for _ in range(400):
        position = rng.randrange(len(good))
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        path.write_bytes(good[:position] if rng.random() < 0.3 else bytes(bad))
        try:
            state, loaded = load_state(tmp_path, 5, MADE_BY, engine, restore)
        except ValueError as err:
            errors.append(str(err))
        else:
            # A figure that is only shown may read differently; nothing that the weights depend on does.
            assert all(torch.equal(one, other) for one, other in zip(loaded.basis, expected[1].basis, strict=True))
            assert (state.step, state.made_by) == (5, MADE_BY)
    assert len(errors) > 300
    assert all(message.startswith(str(tmp_path)) and "`ogpsa_save_state: false`" in message for message in errors)
