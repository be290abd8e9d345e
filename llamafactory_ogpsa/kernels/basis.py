"""Where the basis lies and in which pieces the kernels meet it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """A run of consecutive elements of one parameter tensor, with its basis.

    Attributes:
        tensor: index of the parameter tensor.
        group: the group whose coefficients the piece adds to.
        start: first element, counted in the flattened parameter tensor.
        basis: tensor ``[rank, length]``, float32 or bfloat16, rows contiguous, on the device that computes.
    """

    tensor: int
    group: int
    start: int
    basis: torch.Tensor

    @property
    def length(self) -> int:
        return self.basis.shape[1]


class ResidentBasis:
    """A basis on the device that computes: one piece a tensor, all of them at hand.

    Pieces come in the order of their groups, so that each group's partial sums lie together; empty tensors have none.

    Args:
        basis: tensors ``[rank, numel_i]``, one per parameter tensor.
        groups: the group of each tensor.
    """

    def __init__(self, basis: Sequence[torch.Tensor], groups: Sequence[int]) -> None:
        self.device = basis[0].device
        self.pieces = [Piece(i, groups[i], 0, basis[i]) for i in by_group(groups) if basis[i].shape[1] > 0]
        self.buckets = [range(len(self.pieces))]

    def load(self) -> Iterator[range]:
        """Yield each bucket, a range of ``pieces``, while its basis may be read."""
        yield from self.buckets


def by_group(groups: Sequence[int]) -> list[int]:
    """Return the tensor indices ordered by group, and within a group as they were."""
    return sorted(range(len(groups)), key=groups.__getitem__)
