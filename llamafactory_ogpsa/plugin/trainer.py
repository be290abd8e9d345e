"""OGPSA in the gradient path of LLaMA-Factory's trainers, and their losses as reference losses."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from ..engines import make_engine
from ..engines.deepspeed import before_step
from ..options import Settings
from ..reference import ReferenceSet
from ..run import Host, OgpsaRun
from .datasets import count_tokens


def with_ogpsa(trainer_class: type, stage: str, finetuning_args: Any, loaded: dict[str, Any]) -> type:
    """Return a subclass of a stage's stock trainer, with the same name, that projects its gradients.

    The gradient is projected at the end of the micro-batch that completes it: after accumulation, before clipping,
    and for every `max_grad_norm` (0 makes the Trainer skip clipping, or not, depending on transformers).

    The workflow fills `loaded` before it makes the trainer: `sets`, `template`, `tokenizer`, `processor`.
    """

    class OgpsaTrainer(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ogpsa = OgpsaRun(Settings.from_arguments(finetuning_args), make_reference_sets(self, stage, loaded))
            self.ogpsa_checkpoint = None
            self.add_callback(OgpsaCallback(self))

        def training_step(self, *args, **kwargs):
            if self.is_deepspeed_enabled:
                # DeepSpeed clips in its step, by the norm of the projected gradient.
                with before_step(self.model_wrapped, lambda: project(self, clip=False)):
                    return super().training_step(*args, **kwargs)

            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                project(self, clip=finetuning_args.ogpsa_method != "monitor")
            return loss

        # `save_only_model` skips this call. `trainer_state.json`, without which no run can resume, is written later.
        def _save_optimizer_and_scheduler(self, output_dir, *args, **kwargs):
            super()._save_optimizer_and_scheduler(output_dir, *args, **kwargs)
            self.ogpsa.save(output_dir, self.state.global_step, self.args.should_save)

        def _load_optimizer_and_scheduler(self, checkpoint, *args, **kwargs):
            super()._load_optimizer_and_scheduler(checkpoint, *args, **kwargs)
            self.ogpsa_checkpoint = checkpoint

        def train(self, *args, **kwargs):
            self.ogpsa_checkpoint = None
            try:
                return super().train(*args, **kwargs)
            finally:
                vars(self.accelerator).pop("clip_grad_norm_", None)

        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                logs.update(self.ogpsa.figures(self.state.global_step))
            return super().log(logs, *args, **kwargs)

    OgpsaTrainer.__name__ = trainer_class.__name__
    OgpsaTrainer.__qualname__ = trainer_class.__qualname__
    return OgpsaTrainer


class OgpsaCallback(TrainerCallback):
    """Passes the Trainer's events on to the run."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.ogpsa.begin(make_host(self._trainer), state.global_step, self._trainer.ogpsa_checkpoint)

    def on_step_begin(self, args, state, control, **kwargs):
        self._trainer.ogpsa.before_step(state.global_step, self._trainer._train_batch_size)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # Before the scheduler's step: these are the learning rates of the step that was taken.
        skipped = self._trainer.accelerator.optimizer_step_was_skipped
        self._trainer.ogpsa.after_step(not skipped and any(group["lr"] > 0 for group in optimizer.param_groups))

    def on_train_end(self, args, state, control, **kwargs):
        self._trainer.ogpsa.end()


def make_host(trainer: Any) -> Host:
    """Make the run's view of a trainer that begins to train."""
    args, state, accelerator = trainer.args, trainer.state, trainer.accelerator
    # Not `per_device_train_batch_size`: `auto_find_batch_size` may have lowered it.
    batch_size = trainer._train_batch_size
    return Host(
        engine=make_engine(trainer.model, trainer.model_wrapped, accelerator.device, accelerator.scaler),
        model=trainer.model,
        output_dir=args.output_dir,
        max_steps=state.max_steps,
        samples_per_step=batch_size * args.gradient_accumulation_steps * args.world_size,
        main=state.is_world_process_zero,
        show_progress=state.is_local_process_zero and not args.disable_tqdm,
    )


