"""The state in a checkpoint: what is written is what is read, to the last bit, or an error that says what is wrong."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch

from llamafactory_ogpsa import state as states
from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.interface import Subspace
from llamafactory_ogpsa.state import STATE_NAME, RunState, load_state, save_state
from llamafactory_ogpsa.subspace import assign_groups, orthonormalise_


MADE_BY = {"ogpsa_scope": "parameter", "ogpsa_dataset": ["a", "b"]}
STATE = RunState(5, 3, None, 2, {"a": 0.1, "b": 1 / 3}, MADE_BY, idle_steps=4)
BASIS = "ogpsa_state-00000-of-00001.safetensors"


def make_run(dtype=torch.float32, scope="parameter", equal=False):
    """Make an engine, a basis for it, and what allocates one."""
    engine = ReplicatedEngine(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(3, size, generator=generator).to(dtype) for size in engine.sizes]
    for row in rows if equal else ():
        row[1:] = row[:1]
    groups, num_groups = assign_groups(len(rows), scope)
    subspace = Subspace(engine.names, *orthonormalise_(rows, groups, num_groups), groups)

    def allocate(rank):
        return [torch.empty(rank, size, dtype=dtype) for size in engine.sizes]

    return engine, subspace, allocate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("equal", [False, True])
def test_what_is_written_is_read_to_the_last_bit(tmp_path, dtype, scope, equal):
    engine, subspace, allocate = make_run(dtype, scope, equal)
    save_state(tmp_path, STATE, subspace, engine, writes=True)
    state, basis, geometry = load_state(tmp_path, 5, MADE_BY, engine, allocate)
    assert state == replace(STATE, pieces=1)
    assert len(basis) == len(subspace.basis)
    assert all(torch.equal(one, other) for one, other in zip(basis, subspace.basis, strict=True))
    assert geometry.ranks == subspace.geometry.ranks
    for name in ("whitening", "references", "shares"):
        assert torch.equal(getattr(geometry, name), getattr(subspace.geometry, name))
    assert sorted(os.listdir(tmp_path)) == [BASIS, STATE_NAME]


def test_a_basis_can_be_left_out_and_replaces_one_that_was_there(tmp_path):
    engine, subspace, allocate = make_run()
    save_state(tmp_path, STATE, subspace, engine, writes=True)
    save_state(tmp_path, replace(STATE, step=6), None, engine, writes=True)
    assert os.listdir(tmp_path) == [STATE_NAME]
    assert load_state(tmp_path, 6, MADE_BY, engine, allocate) == (replace(STATE, step=6), None, None)
    (tmp_path / STATE_NAME).unlink()
    assert load_state(tmp_path, 6, MADE_BY, engine, allocate) is None


def test_a_state_of_before_the_idle_steps_were_kept_is_read(tmp_path):
    engine, subspace, allocate = make_run()
    save_state(tmp_path, STATE, subspace, engine, writes=True)
    content = json.loads((tmp_path / STATE_NAME).read_text())
    assert content.pop("idle_steps") == 4
    (tmp_path / STATE_NAME).write_text(json.dumps(content))
    state, basis, _ = load_state(tmp_path, 5, MADE_BY, engine, allocate)
    assert state == replace(STATE, idle_steps=0, pieces=1)
    assert len(basis) == len(subspace.basis)


def test_a_process_that_does_not_write_leaves_the_folder_alone(tmp_path):
    engine, subspace, _ = make_run()
    save_state(tmp_path / "new", STATE, subspace, engine, writes=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("function", ["save_file", "asdict"])
def test_a_write_that_fails_leaves_no_state_that_is_taken_for_complete(tmp_path, monkeypatch, function):
    engine, subspace, allocate = make_run()
    save_state(tmp_path, STATE, subspace, engine, writes=True)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(states, function, fail)
    with pytest.raises(OSError, match="no space left"):
        save_state(tmp_path, replace(STATE, step=6), subspace, engine, writes=True)
    assert not (tmp_path / STATE_NAME).exists()
    if function == "asdict":
        with pytest.raises(ValueError, match="is missing, but there is a basis beside it"):
            load_state(tmp_path, 6, MADE_BY, engine, allocate)


@pytest.mark.parametrize("name", [STATE_NAME, BASIS])
def test_any_byte_that_is_lost_or_changed_is_an_error_or_does_not_matter(tmp_path, name):
    engine, subspace, allocate = make_run()
    save_state(tmp_path, STATE, subspace, engine, writes=True)
    path, rng, errors = tmp_path / name, random.Random(0), []
    good = path.read_bytes()
    expected = load_state(tmp_path, 5, MADE_BY, engine, allocate)
    for _ in range(400):
        position = rng.randrange(len(good))
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        path.write_bytes(good[:position] if rng.random() < 0.3 else bytes(bad))
        try:
            state, basis, _ = load_state(tmp_path, 5, MADE_BY, engine, allocate)
        except ValueError as err:
            errors.append(str(err))
        else:
            # A figure that is only shown may read differently; nothing that the weights depend on does.
            assert all(torch.equal(one, other) for one, other in zip(basis, expected[1], strict=True))
            assert (state.step, state.made_by) == (5, MADE_BY)
    assert len(errors) > 300
    assert all(message.startswith(str(tmp_path)) and "`ogpsa_save_state: false`" in message for message in errors)
