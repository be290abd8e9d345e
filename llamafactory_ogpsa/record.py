"""The inputs that reference samples bring to each weight matrix, from forward passes alone."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .engines import Engine


# Rows kept of each matrix's inputs, over all sets and processes; more samples give fewer rows each.
MOST_ROWS = 4096


class Recorder:
    """Keeps inputs of the modules whose weights are trained, at all tokens of the reference samples.

    Not at the answers alone: what a prompt is turned into is part of what is to be kept. A real model that kept the
    inputs of answers alone refused three times as many ordinary instructions (docs/inputs.md, "What was compared").

    Attributes:
        tokens: the tokens that reached each embedding, bool `[tokens]`, by the index of its weight.
    """

    def __init__(self, engine: Engine, model: torch.nn.Module, samples: int) -> None:
        """Find the modules.

        Args:
            engine: the run's.
            model: the bare model.
            samples: the reference samples of all sets, over all processes.
        """
        self._indices = {id(param): index for index, param in enumerate(engine.parameters)}
        self._model = model
        self._per_sample = max(1, MOST_ROWS // max(1, samples))
        self._rows: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._mask: torch.Tensor | None = None
        self._present: torch.Tensor | None = None
        self._seen: list[tuple[weakref.ref, list[int], torch.Tensor]] = []
        self.tokens: dict[int, torch.Tensor] = {}
        self.transposed: set[int] = set()

    def begin_batch(self, batch: dict[str, Any], count: int) -> None:
        """Say what the next forward pass is given.

        Args:
            batch: the batch, with an `attention_mask` and perhaps `labels`.
            count: the samples that count; of none nothing is kept.
        """
        present, labels = batch.get("attention_mask"), batch.get("labels")
        self._present = present.bool() if present is not None and present.dim() == 2 else None
        self._mask = None if self._present is None else _thin(self._present, labels, self._per_sample)
        self._count = count

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While the context is open, keep what reaches the modules."""
        hooks = []
        for module in self._model.modules():
            weight = getattr(module, "weight", None)
            index = self._indices.get(id(weight))
            if index is None:
                continue
            if isinstance(module, torch.nn.Embedding):
                hooks.append(module.register_forward_pre_hook(self._make_token_hook(index, module.num_embeddings)))
            elif isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
                if type(module).__name__ == "Conv1D":
                    self.transposed.add(index)
                hooks.append(module.register_forward_pre_hook(self._make_input_hook(index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _make_token_hook(self, index: int, num_tokens: int):
        def hook(module, args):
            ids = args[0]
            if self._count == 0:
                return
            if self._present is not None and self._present.shape == ids.shape:
                ids = ids[self._present]
            seen = self.tokens.setdefault(index, torch.zeros(num_tokens, dtype=torch.bool, device=ids.device))
            seen[ids.reshape(-1)] = True

        return hook

    def _make_input_hook(self, index: int):
        def hook(module, args):
            if self._count == 0:
                return
            for given, indices, _ in self._seen:
                if given() is args[0]:
                    # Several matrices have the same inputs (query, key and value): kept once.
                    if index not in indices:
                        indices.append(index)
                    return
            self._seen.append((weakref.ref(args[0]), [index], self._select(args[0].detach()).to("cpu")))

        return hook

    def end_batch(self) -> None:
        """Keep the rows of the forward pass that has ended."""
        for _, indices, rows in self._seen:
            self._rows.setdefault(tuple(indices), []).append(rows)
        self._seen = []

    def _select(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the rows of a module's inputs to keep, `[n, in]`."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self._mask is not None and rows.shape[0] == self._mask.numel():
            return rows[self._mask.reshape(-1).to(rows.device)]
        # Not a row for each token of the batch: patches of an image, tokens routed to an expert.
        step = -(-rows.shape[0] // (self._per_sample * self._count))
        return rows[:: max(1, step)]

    def inputs(self) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yield the indices of the weights that share inputs, and those inputs, `[n, in]`, on the CPU; once each."""
        for indices in list(self._rows):
            yield indices, torch.cat(self._rows.pop(indices))


def _thin(present: torch.Tensor, labels: torch.Tensor | None, most: int) -> torch.Tensor:
    """Choose at most so many tokens of each sequence, evenly spread.

    The first token whose output is labelled, from which the first token of an answer comes, is always among them.

    Args:
        present: bool `[sequences, length]`, False at padding.
        labels: `[sequences, length]`, -100 where there is none; or None.
        most: tokens of a sequence.
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
