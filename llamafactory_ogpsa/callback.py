"""When: the refresh schedule, what is logged, and what a run says about itself.

The callback owns the run's subspace. It refreshes the basis on a step's begin, before the first micro-batch, and is
called once an optimizer step with the accumulated gradient.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from .engines import make_engine, sum_numbers
from .interface import Subspace
from .options import Settings
from .projection import ProjectionStats
from .reference import (
    ReferenceLoss,
    ReferenceSet,
    preserve_random_state,
    reference_gradients,
    split_batches,
    split_parts,
    take_in_turn,
    without_noise,
)
from .report import LOG_NAME, PLOT_NAME, append_row, begin_log, plot_log
from .settings import agree, choose_basis_device
from .state import RunState, fail_together, load_state, remove_state, save_state
from .subspace import Geometry, assign_groups, orthonormalise_


if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


# LLaMA-Factory's own logger shows everything below its name, in the terminal and in the web UI.
logger = logging.getLogger("llamafactory.ogpsa")

# What `removed` may be, and at how many logged steps in a row it may be more, before a run is warned.
_MOST_REMOVED = 0.99
_MOST_REMOVED_STEPS = 5


class OgpsaCallback(TrainerCallback):
    """Keeps the subspace of a run up to date and projects its gradients.

    Attributes:
        subspace: the current basis; None before the first refresh and when training has ended.
        resume_from: the checkpoint that training resumes from, to be set before it begins.
    """

    def __init__(
        self,
        trainer: "Trainer",
        settings: Settings,
        sets: Sequence[ReferenceSet],
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        loss_of: ReferenceLoss,
    ) -> None:
        """Prepare the callback of one run.

        Args:
            trainer: the trainer it is added to.
            settings: the options.
            sets: the tokenised reference sets.
            collate: the collator of reference samples.
            loss_of: the reference loss.
        """
        self.trainer = trainer
        self.settings = settings
        self.sets = sets
        self.collate = collate
        self.loss_of = loss_of
        self.parts = math.ceil((settings.rank or len(sets)) / len(sets))
        self.resume_from: str | None = None
        self.subspace: Subspace | None = None
        self.refreshed_at: int | None = None
        self.repeat_at: int | None = None
        self.reference_losses: dict[str, float] = {}
        self.stats: ProjectionStats | None = None
        self.non_finite_steps: torch.Tensor | None = None
        self.idle_steps = 0

    @property
    def log_path(self) -> str:
        """Where the figures of the run are written."""
        return os.path.join(self.trainer.args.output_dir, LOG_NAME)

    def on_train_begin(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs):
        """Look up the trainable parameters, say what is on, take up what a checkpoint holds, and start the log."""
        settings = self.settings
        self.subspace, self.refreshed_at, self.repeat_at, self.non_finite_steps = None, None, None, None
        self.idle_steps = 0
        accelerator = self.trainer.accelerator
        self.engine = make_engine(
            self.trainer.model, self.trainer.model_wrapped, accelerator.device, accelerator.scaler
        )
        half = all(dtype == torch.bfloat16 for dtype in self.engine.dtypes)
        auto = torch.bfloat16 if half else torch.float32
        self.basis_dtype = auto if settings.basis_dtype == "auto" else getattr(torch, settings.basis_dtype)
        self.groups, self.num_groups = assign_groups(len(self.engine.names), settings.scope)
        num_rows = len(self.sets) * self.parts
        num_bytes = num_rows * sum(self.engine.sizes) * self.basis_dtype.itemsize
        basis_device = choose_basis_device(settings.basis_device, self.engine.device, num_bytes)
        self.basis_device, self.kernel = agree(self.engine, basis_device, settings.kernel)

        if state.is_world_process_zero:
            self._introduce(args, state.max_steps, num_bytes)
        if self.resume_from is not None:
            self._resume(state.global_step, state.is_world_process_zero)
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            begin_log(self.log_path, state.global_step, self.resume_from)

    def _introduce(self, args: "TrainingArguments", max_steps: int, num_bytes: int) -> None:
        """Say in one line what is on and what it will cost, and what nobody will have meant."""
        settings = self.settings
        refreshes = math.ceil(max_steps / settings.update_interval)
        counts = [len(take_in_turn(len(ref.samples), settings.refresh_samples, 0)) for ref in self.sets]
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        whose = " in each process" if args.world_size > 1 else ""
        sets = ", ".join(f"{ref.name} ({count} samples)" for ref, count in zip(self.sets, counts, strict=True))
        logger.info(
            f"OGPSA is on: reference sets {sets}; refreshed every K = {settings.update_interval} steps; "
            f"rank {settings.rank or len(self.sets)}; scope {settings.scope}; method {settings.method}; "
            f"{self.engine.num_parameters:,} trainable parameters in {len(self.engine.names)} tensors; "
            f"basis {num_bytes / 2**20:,.1f} MiB on {self.basis_device}{whose}; "
            f"expected cost {refreshes * sum(counts) / (max_steps * batch):.2f} reference samples per training sample."
        )
        if refreshes == 1 and max_steps > 1:
            logger.warning(
                f"OGPSA refreshes its basis once: the run has {max_steps} steps, `ogpsa_update_interval` is "
                f"{settings.update_interval}. A smaller one follows the model as it changes."
            )

    def on_step_begin(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs):
        """Refresh the basis every K optimizer steps, starting before the first.

        Once more after the first step where some parameter had no reference gradient before it: LoRA's `B` starts at
        zero, and with it the gradient of every `A`.
        """
        step = state.global_step
        # With an epoch's remainder carried over, the Trainer begins a step twice, the second time with gradients.
        if self.subspace is not None and step == self.refreshed_at:
            return

        if self.subspace is None or self._is_due(step):
            self.refresh(state)

    def _is_due(self, step: int) -> bool:
        """Tell whether a step begins with a refresh, whatever basis there is."""
        return step % self.settings.update_interval == 0 or step == self.repeat_at

    def refresh(self, state: "TrainerState") -> None:
        """Compute the reference gradients at the current weights and make a new basis of them.

        Leaves random state, dropout, gradients, optimizer, scheduler and data order as they were.

        Raises:
            FloatingPointError: a reference set gives no finite gradient; names the set.
        """
        start = time.perf_counter()
        settings = self.settings
        if state.is_world_process_zero:
            logger.info(f"OGPSA refresh at step {state.global_step}.")
        turn = state.global_step // settings.update_interval
        indices = [take_in_turn(len(ref.samples), settings.refresh_samples, turn) for ref in self.sets]
        num_rows = len(self.sets) * self.parts
        # Not `per_device_train_batch_size`: `auto_find_batch_size` may have lowered it.
        batch_size = settings.batch_size or self.trainer._train_batch_size
        num_batches = sum(
            len(split_batches(part, batch_size, self.engine))
            for chosen in indices
            for part in split_parts(chosen, self.parts)
        )

        self.subspace = None  # its memory is what the new rows take
        if self._pinned and self.engine.device.type == "cuda":
            # PyTorch withholds pinned memory until an event that it queues as the memory is dropped; without waiting
            # for that one the rows would be pinned a second time.
            torch.cuda.synchronize(self.engine.device)
        rows = self._allocate(num_rows)
        quiet = self.trainer.args.disable_tqdm or not state.is_local_process_zero
        with (
            tqdm(total=num_batches, desc="OGPSA refresh", unit="batch", leave=False, disable=quiet) as progress,
            preserve_random_state(self.trainer.accelerator.device),
            without_noise(self.trainer.model),
        ):
            self.reference_losses = reference_gradients(
                self.sets,
                indices,
                self.parts,
                batch_size,
                self.collate,
                self.loss_of,
                self.engine,
                rows,
                on_batch=progress.update,
            )
            if self.refreshed_at is None and self._has_untouched(rows):
                self.repeat_at = state.global_step + 1
            with torch.no_grad():
                basis, geometry = orthonormalise_(
                    rows,
                    self.groups,
                    self.num_groups,
                    settings.rank,
                    self.engine.device,
                    self.parts,
                    self.engine.shards,
                )
        del rows
        self.refreshed_at = state.global_step
        self._use(basis, geometry)
        if state.is_world_process_zero:
            row = {
                "step": state.global_step,
                "refresh": True,
                "reference_loss": self.reference_losses,
                "rank": self.subspace.rank,
                "seconds": round(time.perf_counter() - start, 4),
            }
            append_row(self.log_path, row)

    @property
    def _pinned(self) -> bool:
        """Whether the basis is in host memory that an accelerator copies from."""
        return self.basis_device.type == "cpu" and self.engine.device.type != "cpu"

    def _allocate(self, num_rows: int) -> list[torch.Tensor]:
        """Allocate the memory of a basis, `[num_rows, size_i]` a parameter."""
        return [
            torch.empty(num_rows, size, dtype=self.basis_dtype, device=self.basis_device, pin_memory=self._pinned)
            for size in self.engine.sizes
        ]

    def _use(self, basis: list[torch.Tensor], geometry: Geometry) -> None:
        """Project by this basis from now on."""
        self.subspace = Subspace(
            self.engine.names, basis, geometry, self.groups, self.engine.device, self.engine.shards
        )
        self.subspace.plan(self.kernel).warmup(self.engine.dtypes)

    @property
    def _made_by(self) -> dict[str, Any]:
        """The options that a basis depends on for what it is, and not only for how good it is."""
        return {
            "ogpsa_dataset": [reference.name for reference in self.sets],
            "ogpsa_rank": self.settings.rank or len(self.sets),
            "ogpsa_scope": self.settings.scope,
            "ogpsa_loss": self.settings.loss,
            "ogpsa_basis_dtype": str(self.basis_dtype).removeprefix("torch."),
        }

    def save(self, folder: str) -> None:
        """Write what a resumed run needs to go on exactly into a checkpoint; every process calls it.

        The basis is left out where the next step makes a new one anyway.
        """
        writes, step = self.trainer.args.should_save, self.trainer.state.global_step
        if not self.settings.save_state:
            if writes:
                remove_state(folder)
            return

        state = RunState(
            step=step,
            refreshed_at=self.refreshed_at,
            repeat_at=self.repeat_at,
            non_finite_steps=0 if self.non_finite_steps is None else int(self.non_finite_steps.item()),
            reference_losses=self.reference_losses,
            made_by=self._made_by,
            idle_steps=self.idle_steps,
        )
        save_state(folder, state, None if self._is_due(step) else self.subspace, self.engine, writes)

    def _resume(self, step: int, log: bool) -> None:
        """Go on with what the checkpoint holds; with a new basis, and word of it, where it holds none."""
        stored, reason = None, "`ogpsa_save_state` is false"
        if self.settings.save_state:
            error = None
            try:
                stored = load_state(self.resume_from, step, self._made_by, self.engine, self._allocate)
            except ValueError as err:
                error = err
            fail_together(self.engine, error)
            reason = f"{self.resume_from} holds no basis"

        if stored is not None:
            state, basis, geometry = stored
            self.refreshed_at, self.repeat_at = state.refreshed_at, state.repeat_at
            self.reference_losses, self.idle_steps = state.reference_losses, state.idle_steps
            self.non_finite_steps = torch.tensor(state.non_finite_steps, device=self.engine.device)
            if basis is not None:
                self._use(basis, geometry)
                if log:
                    logger.info(f"OGPSA goes on at step {step} with the basis of step {state.refreshed_at}.")
        if log and self.subspace is None and not self._is_due(step):
            logger.warning(f"OGPSA recomputes its basis at step {step}, where training resumes: {reason}.")

    def _has_untouched(self, rows: list[torch.Tensor]) -> bool:
        """Tell whether some parameter has no reference gradient at all, in any process."""
        touched = torch.stack([row.any() for row in rows]).tolist()
        return not all(sum_numbers(self.engine, [float(any_row) for any_row in touched]))

    def will_log(self, state: "TrainerState") -> bool:
        """Tell whether the Trainer logs after the step that is being taken: only then is the residual measured."""
        args, step = self.trainer.args, state.global_step + 1
        if step == state.max_steps or (args.logging_first_step and step == 1):
            return True
        if args.logging_strategy == "steps":
            return step % max(1, int(state.logging_steps)) == 0
        return args.logging_strategy == "epoch" and self.trainer.accelerator.gradient_state.end_of_dataloader

    def project(self, max_norm: float | None) -> ProjectionStats:
        """Project the accumulated gradient, in place, and clip it to `max_norm`; the figures are kept for the log."""
        if self.settings.scope == "global" and self.settings.method != "monitor":
            # A direction over all parameters is removed as a whole, also from those that this step does not reach.
            self.engine.fill()
        projection = self.subspace.projection(self.settings.method, self.kernel)
        stats = projection(self.engine.gradients(), max_norm, measure=self.will_log(self.trainer.state))
        if self.settings.method != "monitor":
            self.engine.projected()
        failed = (~stats.finite_tensor).long()
        self.non_finite_steps = failed if self.non_finite_steps is None else self.non_finite_steps + failed
        self.stats = stats
        return stats

    def figures(self) -> dict[str, float]:
        """Read the figures of the last step, write them to the log, and return them for the trackers.

        Returns:
            `removed`, `residual` and the reference losses, each under `ogpsa/`; nothing before the first step.
        """
        if self.stats is None:
            return {}

        state, stats = self.trainer.state, self.stats
        row: dict[str, Any] = {"step": state.global_step}
        row |= dict.fromkeys(("removed", "residual", "cosine", "projected_cosine"))
        if stats.finite:
            names = [reference.name for reference in self.sets]
            row |= {"removed": stats.removed, "residual": stats.residual}
            row["cosine"] = dict(zip(names, stats.cosines, strict=True))
            row["projected_cosine"] = dict(zip(names, stats.projected_cosines, strict=True))
            self._watch(stats.removed)
        non_finite = int(self.non_finite_steps.item())
        if non_finite:
            row["non_finite_steps"] = non_finite
            self._warn(f"OGPSA did not project {non_finite} gradient(s): they held inf or NaN.")
        self.stats, self.non_finite_steps = None, None
        if state.is_world_process_zero:
            append_row(self.log_path, row)

        figures = {f"ogpsa/{key}": row[key] for key in ("removed", "residual") if row[key] is not None}
        return figures | {f"ogpsa/reference_loss/{name}": loss for name, loss in self.reference_losses.items()}

    def _warn(self, message: str) -> None:
        """Warn of what all processes see, once."""
        if self.trainer.state.is_world_process_zero:
            logger.warning(message)

    def _watch(self, removed: float) -> None:
        """Warn, once, of a run of whose gradients hardly anything is left."""
        if self.settings.method == "monitor" or self.idle_steps == _MOST_REMOVED_STEPS:
            return

        self.idle_steps = self.idle_steps + 1 if removed > _MOST_REMOVED else 0
        if self.idle_steps == _MOST_REMOVED_STEPS:
            self._warn(
                f"OGPSA has removed more than {_MOST_REMOVED:.0%} of the gradient at {_MOST_REMOVED_STEPS} logged "
                "steps in a row: the run hardly learns. Are the `ogpsa_dataset` sets the training data? A lower "
                "`ogpsa_rank` or `ogpsa_method: conflict` leaves more."
            )

    def on_train_end(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs):
        """Draw the plot and give the basis's memory back."""
        self.subspace = None
        if self.settings.plot and state.is_world_process_zero:
            path = os.path.join(args.output_dir, PLOT_NAME)
            try:
                if plot_log(self.log_path, path):
                    print("Figure saved at:", path)
            except Exception as err:  # the weights are saved after this: no picture is worth them
                logger.warning(f"OGPSA could not draw {path}: {err}")