def project(trainer: Any, clip: bool) -> None:
    """Project the accumulated gradient; with `clip` also clip it, in the same pass, instead of the accelerator.

    The accelerator's next `clip_grad_norm_` then only returns the norm of the projected gradient.
    """
    max_norm = None
    if clip:
        trainer.accelerator.unscale_gradients()
        if (trainer.args.max_grad_norm or 0) > 0:
            max_norm = trainer.args.max_grad_norm
    stats = trainer.ogpsa.project(max_norm, will_log(trainer), bare_optimizer(trainer.optimizer))
    if clip:
        trainer.accelerator.clip_grad_norm_ = lambda *args, **kwargs: stats.norm_tensor


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def will_log(trainer: Any) -> bool:
    """Return whether the Trainer logs after the step that is being taken."""
    args, state = trainer.args, trainer.state
    step = state.global_step + 1
    if step == state.max_steps or (args.logging_first_step and step == 1):
        return True
    if args.logging_strategy == "steps":
        return step % max(1, int(state.logging_steps)) == 0
    return args.logging_strategy == "epoch" and trainer.accelerator.gradient_state.end_of_dataloader


def make_reference_sets(trainer: Any, stage: str, loaded: dict[str, Any]) -> list[ReferenceSet]:
    """Give each loaded set its collator and loss: the stage's own, or the SFT loss; `loaded` as in `with_ogpsa`."""
    kinds = {"stage": (trainer.data_collator, StageLoss(trainer, stage))}
    if any(item.loss == "sft" for item in loaded["sets"]):
        kinds["sft"] = (sft_collator(trainer, loaded), SftLoss(trainer, "sft"))
    return [ReferenceSet(item.name, item.samples, *kinds[item.loss]) for item in loaded["sets"]]


def sft_collator(trainer: Any, loaded: dict[str, Any]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Make the collator of plain records for a stage whose own collator takes pairs (`ogpsa_loss: sft`)."""
    from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq

    return MultiModalDataCollatorForSeq2Seq(
        template=loaded["template"],
        model=trainer.model,
        tokenizer=loaded["tokenizer"],
        processor=loaded["processor"],
        pad_to_multiple_of=8,
    )


class StageLoss:
    """The loss that the trainer itself minimises."""

    def __init__(self, trainer: Any, stage: str) -> None:
        """Bind the loss to a trainer; in the stages `pt` and `sft` it averages over tokens, else over samples."""
        self.trainer = trainer
        self.by_tokens = stage in ("pt", "sft")

    def weigh(self, samples: list[dict[str, Any]]) -> float:
        """Return the number of tokens that the loss counts, or of samples."""
        if not self.by_tokens:
            return float(len(samples))
        return float(sum(count_tokens(sample, self.trainer.processing_class.pad_token_id) for sample in samples))

    def __call__(self, batch: dict[str, Any], weight: float, total: float) -> torch.Tensor:
        """Return the batch's part of the mean over `total` tokens or samples; the trainer's metrics stay as they are.

        Without `num_items_in_batch`, which belongs to a training step, `compute_loss` returns the mean of the batch.
        """
        trainer = self.trainer
        inputs = trainer._prepare_inputs(batch)
        with preserve_metrics(trainer), trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model_wrapped, inputs) * (weight / total)


class SftLoss(StageLoss):
    """The plain causal language-modelling loss, for a trainer that has another loss of its own (`ogpsa_loss: sft`)."""

    def __call__(self, batch: dict[str, Any], weight: float, total: float) -> torch.Tensor:
        """Return the batch's part of the mean over `total` tokens."""
        inputs = self.trainer._prepare_inputs(batch)
        with self.trainer.compute_loss_context_manager():
            return self.trainer.model_wrapped(**inputs, use_cache=False).loss * (weight / total)


@contextmanager
def preserve_metrics(trainer: Any) -> Iterator[None]:
    """At the end, restore what a preference trainer keeps of its batches (rewards to log, BCO's running mean)."""
    stored = getattr(trainer, "_stored_metrics", None)
    moments = getattr(trainer, "running", None)
    saved = {k: v.clone() if torch.is_tensor(v) else v for k, v in vars(moments).items()} if moments else {}
    if stored is not None:
        trainer._stored_metrics = defaultdict(lambda: defaultdict(list))
    try:
        yield
    finally:
        if stored is not None:
            trainer._stored_metrics = stored
        if moments is not None:
            vars(moments).update(saved)
