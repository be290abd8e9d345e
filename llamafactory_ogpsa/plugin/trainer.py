"""OGPSA in the gradient path of LLaMA-Factory's trainers, and their losses as reference losses."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..callback import OgpsaCallback, Settings


def with_ogpsa(trainer_class: type, stage: str, finetuning_args: Any, loaded: dict[str, Any]) -> type:
    """Put OGPSA into a trainer class.

    The gradient is projected at the end of the micro-batch that completes it: after accumulation, before clipping,
    and for every `max_grad_norm` (0 makes the Trainer skip clipping, or not, depending on transformers).

    Args:
        trainer_class: the stage's stock class.
        stage: the training stage.
        finetuning_args: the run's.
        loaded: what the workflow has loaded by the time it makes the trainer: `sets`, `template`, `tokenizer`,
            `processor`.

    Returns:
        a subclass of the same name.
    """

    class OgpsaTrainer(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loss_of = (
                SftLoss(self) if finetuning_args.ogpsa_loss == "sft" and stage != "sft" else StageLoss(self, stage)
            )
            collate = self.data_collator if isinstance(loss_of, StageLoss) else sft_collator(self, loaded)
            self.ogpsa = OgpsaCallback(self, settings_of(finetuning_args, self.args), loaded["sets"], collate, loss_of)
            self.add_callback(self.ogpsa)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                if finetuning_args.ogpsa_method == "monitor":
                    self.ogpsa.project(None)
                else:
                    project_and_clip(self)
            return loss

        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                logs.update(self.ogpsa.figures())
            return super().log(logs, *args, **kwargs)

    OgpsaTrainer.__name__ = trainer_class.__name__
    OgpsaTrainer.__qualname__ = trainer_class.__qualname__
    return OgpsaTrainer


def project_and_clip(trainer: Any) -> None:
    """Project and clip the accumulated gradient in one pass, in the place of the accelerator's own clipping.

    The accelerator's `clip_grad_norm_` then only hands the Trainer the norm of the projected gradient.
    """
    trainer.accelerator.unscale_gradients()
    max_norm = trainer.args.max_grad_norm
    stats = trainer.ogpsa.project(max_norm if max_norm is not None and max_norm > 0 else None)
    trainer.accelerator.clip_grad_norm_ = lambda *args, **kwargs: stats.norm_tensor


def settings_of(finetuning_args: Any, training_args: Any) -> Settings:
    """Collect the options of a run, with the defaults that other options give."""
    return Settings(
        refresh_samples=finetuning_args.ogpsa_refresh_samples,
        update_interval=finetuning_args.ogpsa_update_interval,
        rank=finetuning_args.ogpsa_rank,
        scope=finetuning_args.ogpsa_scope,
        method=finetuning_args.ogpsa_method,
        batch_size=finetuning_args.ogpsa_batch_size or training_args.per_device_train_batch_size,
        basis_device=finetuning_args.ogpsa_basis_device,
        basis_dtype=finetuning_args.ogpsa_basis_dtype,
        kernel=finetuning_args.ogpsa_kernel,
        plot=finetuning_args.plot_loss,
    )


def sft_collator(trainer: Any, loaded: dict[str, Any]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Make the collator of plain records for a stage whose own one takes pairs (`ogpsa_loss: sft`)."""
    from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq

    return MultiModalDataCollatorForSeq2Seq(
        template=loaded["template"],
        model=trainer.model,
        tokenizer=loaded["tokenizer"],
        processor=loaded["processor"],
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
    )


def count_tokens(batch: dict[str, Any]) -> float:
    """Return how many tokens of a batch the causal language-modelling loss sees (labels are shifted by one)."""
    return float(batch["labels"][..., 1:].ne(-100).sum())


class SftLoss:
    """The plain causal language-modelling loss, averaged over tokens, for a trainer whose own loss is another."""

    def __init__(self, trainer: Any) -> None:
        """Bind the loss to a trainer."""
        self.trainer = trainer

    def weigh(self, batch: dict[str, Any], num_samples: int) -> float:
        """Return the number of tokens that the loss sees."""
        return count_tokens(batch)

    def __call__(self, batch: dict[str, Any], weight: float, total: float) -> torch.Tensor:
        """Return the batch's part of the mean over `total` tokens."""
        inputs = self.trainer._prepare_inputs(batch)
        with self.trainer.compute_loss_context_manager():
            return self.trainer.model_wrapped(**inputs, use_cache=False).loss * (weight / total)


class StageLoss:
    """The loss that the trainer itself minimises."""

    def __init__(self, trainer: Any, stage: str) -> None:
        """Bind the loss to a trainer.

        Args:
            trainer: the stage's trainer.
            stage: `pt` and `sft` average over tokens, the others over samples.
        """
        self.trainer = trainer
        self.by_tokens = stage in ("pt", "sft")
        # Only then does `compute_loss` divide by `num_items_in_batch` itself; else it returns the batch's mean.
        custom = trainer.compute_loss_func is not None and not trainer.finetuning_args.use_asft_loss
        plain = trainer.model_accepts_loss_kwargs and trainer.label_smoother is None
        self.normalises = self.by_tokens and (custom or (plain and trainer.compute_loss_func is None))

    def weigh(self, batch: dict[str, Any], num_samples: int) -> float:
        """Return the number of tokens that the loss sees, or of samples."""
        return count_tokens(batch) if self.by_tokens else float(num_samples)

    def __call__(self, batch: dict[str, Any], weight: float, total: float) -> torch.Tensor:
        """Return the batch's part of the mean over `total` tokens or samples; the trainer's metrics stay as they are."""
        trainer = self.trainer
        inputs = trainer._prepare_inputs(batch)
        with preserve_metrics(trainer), trainer.compute_loss_context_manager():
            if self.normalises:
                items = torch.tensor(total, device=trainer.args.device)
                loss = trainer.compute_loss(trainer.model_wrapped, inputs, num_items_in_batch=items)
                # The Trainer multiplies by this where DistributedDataParallel will average; here gradients are summed.
                return loss / (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1)
            return trainer.compute_loss(trainer.model_wrapped, inputs) * (weight / total)


@contextmanager
def preserve_metrics(trainer: Any) -> Iterator[None]:
    """Keep what a preference trainer remembers of its batches (rewards to log, BCO's running mean) as it was."""
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
