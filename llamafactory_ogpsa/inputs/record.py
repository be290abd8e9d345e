"""The inputs that reference samples bring to each weight matrix, from forward passes only."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..engines import Engine


# Rows kept of each matrix's inputs, over all sets and processes; more if a sample would give too few tokens.
ROWS = 4096
# With 5 or 7 tokens per sample, a real model lost what it keeps with 12 (docs/real-model-experiments.md).
FEWEST_TOKENS = 16


def tokens_per_sample(samples: int) -> int:
    """Return the most tokens to keep of each reference sample; `samples`: those of all sets, over all processes."""
    return max(FEWEST_TOKENS, ROWS // max(1, samples))


def find_modules(engine: Engine, model: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
    """Return the modules of the bare model that use a trained matrix, each with the index of its weight.

    Call it before the first forward pass: while FSDP2 has a module gathered, its weight is another tensor.
    """
    indices = {id(param): index for index, param in enumerate(engine.parameters)}
    return [
        (module, indices[id(module.weight)])
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or is_transposed(module) or is_router(module)
        if id(module.weight) in indices
    ]


def is_transposed(module: torch.nn.Module) -> bool:
    """Return whether a module keeps its matrix as `[in, out]`."""
    return type(module).__name__ == "Conv1D"


def is_router(module: torch.nn.Module) -> bool:
    """Return whether a module is a router of transformers, which multiplies by a matrix `[experts, in]` of its own."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("Router") and isinstance(weight, torch.nn.Parameter)
    return named and len(getattr(weight, "ds_shape", weight.shape)) == 2  # ZeRO-3 leaves a split one no shape


class Recorder:
    """Keeps inputs of the modules whose weights are trained, at all tokens of the reference samples.

    Not only at the answers: what the model makes of a prompt must be kept too. With the inputs of answers alone, a
    real model refused three times as many ordinary instructions (docs/inputs.md, "What was compared").

    Attributes:
        tokens: the tokens that reached each embedding, bool `[tokens]`, by the index of its weight.
    """

    def __init__(self, modules: Sequence[tuple[torch.nn.Module, int]], samples: int) -> None:
        """Prepare to record; `modules`: see `find_modules`; `samples`: see `tokens_per_sample`."""
        self._modules = modules
        self._per_sample = tokens_per_sample(samples)
        self._rows: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._seen: list[tuple[weakref.ref, list[int], torch.Tensor]] = []
        self.tokens: dict[int, torch.Tensor] = {}

    def begin_batch(self, batch: dict[str, Any], count: int) -> None:
        """Say what the next forward pass is given; call it before each.

        Args:
            batch: the batch, with an `attention_mask` and perhaps `labels`.
            count: the samples that count; with 0, nothing is kept.
        """
        present, labels = batch.get("attention_mask"), batch.get("labels")
        self._ids, self._count, self._active = batch.get("input_ids"), count, count > 0
        if present is not None and present.dim() == 4:
            # Neat packing's mask `[sequences, 1, length, length]`: 0 if a token sees another; padding not even itself.
            present = present[:, 0].diagonal(dim1=-2, dim2=-1) == 0
        self._present = present.bool() if present is not None and present.dim() == 2 else None
        self._mask = None if self._present is None else _thin(self._present, labels, self._per_sample)

    @contextmanager
    def recording(self, model: torch.nn.Module) -> Iterator[None]:
        """While the context is open, keep what reaches the modules in forward passes of the batch through the model."""
        hooks = [model.register_forward_pre_hook(self._look_at_batch, with_kwargs=True)]
        hooks += [
            module.register_forward_hook(
                partial(self._keep_tokens if isinstance(module, torch.nn.Embedding) else self._keep_inputs, index)
            )
            for module, index in self._modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look_at_batch(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell passes of the batch itself from others: KTO's loss also runs prompts with answers of other prompts."""
        ids = kwargs.get("input_ids")
        if ids is not None and self._ids is not None:
            own = ids.shape == self._ids.shape and torch.equal(ids, self._ids.to(ids.device))
            self._active = self._count > 0 and own

    def _keep_tokens(self, index: int, module: torch.nn.Embedding, args: tuple, output: torch.Tensor) -> None:
        ids = args[0]
        if not self._active:
            return
        if self._present is not None and self._present.shape == ids.shape:
            ids = ids[self._present]
        unseen = torch.zeros(module.num_embeddings, dtype=torch.bool, device=ids.device)
        self.tokens.setdefault(index, unseen)[ids.reshape(-1)] = True

    def _keep_inputs(self, index: int, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not self._active:
            return
        # Several matrices have the same inputs (query, key and value): kept once.
        same = next((indices for given, indices, _ in self._seen if given() is args[0]), None)
        if same is None:
            rows = self._select(args[0].detach()).to("cpu")
            rows = rows[rows.isfinite().all(1)]
            half = rows.bfloat16()
            if torch.equal(half.to(rows.dtype), rows):
                rows = half  # what PEFT has cast from bfloat16: half of the memory
            same = self._find_cast(rows)
            if same is None:
                self._seen.append((weakref.ref(args[0]), [index], rows))
                return
        if index not in same:
            same.append(index)

    def _find_cast(self, rows: torch.Tensor) -> list[int] | None:
        """Return the weights whose inputs are these rows too: for an adapter in another dtype, PEFT casts them anew."""
        for _, indices, seen in reversed(self._seen):
            if (seen.shape, seen.dtype) == (rows.shape, rows.dtype):
                return indices if len(rows) > 0 and torch.equal(seen, rows) else None
        return None

    def end_batch(self, finite: bool) -> None:
        """Keep the rows of the forward pass that has ended, unless its loss was not finite."""
        for _, indices, rows in self._seen if finite else ():
            self._rows.setdefault(tuple(indices), []).append(rows)
        self._seen = []

    def _select(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the rows of a module's inputs to keep, `[n, in]`."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self._mask is not None and rows.shape[0] == self._mask.numel():
            return rows[self._mask.reshape(-1).to(rows.device)]
        # The rows are not the batch's tokens, but patches of an image, or tokens routed to an expert.
        step = -(-rows.shape[0] // (self._per_sample * self._count))
        return rows[:: max(1, step)]

    @property
    def shared(self) -> list[tuple[int, ...]]:
        """The indices of weights that had the same inputs in this process, once for each such input."""
        return list(self._rows)

    def rows(self, indices: tuple[int, ...], width: int) -> torch.Tensor:
        """Return the inputs that these weights, and no others, shared in this process: `[n, width]`, on the CPU."""
        return torch.cat(self._rows.get(indices, [torch.empty(0, width)]))


def _thin(present: torch.Tensor, labels: torch.Tensor | None, most: int) -> torch.Tensor:
    """Choose at most `most` tokens of each sequence, evenly spread.

    The first token whose output is labelled is always among them: it predicts the first token of an answer.

    Args:
        present: bool `[sequences, length]`, False at padding.
        labels: `[sequences, length]`, -100 at tokens without one; or None.
        most: the most tokens of a sequence.
    """
    chosen = torch.zeros_like(present)
    for row, (sequence, kept) in enumerate(zip(present, chosen, strict=True)):
        positions = sequence.nonzero().flatten()
        if len(positions) > most:
            positions = positions[torch.arange(most, device=positions.device) * len(positions) // most]
            if labels is not None and labels.shape == present.shape:
                labelled = (labels[row, 1:] != -100).nonzero().flatten()
                positions[-1:] = labelled[:1] if len(labelled) else positions[-1:]
        kept[positions] = True
    return chosen
