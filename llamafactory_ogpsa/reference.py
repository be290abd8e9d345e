"""Reference sets to reference gradients.

A reference gradient is the gradient of the stage's own loss, averaged over the tokens (or pairs) of a reference set,
at the current weights. This module knows batches, weights and gradients; the loss itself comes from the caller.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from .engines import Engine, sum_numbers


# What each retry divides the loss scale by: from fp16's usual 2¹⁶ down to 1 in four.
_SCALE_STEP = 16

# What the attributes that hold the strength of a noise are called.
_NOISE = ("drop", "jitter", "neftune")


@dataclass(frozen=True)
class ReferenceSet:
    """One capability to preserve: a dataset of tokenised samples.

    Attributes:
        name: its name in dataset_info.json.
        samples: the tokenised samples; `samples[i]` is what the collator takes.
    """

    name: str
    samples: Sequence[dict[str, Any]]


class ReferenceLoss(Protocol):
    """The loss of a reference batch, supplied by whoever owns the model."""

    def weigh(self, samples: list[dict[str, Any]]) -> float:
        """Return what samples count for in the average over their set: their tokens or their number."""

    def __call__(self, batch: dict[str, Any], weight: float, total: float) -> torch.Tensor:
        """Return the batch's part of the average: `weight / total` times its own mean loss, differentiable."""


def _say_nothing() -> None:
    pass


def take_in_turn(available: int, count: int | None, turn: int) -> list[int]:
    """Return the indices of the samples of one refresh: `count` of them, going round the set turn by turn."""
    count = available if count is None else min(count, available)
    return [(turn * count + i) % available for i in range(count)]


def split_parts(indices: list[int], parts: int) -> list[list[int]]:
    """Split the samples of a set into `parts` interleaved parts, one reference gradient each."""
    return [indices[part::parts] for part in range(parts)]


