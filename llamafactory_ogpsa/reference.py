"""From reference sets to reference gradients.

A reference gradient is the gradient of the mean loss over the tokens (or pairs) of a reference set, at the current
weights.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .engines import Engine


# Each retry divides the loss scale by this: four retries go from fp16's usual 2¹⁶ down to 1.
_SCALE_STEP = 16


class ReferenceLoss(Protocol):
    """The loss of a reference batch."""

    def weigh(self, samples: list[dict[str, Any]]) -> float:
        """Return the weight of samples in the average over their set: the number of tokens, or of samples."""

    def __call__(self, batch: dict[str, Any], weight: float, total: float) -> torch.Tensor:
        """Return the batch's part of the average: `weight / total` times its own mean loss, differentiable."""


@dataclass(frozen=True)
class ReferenceSet:
    """One capability to preserve: a dataset of tokenised samples, and the loss that measures it.

    Attributes:
        name: its name in dataset_info.json.
        samples: the tokenised samples; `samples[i]` is what the collator takes.
        collate: the collator, from samples to a batch; called for one batch at a time.
        loss: the reference loss of such a batch.
    """

    name: str
    samples: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    loss: ReferenceLoss

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return copies of samples, because a collator may change them."""
        return [copy.deepcopy(self.samples[index]) for index in indices]


def take_in_turn(available: int, count: int | None, turn: int) -> list[int]:
    """Return the indices of the samples of one refresh, `count` (None: all) in each turn, going round the set."""
    count = available if count is None else min(count, available)
    return [(turn * count + i) % available for i in range(count)]


def split_parts(indices: list[int], parts: int) -> list[list[int]]:
    """Split the samples of a set into `parts` interleaved parts, one reference gradient each."""
    return [indices[part::parts] for part in range(parts)]


def split_batches(indices: list[int], batch_size: int, engine: Engine) -> list[tuple[list[int], int]]:
    """Return this process's share of a part's samples, in batches, each with the number of its samples that count.

    The shares differ by one sample at most. Every process gets the same number of batches: a process that would have
    fewer gets a batch of one sample that does not count.
    """
    share = indices[engine.processes.rank :: engine.processes.size]
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    largest_share = -(-len(indices) // engine.processes.size)
    missing = -(-largest_share // batch_size) - len(batches)
    return [(batch, len(batch)) for batch in batches] + missing * [(indices[:1], 0)]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class ReferencePasses:
    """The passes over the reference sets that one refresh makes.

    Attributes:
        sets: the reference sets.
        indices: for each set, the indices of the samples to use.
        batch_size: samples per batch.
        engine: where gradients are accumulated.
        parts: reference gradients for each set, each from its own part of the samples.
        on_batch: called after every batch, but not again when its pass is repeated.
    """

    sets: Sequence[ReferenceSet]
    indices: Sequence[list[int]]
    batch_size: int
    engine: Engine
    parts: int = 1
    on_batch: Callable[[], None] = _nothing

    @property
    def num_batches(self) -> int:
        """The batches of this process."""
        return sum(
            len(split_batches(part, self.batch_size, self.engine))
            for chosen in self.indices
            for part in split_parts(chosen, self.parts)
        )

    def run_forward(self, begin_batch: Callable[[dict[str, Any], int], None], end_batch: Callable[[bool], None]):
        """Run the forward passes of all sets, without gradients.

        Args:
            begin_batch: called before each with the batch and the number of its samples that count.
            end_batch: called after each with whether its loss is finite.

        Returns:
            the mean loss by the name of the set, over the batches whose loss is finite.

        Raises:
            FloatingPointError: no batch of a set has a finite loss; names the set.
        """
        losses = {}
        for reference, chosen in zip(self.sets, self.indices, strict=True):
            numbers = [0.0, 0.0]
            for indices, count in split_batches(chosen, self.batch_size, self.engine):
                samples = reference.read(indices)
                weight = reference.loss.weigh(samples)
                batch = reference.collate(samples)
                begin_batch(batch, count)
                with torch.no_grad():
                    loss = reference.loss(batch, 1.0, 1.0).item()
                finite = math.isfinite(loss)
                end_batch(finite)
                self.on_batch()
                if count > 0 and finite:
                    numbers = [numbers[0] + weight * loss, numbers[1] + weight]
            total, weights = self.engine.processes.totals(numbers)
            if not weights:
                raise FloatingPointError(f"the reference set {reference.name} has no batch with a finite loss")
            losses[reference.name] = total / weights
        return losses

    def gradients_into(self, rows: Sequence[torch.Tensor]) -> dict[str, float]:
        """Compute the reference gradients of all sets; the engine's gradients are cleared afterwards.

        Args:
            rows: one tensor `[len(sets) * parts, size_i]` for each of the engine's gradients; written.

        Returns:
            the mean loss by the name of the set.

        Raises:
            FloatingPointError: a set gives no finite gradient; names the set.
            ValueError: a loss reaches no trainable parameter.
        """
        losses = {}
        for position, (reference, chosen) in enumerate(zip(self.sets, self.indices, strict=True)):
            own = [row[position * self.parts : (position + 1) * self.parts] for row in rows]
            losses[reference.name] = self._gradients_of(reference, chosen, own)
        self.engine.clear()
        return losses

    def _gradients_of(self, reference: ReferenceSet, chosen: list[int], rows: Sequence[torch.Tensor]) -> float:
        """Compute the reference gradients of one set, one per row; return its mean loss."""
        losses, weights = [], []
        for part, indices in enumerate(split_parts(chosen, self.parts)):
            batches = split_batches(indices, self.batch_size, self.engine)
            try:
                with self.engine.reference_pass():
                    loss, weight, scale = accumulate_gradient(reference, batches, self.engine, self.on_batch)
            except FloatingPointError as err:
                raise FloatingPointError(f"the reference set {reference.name} gives no reference gradient: {err}")

            losses.append(loss)
            weights.append(weight)
            for row, gradient in zip(rows, self.engine.gradients(), strict=True):
                if gradient is None:
                    row[part].zero_()
                else:
                    row[part].view(gradient.shape).copy_(gradient)
                    if scale != 1:
                        row[part].div_(scale)

        # Scaled by the share of its part, the rows of a set add up to the gradient of its mean loss.
        shares = [weight / sum(weights) for weight in weights]
        for row in rows if self.parts > 1 else ():
            row.mul_(torch.tensor(shares, dtype=torch.float64, device=row.device)[:, None])
        return sum(share * loss for share, loss in zip(shares, losses, strict=True))


def accumulate_gradient(
    reference: ReferenceSet,
    batches: Sequence[tuple[list[int], int]],
    engine: Engine,
    on_batch: Callable[[], None] = _nothing,
) -> tuple[float, float, float]:
    """Accumulate the gradient of the mean loss over all processes' batches, times the loss scale, in the engine.

    Every batch is weighted by its tokens or samples, so that neither the batch size nor the number of processes
    matters. If the loss of a batch is not finite, the passes are repeated without it and without the other processes'
    batches at the same position. If the gradient overflowed, they are repeated with a smaller loss scale.

    Args:
        reference: the set.
        batches: this process's batches: the samples' indices, and how many of them count. Every process has the same
            number of them, because losses and backward passes may communicate.
        engine: where gradients are accumulated; cleared first.
        on_batch: as in `ReferencePasses`.

    Returns:
        the mean loss; the weight (tokens or samples) that it and the gradient were averaged over; the loss scale, by
        which the caller divides the gradient in a dtype with more than float16's range.

    Raises:
        FloatingPointError: no batch has a finite loss, or the gradient is not finite at any loss scale.
        ValueError: the loss reaches no trainable parameter.
    """
    weights = [reference.loss.weigh(reference.read(indices)) if count > 0 else 0.0 for indices, count in batches]
    batch_weights = engine.processes.totals(weights)
    kept, scale = list(range(len(batches))), engine.loss_scale
    while True:
        total, losses = sum(batch_weights[position] for position in kept), []
        engine.clear()
        for position in kept:
            loss = reference.loss(reference.collate(reference.read(batches[position][0])), weights[position], total)
            losses.append(loss.item())
            engine.backward(loss, scale, last=position == kept[-1])
            on_batch()
        engine.complete()
        losses, on_batch = engine.processes.totals(losses), _nothing
        failed = [position for position, loss in zip(kept, losses, strict=True) if not math.isfinite(loss)]
        if failed:
            kept = [position for position in kept if position not in failed]
            if not kept:
                raise FloatingPointError("no batch has a finite loss")
            continue

        present = [gradient for gradient in engine.gradients() if gradient is not None and gradient.numel() > 0]
        reached, overflowed = engine.processes.totals([float(len(present)), float(not _all_finite(present))])
        if not reached:
            raise ValueError("the reference loss reaches no trainable parameter")
        if not overflowed:
            return sum(losses), total, scale
        if scale <= 1:
            raise FloatingPointError("the gradient is not finite")
        scale = max(1.0, scale / _SCALE_STEP)


def _all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    if not tensors:
        return True
    largest = torch._foreach_norm(tensors, math.inf)  # unlike the 2-norm it does not overflow
    return bool(torch.stack([value.float() for value in largest]).isfinite().all())
