"""One training run, driven by a trainer's events: it refreshes the basis, projects gradients and writes the log."""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..inputs import InputStats, InputSubspace
from ..noise import check_repeatable, preserve_random_state, without_noise
from ..options import Settings
from ..projection import ProjectionStats
from ..reference import ReferencePasses, ReferenceSet, take_in_turn
from ..subspace import Subspace
from .checkpoint import RunState, failing_together, load_state, remove_state, save_state
from .coverage import Coverage, find_coverage, measure_uncovered
from .host import Host
from .log import LOG_NAME, PLOT_NAME, StepLog, append_row, begin_log, introduce
from .plot import plot_log
from .refresh import GradientBasis
from .refresh_inputs import InputBasis
from .schedule import Schedule
from .update import make_change_reader, update_figures


# LLaMA-Factory's own logger shows everything below its name, in the terminal and in the web UI.
logger = logging.getLogger("llamafactory.ogpsa")

# What a checkpoint keeps of `Schedule`.
_SCHEDULED = ("refreshed_at", "moved", "searching", "covered")


class OgpsaRun:
    """Refreshes the subspace of a run, projects its gradients, and logs the figures.

    Call `begin`; for each optimizer step `before_step`, `project` and `after_step`, and `figures` if it is logged;
    `save` for each checkpoint; and `end`. Every process calls everything.

    Attributes:
        subspace: the current basis; None before the first refresh and when training has ended.
        schedule: when it is computed anew.
        log_path: where the figures of the run are written.
    """

    def __init__(self, settings: Settings, sets: Sequence[ReferenceSet]) -> None:
        """Prepare a run with tokenised reference sets."""
        self.settings = settings
        self.sets = sets
        self.names = [reference.name for reference in sets]

    def begin(self, host: Host, step: int = 0, checkpoint: str | None = None) -> None:
        """Log the settings, restore the state of a checkpoint, and start the log.

        Args:
            host: the trainer.
            step: the optimizer steps taken, above 0 if training resumes.
            checkpoint: the folder of the checkpoint that it resumes from.

        Raises:
            ValueError: the checkpoint's state is damaged or belongs to another run.
        """
        self.host, self.engine = host, host.engine
        self.log_path = os.path.join(host.output_dir, LOG_NAME)
        self.subspace: Subspace | InputSubspace | None = None
        self.coverage: Coverage | None = None
        self.reference_losses: dict[str, float] = {}
        self._noise_checked = False
        self._stats: ProjectionStats | InputStats | None = None
        self._uncovered: torch.Tensor | None = None
        self._read_changes: Any = None
        self._update: dict[str, Any] = {}
        self._non_finite: int | torch.Tensor = 0
        self._step_log = StepLog(self.settings, self.names, logger if host.main else None)
        if self.settings.scope == "inputs":
            self._maker = InputBasis(self.settings, self.engine, host.model)
        else:
            self._maker = GradientBasis(self.settings, len(self.sets), self.engine)
        # Inputs are there from the start, some gradients are not.
        self.schedule = Schedule(self.settings.update_interval, searching=self.settings.scope != "inputs")
        from_zero = self._starts_at_zero()
        if host.main:
            introduce(logger, self.settings, self.sets, host, self._maker, from_zero)
        if checkpoint is not None:
            self._resume(step, checkpoint)
        if host.main:
            os.makedirs(host.output_dir, exist_ok=True)
            begin_log(self.log_path, step, checkpoint)

    def before_step(self, step: int, batch_size: int) -> None:
        """Make a new basis at the current weights, if it is due; see `Schedule`.

        Leaves random state, dropout, gradients, optimizer, scheduler and data order as they were.

        Args:
            step: the optimizer steps taken.
            batch_size: samples per reference batch, unless `ogpsa_batch_size` says otherwise.

        Raises:
            FloatingPointError: a reference set gives no finite gradient; names the set.
            RuntimeError: scope `inputs` sees no input of a trained matrix; or reference passes are not free of noise;
                names the module.
        """
        if not self.schedule.is_due(step):
            return

        start = time.perf_counter()
        if self.host.main:
            logger.info(f"OGPSA refresh at step {step}.")
        turn = step // self.settings.update_interval
        indices = [take_in_turn(len(ref.samples), self.settings.refresh_samples, turn) for ref in self.sets]
        self.subspace = None
        with (
            preserve_random_state(self.engine.processes.device),
            without_noise(self.host.model),
            # torch.compile would compile again for the shapes and arguments of reference batches, and ignores hooks (of
            # scope `inputs`) that are added after it has compiled.
            torch.compiler.set_stance("force_eager"),
        ):
            self._check_noise()
            size = self.settings.batch_size or batch_size
            with tqdm(desc="OGPSA refresh", unit="batch", leave=False, disable=not self.host.show_progress) as bar:
                passes = ReferencePasses(self.sets, indices, size, self.engine, self._maker.parts, bar.update)
                bar.reset(total=passes.num_batches)
                self.subspace, self.reference_losses = self._maker.compute(passes)
        self.coverage = find_coverage(self.subspace.find_covered(), self.engine)
        self.schedule.refreshed(step, self.coverage.tensors, self.coverage.total)
        if self.host.main:
            row = {
                "step": step,
                "refresh": True,
                "reference_loss": self.reference_losses,
                "rank": self.subspace.rank,
                "covered_tensors": self.coverage.tensors,
                "trainable_tensors": self.coverage.total,
                "covered_elements": self.coverage.elements,
                "seconds": round(time.perf_counter() - start, 4),
            }
            append_row(self.log_path, row)

    def _check_noise(self) -> None:
        """Check, once per run, that a reference pass is free of noise."""
        if self._noise_checked:
            return

        self._noise_checked = True
        for reference in self.sets:

            def loss(reference=reference) -> torch.Tensor:
                return reference.loss(reference.collate(reference.read([0])), 1.0, 1.0)

            check_repeatable(self.host.model, loss, self.engine.processes.totals)

    def project(
        self, max_norm: float | None, measure: bool, optimizer: torch.optim.Optimizer | None = None
    ) -> ProjectionStats | InputStats:
        """Project the accumulated gradient, in place, and clip it to `max_norm`; the figures are kept for the log.

        Args:
            max_norm: the norm to clip to; None: do not clip here.
            measure: whether this step is logged, so that all figures are measured.
            optimizer: the optimizer that takes the step, without wrappers; needed if the step is logged.
        """
        engine, method = self.engine, self.settings.method
        if self.settings.scope == "global" and method != "monitor":
            # A direction over all parameters is removed from all, even from those without gradient in this step.
            engine.fill()
        self._uncovered = measure_uncovered(self.coverage, engine) if measure else None
        projection = self.subspace.projection(method, self._maker.kernel)
        stats = projection(engine.gradients(), max_norm, measure=measure)
        if method != "monitor":
            engine.projected()
        self._non_finite = self._non_finite + (~stats.finite_tensor).long()
        self._stats = stats
        if measure:
            self._read_changes = make_change_reader(engine, optimizer)
            if self._read_changes is None:
                self._step_log.warn_no_update(f"{type(optimizer).__module__}.{type(optimizer).__name__}")
        return stats

    def after_step(self, moved: bool) -> None:
        """Measure the change of the weights, if the step is logged; `moved`: see `Schedule.stepped`."""
        self.schedule.stepped(moved)
        read_changes, self._read_changes, self._update = self._read_changes, None, {}
        if read_changes is not None and moved:
            with torch.no_grad():
                self._update = update_figures(self.subspace, read_changes(), self.names)

    def figures(self, step: int) -> dict[str, float]:
        """Read the figures of the last step, write them to the log, and return them for trackers under `ogpsa/`.

        Before the first step there are none.
        """
        if self._stats is None:
            return {}

        uncovered = [self.engine.names[index] for index in self.coverage.uncovered]
        non_finite = int(self._non_finite)
        row = self._step_log.make_row(step, self._stats, self._uncovered, uncovered, self._update, non_finite)
        self._stats, self._non_finite, self._update = None, 0, {}
        if self.host.main:
            append_row(self.log_path, row)
        return self._step_log.tracked(row, self.reference_losses)

    def _starts_at_zero(self) -> bool:
        """Return whether LoRA's `B`, and so the gradient of `A`, is zero; every process calls it."""
        weights = zip(self.engine.names, self.engine.weights(), strict=True)
        adapters = [weight for name, weight in weights if "lora_B" in name and weight is not None and weight.size > 0]
        zero = sum(not bool(weight.part_of(weight.optimized).any()) for weight in adapters)
        return self.engine.processes.totals([float(zero)])[0] > 0

    def _made_by(self) -> dict[str, Any]:
        return {"ogpsa_dataset": self.names, "ogpsa_loss": self.settings.loss, **self._maker.made_by()}

    def save(self, folder: str, step: int, writes: bool) -> None:
        """Write into a checkpoint's folder what a resumed run needs to go on exactly.

        The basis is left out if the next step makes a new one. What all processes have is written once, by the process
        with `writes`.
        """
        if not self.settings.save_state:
            if writes:
                remove_state(folder)
            return

        state = RunState(
            step=step,
            **{name: getattr(self.schedule, name) for name in _SCHEDULED},
            non_finite_steps=int(self._non_finite),
            idle_steps=self._step_log.idle_steps,
            uncovered_steps=self._step_log.uncovered_steps,
            reference_losses=self.reference_losses,
            made_by=self._made_by(),
            unreached=sorted(self._maker.unreached),
        )
        save_state(folder, state, None if self.schedule.is_due(step) else self.subspace, self.engine, writes)

    def _resume(self, step: int, checkpoint: str) -> None:
        """Restore the state of a checkpoint; without a basis in it, schedule a refresh and log a warning."""
        stored, reason = None, "`ogpsa_save_state` is false"
        if self.settings.save_state:
            maker = self._maker
            with failing_together(self.engine, ValueError):
                stored = load_state(checkpoint, step, self._made_by(), self.engine, maker.sharded, maker.restore)
            reason = f"{checkpoint} holds no basis"

        if stored is not None:
            state, self.subspace = stored
            for name in _SCHEDULED:
                setattr(self.schedule, name, getattr(state, name))
            self._maker.unreached = frozenset(state.unreached)
            self.reference_losses = state.reference_losses
            self._step_log.idle_steps, self._step_log.uncovered_steps = state.idle_steps, state.uncovered_steps
            self._non_finite = state.non_finite_steps
            if self.subspace is not None:
                self.coverage = find_coverage(self.subspace.find_covered(), self.engine)
                if self.host.main:
                    logger.info(f"OGPSA goes on at step {step} with the basis of step {state.refreshed_at}.")
        due = step % self.settings.update_interval == 0 or (stored is not None and self.schedule.is_due(step))
        if self.subspace is None and not due:
            self.schedule.refreshed_at = None
            if self.host.main:
                logger.warning(f"OGPSA recomputes its basis at step {step}, where training resumes: {reason}.")

    def end(self) -> None:
        """Draw the plot and free the basis's memory."""
        self.subspace = None
        if self.settings.plot and self.host.main:
            path = os.path.join(self.host.output_dir, PLOT_NAME)
            try:
                if plot_log(self.log_path, path):
                    print("Figure saved at:", path)
            except Exception as err:  # the weights are saved after this and must not be lost
                logger.warning(f"OGPSA could not draw {path}: {err}")
