"""The state of a run in a checkpoint, with which a resumed run goes on exactly where it stopped.

Beside the Trainer's own files in a checkpoint's folder:

- `ogpsa_state-00000-of-00001.safetensors`: the basis and its geometry; one such file per process if each holds a piece
  of the basis; none if the first step after the checkpoint refreshes.
- `ogpsa_state.json`: everything else. It is written last, so if it exists, the basis is complete.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_type_hints

from ..engines import Engine
from ..files import replacing
from ..storage import Read, open_tensors, save_tensors
from ..subspace import Subspace


STATE_NAME = "ogpsa_state.json"

_FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Where a run is in its schedule, and the options that its basis was made with.

    Attributes:
        step: the optimizer steps taken.
        refreshed_at: the step of the last refresh.
        moved, searching, covered: see `Schedule`.
        non_finite_steps: gradients that were not projected since the last logged step.
        idle_steps, uncovered_steps: see `StepLog`.
        reference_losses: those of the last refresh, by the name of the set.
        made_by: the options that the basis depends on, by name.
        unreached: the tensors that reference inputs no longer reach; see `InputBasis`.
        pieces: the number of files that the basis is in; 0 if it was left out.
        format: the version of this file.
    """

    step: int
    refreshed_at: int | None
    moved: bool
    searching: bool
    covered: int
    non_finite_steps: int
    idle_steps: int
    uncovered_steps: int
    reference_losses: dict
    made_by: dict
    unreached: list = field(default_factory=list)
    pieces: int = 0
    format: int = _FORMAT


def damaged(path: str, problem: object) -> ValueError:
    """Make the error of a state that cannot be used, with what to do about it."""
    return ValueError(
        f"{path} {problem}, so the run cannot go on exactly where it stopped. Resume from another checkpoint; or set "
        f"`ogpsa_save_state: false`, or delete the checkpoint's ogpsa_state files, to go on with a new basis."
    )


@contextmanager
def failing_together(engine: Engine, kind: type[Exception]) -> Iterator[None]:
    """At its end, raise in every process if the block failed in any, so that none waits for one that has stopped.

    Raises:
        Exception: this process's error, of that kind, or a RuntimeError about another's.
    """
    error = None
    try:
        yield
    except kind as err:
        error = err
    (failed,) = engine.processes.totals([float(error is not None)])
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(
            f"{failed:.0f} other process(es) could not read or write the state of OGPSA: see their errors."
        )


def _pieces(engine: Engine, sharded: bool) -> tuple[int, int]:
    """Return the number of pieces that a basis is in, and which of them this process has."""
    return (engine.processes.size, engine.processes.rank) if sharded else (1, 0)


def _basis_path(folder: str, pieces: int, piece: int) -> str:
    return os.path.join(folder, f"ogpsa_state-{piece:05d}-of-{pieces:05d}.safetensors")


def _basis_files(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "ogpsa_state-*")))


def save_state(folder: str, state: RunState, subspace: Subspace | None, engine: Engine, writes: bool) -> None:
    """Write a state into a checkpoint's folder, without a basis if `subspace` is None; every process calls it.

    `state.pieces` is filled in here. `writes`: this process writes what all processes have.
    """
    pieces, piece = _pieces(engine, subspace is not None and subspace.sharded)
    if writes:
        remove_state(folder)
    if subspace is not None:
        if pieces > 1:
            engine.processes.totals([1.0])  # an old state must be gone before the first piece of the new one is there
        with failing_together(engine, OSError):
            if writes or pieces > 1:
                os.makedirs(folder, exist_ok=True)
                save_tensors(_basis_path(folder, pieces, piece), subspace.tensors(), {"step": str(state.step)})
    if writes:
        state = replace(state, pieces=0 if subspace is None else pieces)
        path = os.path.join(folder, STATE_NAME)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
            json.dump(asdict(state), f, indent=2)
            f.write("\n")


def remove_state(folder: str) -> None:
    """Remove an earlier state from a folder that is written again, `ogpsa_state.json` first."""
    for path in [os.path.join(folder, STATE_NAME), *_basis_files(folder)]:
        if os.path.exists(path):
            os.remove(path)


def load_state(
    folder: str,
    step: int,
    made_by: dict[str, Any],
    engine: Engine,
    sharded: bool,
    restore: Callable[[Read, set[str]], Subspace],
) -> tuple[RunState, Subspace | None] | None:
    """Read the state in a checkpoint's folder and check that it belongs to this run; every process calls it.

    `step`: the optimizer steps that the Trainer has taken; `made_by`: this run's options that the basis depends on;
    `sharded`: this run's basis is in pieces, one per process; `restore`: makes a basis from a file's tensors, given a
    function that reads one by name, and their names.

    Returns:
        the state and the basis (None if it was left out); None if the folder has no state.

    Raises:
        ValueError: it is damaged or belongs to another run; says what is wrong and what to do.
    """
    path = os.path.join(folder, STATE_NAME)
    found = os.path.exists(path)
    (processes,) = engine.processes.totals([float(found)])
    if 0 < processes < engine.processes.size:
        raise damaged(path, f"is where only {processes:.0f} of {engine.processes.size} processes see it")
    if not found:
        if _basis_files(folder):
            raise damaged(path, "is missing, but there is a basis beside it")
        return None

    state = _read_state(path)
    pieces, piece = _pieces(engine, sharded)
    if state.step != step:
        raise damaged(path, f"is of step {state.step}, the checkpoint of step {step}")
    for name, value in made_by.items():
        if state.made_by.get(name) != value:
            raise damaged(path, f"was made with `{name}` {state.made_by.get(name)!r}, this run has {value!r}")
    if state.pieces not in (0, pieces):
        raise damaged(path, f"has a basis in {state.pieces} piece(s), this run has one in {pieces}")
    if state.pieces == 0:
        return state, None

    path = _basis_path(folder, pieces, piece)
    try:
        with open_tensors(path) as (read, metadata, names):
            if metadata.get("step") != str(step):
                raise ValueError(f"is of step {metadata.get('step')}, not {step}")
            return state, restore(read, names)
    except ValueError as err:
        raise damaged(path, err) from err


def _read_state(path: str) -> RunState:
    """Read a state file; raise a ValueError if it is not what `save_state` writes."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError) as err:
        raise damaged(path, f"cannot be read ({err})")

    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise damaged(path, "is of a format that this version of llamafactory-ogpsa does not know")
    types = get_type_hints(RunState)
    for name, expected in types.items():
        if name not in content:
            raise damaged(path, f"has no {name!r}")
        if not isinstance(content[name], expected):
            raise damaged(path, f"has {content[name]!r} for {name!r}")
    return RunState(**{name: content[name] for name in types})
