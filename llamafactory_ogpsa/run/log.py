"""`ogpsa_log.jsonl`, the trackers' figures, and a run's messages."""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from ..files import replacing
from ..options import Settings
from ..projection import ProjectionStats
from ..reference import ReferenceSet, take_in_turn
from .coverage import name_kinds
from .host import Host
from .refresh import GradientBasis
from .refresh_inputs import InputBasis
from .schedule import count_refreshes


LOG_NAME = "ogpsa_log.jsonl"
PLOT_NAME = "training_ogpsa.png"

# The run logs a warning if `removed` is above this at so many logged steps in a row.
_MOST_REMOVED = 0.99
_MOST_REMOVED_STEPS = 5
# The same for the share of the squared gradient in tensors without a direction.
_MOST_UNCOVERED = 0.05
_MOST_UNCOVERED_STEPS = 2


def read_log(path: str) -> list[dict[str, Any]]:
    """Return the rows of a log; a missing file counts as empty, and a last line without its end is left out.

    Raises:
        ValueError: a line other than the last is not JSON; names the file and the line.
    """
    if not os.path.exists(path):
        return []

    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as err:
            raise ValueError(f"{path}, line {number}, is not JSON: {err}; fix the line, or move the file away")
    return rows


def begin_log(path: str, step: int, checkpoint: str | None = None) -> None:
    """Start the log of a run that begins or resumes at `step`, without the rows that the run will write again.

    A refresh is logged under the step before it, a step under its own number, so a resumed run repeats the refreshes
    from `step` on and the steps after it. Earlier rows come from the log beside the checkpoint, if there is one.
    """
    beside = path if checkpoint is None else os.path.join(os.path.dirname(os.path.abspath(checkpoint)), LOG_NAME)
    rows = read_log(beside) if step > 0 else []
    rows = [row for row in rows if row["step"] < step + (0 if row.get("refresh") else 1)]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def append_row(path: str, row: dict[str, Any]) -> None:
    """Append one row, in one write."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def introduce(
    logger: logging.Logger,
    settings: Settings,
    sets: Sequence[ReferenceSet],
    host: Host,
    maker: GradientBasis | InputBasis,
    from_zero: bool,
) -> None:
    """Log the settings and the expected cost in one line; warn of too few or too many refreshes.

    `from_zero`: LoRA's `B` is zero. Then the gradient of `A` is zero too, and its reference gradients come from a
    second refresh.
    """
    engine, steps = host.engine, host.max_steps
    repeated = from_zero and settings.scope != "inputs"
    counts = [len(take_in_turn(len(ref.samples), settings.refresh_samples, 0)) for ref in sets]
    refreshes = count_refreshes(steps, settings.update_interval, repeated)
    cost = refreshes * sum(counts) / (steps * host.samples_per_step) if steps > 0 else 0.0
    each = " in each process" if engine.processes.size > 1 else ""
    if settings.update_interval < steps:
        when = f"every K = {settings.update_interval} steps"
    else:
        when = "before the first step" + (", and again once the weights have moved" if repeated else " alone")
    described = ", ".join(f"{ref.name} ({count} samples)" for ref, count in zip(sets, counts, strict=True))
    logger.info(
        f"OGPSA is on: reference sets {described}; refreshed {when}; "
        f"rank {maker.rank}; scope {settings.scope}; method {settings.method}; "
        f"{engine.num_parameters:,} trainable parameters in {len(engine.names)} tensors; "
        f"basis {maker.num_bytes / 2**20:,.1f} MiB on {maker.device}{each}; "
        f"expected cost {cost:.2f} reference samples per training sample."
    )
    given = f"the run has {steps} steps, `ogpsa_update_interval` is {settings.update_interval}"
    # With scope `inputs`, a single refresh makes sense.
    if settings.scope != "inputs" and refreshes == 1 and steps > 1:
        logger.warning(f"OGPSA refreshes its basis once: {given}. A smaller one follows the model as it changes.")
    if settings.scope == "inputs" and settings.method != "monitor" and from_zero and refreshes > 1:
        logger.warning(
            f"OGPSA refreshes its basis {refreshes} times: {given}. LoRA's B is then not protected against inputs that "
            "the first refresh has not seen. With an interval above the run's steps there is one refresh."
        )


class StepLog:
    """Makes the rows of logged steps; warns once of a run that hardly learns or is partly unprotected.

    Attributes:
        idle_steps: logged steps in a row at which almost all of the gradient was removed.
        uncovered_steps: logged steps in a row with much of the gradient in tensors without a direction.
    """

    def __init__(self, settings: Settings, names: Sequence[str], logger: logging.Logger | None) -> None:
        """Start a log; `names`: those of the reference sets; `logger`: None in processes that do not log."""
        self._settings = settings
        self._names = names
        self._logger = logger
        self._warned_no_update = False
        self.idle_steps = 0
        self.uncovered_steps = 0

    def make_row(
        self,
        step: int,
        stats: ProjectionStats,
        uncovered: torch.Tensor | None,
        uncovered_names: Sequence[str],
        update: dict[str, Any],
        non_finite: int,
    ) -> dict[str, Any]:
        """Make the row of a logged step; reading the figures waits for the device.

        `uncovered`: see `measure_uncovered`; `uncovered_names`: the tensors without a direction; `update`: see
        `update_figures`; `non_finite`: gradients since the last logged step that were not projected.
        """
        row: dict[str, Any] = {"step": step, "removed": None, "residual": None}
        row |= dict.fromkeys(("cosine", "projected_cosine") if stats.has_cosines else ())
        if stats.finite:
            row |= {"removed": stats.removed, "residual": stats.residual}
            if stats.has_cosines:
                row["cosine"] = dict(zip(self._names, stats.cosines, strict=True))
                row["projected_cosine"] = dict(zip(self._names, stats.projected_cosines, strict=True))
            row["uncovered"] = 0.0 if uncovered is None else uncovered.item()
            row |= update
            self._watch(row, uncovered_names)
        if non_finite:
            row["non_finite_steps"] = non_finite
            self._warn(f"OGPSA did not project {non_finite} gradient(s): they held inf or NaN.")
        return row

    def tracked(self, row: dict[str, Any], reference_losses: dict[str, float]) -> dict[str, float]:
        """Return the figures of a row for trackers, each under `ogpsa/`."""
        figures = {}
        for key, value in row.items():
            if key in ("removed", "residual", "uncovered", "update_share") and value is not None:
                figures[f"ogpsa/{key}"] = value
            elif key.startswith("update_"):
                figures |= {f"ogpsa/{key}/{name}": number for name, number in value.items()}
        return figures | {f"ogpsa/reference_loss/{name}": loss for name, loss in reference_losses.items()}

    def warn_no_update(self, optimizer: str) -> None:
        """Warn once that the change of the weights is not measured."""
        if not self._warned_no_update:
            self._warned_no_update = True
            self._warn(
                f"OGPSA does not log what the optimizer's step does (`update_*`): the step cannot be computed from the "
                f"state of {optimizer}, and so many weights are trained that they are not copied."
            )

    def _warn(self, message: str) -> None:
        if self._logger is not None:
            self._logger.warning(message)

    def _watch(self, row: dict[str, Any], uncovered_names: Sequence[str]) -> None:
        if self.uncovered_steps < _MOST_UNCOVERED_STEPS and self._settings.method != "monitor":
            self.uncovered_steps = self.uncovered_steps + 1 if row["uncovered"] > _MOST_UNCOVERED else 0
            if self.uncovered_steps == _MOST_UNCOVERED_STEPS:
                advice = "The reference sets do not reach them; add a set that does, or do not train them."
                if self._settings.scope == "inputs":
                    advice += (
                        " Fused experts and convolutions have no basis with `ogpsa_scope: inputs`, for any reference "
                        "set; use another scope, or do not train them."
                    )
                self._warn(
                    f"OGPSA does not protect a part of the model: {row['uncovered']:.0%} of the squared gradient is in "
                    f"tensors without a direction ({name_kinds(uncovered_names)}). {advice}"
                )
        if self.idle_steps < _MOST_REMOVED_STEPS and self._settings.method != "monitor":
            self.idle_steps = self.idle_steps + 1 if row["removed"] > _MOST_REMOVED else 0
            if self.idle_steps == _MOST_REMOVED_STEPS:
                other = "" if self._settings.scope == "inputs" else " or `ogpsa_method: conflict`"
                self._warn(
                    f"OGPSA has removed more than {_MOST_REMOVED:.0%} of the gradient at {_MOST_REMOVED_STEPS} logged "
                    "steps in a row: the run hardly learns. Are the `ogpsa_dataset` sets the training data? A lower "
                    f"`ogpsa_rank`{other} leaves more."
                )