def split_batches(indices: list[int], batch_size: int, engine: Engine) -> list[tuple[list[int], int]]:
    """Return this process's share of the samples of a part, in batches, with the number of samples that count.

    The shares differ by one sample at most. Every process gets the same number of batches: where one would have fewer,
    a batch of one sample that does not count makes up for it.
    """
    share = indices[engine.rank :: engine.world_size]
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    largest_share = -(-len(indices) // engine.world_size)
    missing = -(-largest_share // batch_size) - len(batches)
    return [(batch, len(batch)) for batch in batches] + missing * [(indices[:1], 0)]


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random state of Python, NumPy, PyTorch and `device` as it was."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerators = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**(accelerators or {"devices": []})):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def without_noise(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in training mode with every dropout, jitter and NEFTune noise at zero; undone at the end.

    Not evaluation mode: gradient checkpointing works in training mode only, and mixture-of-experts models may route
    evaluation through code that gives no gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for module, _ in modes if (config := getattr(module, "config", None)) is not None}
    saved = []
    for owner in [module for module, _ in modes] + list(configs.values()):
        named_dropout = "drop" in type(owner).__name__.lower()
        for name, value in list(vars(owner).items()):
            noisy = any(word in name for word in _NOISE) or (name == "p" and named_dropout)
            if noisy and isinstance(value, float) and value > 0:
                saved.append((owner, name, value))
    try:
        model.train()
        for owner, name, _ in saved:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
        for module, training in modes:
            module.training = training


def accumulate_reference_gradient(
    batches: Sequence[tuple[list[dict[str, Any]], int]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    loss_of: ReferenceLoss,
    engine: Engine,
    on_batch: Callable[[], None],
) -> tuple[float, float, float]:
    """Leave the gradient of the mean loss over all processes' batches, times the loss scale, in the engine.

    Every batch weighs what it has in tokens or samples, so that neither the batch size nor the number of processes
    matters. A batch whose loss is not finite is left out, and with it those that the other processes have at the same
    time; the passes are then done again. So they are, with a smaller loss scale, where the gradient overflowed.

    Args:
        batches: this process's batches of samples, and how many samples count in each. There are as many in every
            process, because losses and backward passes may communicate; a batch of which 0 count only keeps the others
            company.
        collate: the collator, from samples to a batch; called for one batch at a time.
        loss_of: the loss.
        engine: where gradients are accumulated; cleared first.
        on_batch: called after every batch, the first time.

    Returns:
        the mean loss and the weight (tokens or samples) it was averaged over, batches whose loss is not finite being
        left out of both; and the scale, by which whoever has more than float16 divides the gradient.

    Raises:
        FloatingPointError: no batch has a finite loss, or the gradient is not finite at any loss scale.
        ValueError: the loss reaches no trainable parameter.
    """
    weights = [loss_of.weigh(samples) if count > 0 else 0.0 for samples, count in batches]
    total, *batch_weights = sum_numbers(engine, [sum(weights), *weights])
    kept, scale = list(range(len(batches))), engine.loss_scale
    while True:
        losses = _accumulate(batches, kept, weights, total, collate, loss_of, engine, scale, on_batch)
        on_batch = _say_nothing
        failed = [position for position, loss in zip(kept, losses, strict=True) if not math.isfinite(loss)]
        if failed:
            kept = [position for position in kept if position not in failed]
            if not kept:
                raise FloatingPointError("no batch has a finite loss")
            continue

        present = [gradient for gradient in engine.gradients() if gradient is not None and gradient.numel() > 0]
        reached, overflowed = sum_numbers(engine, [float(len(present)), float(not _all_finite(present))])
        if not reached:
            raise ValueError("the reference loss reaches no trainable parameter")
        if not overflowed:
            used = sum(batch_weights[position] for position in kept)
            return sum(losses) * total / used, used, scale
        if scale <= 1:
            raise FloatingPointError("the gradient is not finite")
        scale = max(1.0, scale / _SCALE_STEP)


def _accumulate(
    batches: Sequence[tuple[list[dict[str, Any]], int]],
    kept: Sequence[int],
    weights: Sequence[float],
    total: float,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    loss_of: ReferenceLoss,
    engine: Engine,
    scale: float,
    on_batch: Callable[[], None],
) -> list[float]:
    """Accumulate the gradient of some batches, times `scale`; return their losses, each summed over the processes."""
    engine.clear()
    losses = []
    for position in kept:
        loss = loss_of(collate(batches[position][0]), weights[position], total)
        losses.append(loss.item())
        engine.backward(loss, scale, last=position == kept[-1])
        on_batch()
    engine.complete()
    return sum_numbers(engine, losses)


def _all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    if not tensors:
        return True
    largest = torch._foreach_norm(tensors, math.inf)  # unlike the 2-norm it does not overflow
    return bool(torch.stack([value.float() for value in largest]).isfinite().all())


def reference_gradients(
    sets: Sequence[ReferenceSet],
    indices: Sequence[list[int]],
    parts: int,
    batch_size: int,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    loss_of: ReferenceLoss,
    engine: Engine,
    rows: Sequence[torch.Tensor],
    on_batch: Callable[[], None] = _say_nothing,
) -> dict[str, float]:
    """Compute the reference gradients of all sets into `rows`; the engine's gradients are cleared after it.

    Args:
        sets: the reference sets.
        indices: the samples of each to use.
        parts: reference gradients for each set, each from its own part of the samples.
        batch_size: samples a batch.
        collate: the collator, from samples to a batch.
        loss_of: the loss.
        engine: where gradients are accumulated.
        rows: one tensor `[len(sets) * parts, size_i]` for each of the engine's gradients; written.
        on_batch: called after every batch.

    Returns:
        the mean loss by the name of the set.

    Raises:
        FloatingPointError: a set gives no finite gradient; names the set.
    """
    losses = {}
    for position, (reference, chosen) in enumerate(zip(sets, indices, strict=True)):
        part_losses, part_weights = [], []
        for part, part_indices in enumerate(split_parts(chosen, parts)):
            batches = [
                ([reference.samples[i] for i in batch_indices], count)
                for batch_indices, count in split_batches(part_indices, batch_size, engine)
            ]
            try:
                with engine.reference_pass():
                    loss, weight, scale = accumulate_reference_gradient(batches, collate, loss_of, engine, on_batch)
            except FloatingPointError as err:
                raise FloatingPointError(f"the reference set {reference.name} gives no reference gradient: {err}")

            part_losses.append(loss)
            part_weights.append(weight)
            for row, gradient in zip(rows, engine.gradients(), strict=True):
                if gradient is None:
                    row[position * parts + part].zero_()
                else:
                    row[position * parts + part].view(gradient.shape).copy_(gradient)
                    if scale != 1:
                        row[position * parts + part].div_(scale)
        # Scaled to what each part contributes, the rows of a set add up to the gradient of its mean loss.
        shares = [weight / sum(part_weights) for weight in part_weights]
        for row in rows if parts > 1 else ():
            scales = torch.tensor(shares, dtype=torch.float64, device=row.device)[:, None]
            row[position * parts : (position + 1) * parts].mul_(scales)
        losses[reference.name] = sum(share * loss for share, loss in zip(shares, part_losses, strict=True))
    engine.clear()
    return losses
