"""Which weights a run protects: those in tensors that have a direction in the subspace."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engines import Engine
from ..kernels.rows import squared_norm


# What a parameter is called in warnings, by the first of these that its name matches.
_KINDS = (
    (r"lora_A", "lora_A"),
    (r"lora_B", "lora_B"),
    (r"lora_magnitude", "DoRA magnitudes"),
    (r"lora_embedding", "LoRA of embeddings"),
    (r"visual|vision|image", "vision tower"),
    (r"audio", "audio tower"),
    (r"expert", "experts"),
    (r"embed|wte|wpe", "embeddings"),
    (r"lm_head|score|v_head", "output head"),
    (r"norm|ln_", "norms"),
    (r"bias$", "biases"),
)


@dataclass(frozen=True)
class Coverage:
    """The tensors that have a direction, out of those that are trained.

    Attributes:
        tensors: how many have one.
        total: how many there are.
        elements: the share of the trainable elements in tensors that have one, from 0 to 1.
        uncovered: the indices of those that have none.
    """

    tensors: int
    total: int
    elements: float
    uncovered: tuple[int, ...]


def find_coverage(covered: Sequence[bool], engine: Engine) -> Coverage:
    """Count what a basis covers, given for each tensor whether it has a direction; every process calls it."""
    sizes = [size if has else 0 for size, has in zip(engine.sizes, covered, strict=True)]
    inside, everything = engine.processes.totals([float(sum(sizes)), float(sum(engine.sizes))])
    uncovered = tuple(index for index, has in enumerate(covered) if not has)
    return Coverage(sum(covered), len(covered), inside / everything, uncovered)


def measure_uncovered(coverage: Coverage, engine: Engine) -> torch.Tensor | None:
    """Measure the share of the squared gradient that lies in tensors without a direction; every process calls it.

    Returns:
        the share before the projection, float64, 0-dim; None if every tensor has a direction.
    """
    if not coverage.uncovered:
        return None

    outside = set(coverage.uncovered)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for index, gradient in enumerate(engine.gradients()):
        if gradient is not None and gradient.numel() > 0:
            sums[0 if index in outside else 1] += squared_norm(gradient)
    sums = engine.processes.sum_pieces(sums)
    return torch.where(sums.sum() > 0, sums[0] / sums.sum(), 0.0)


def name_kinds(names: Sequence[str]) -> str:
    """Describe parameters by their kind, with how many there are of each: `21 lora_A, 2 norms`."""
    kinds = (next((kind for pattern, kind in _KINDS if re.search(pattern, name)), "other weights") for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
