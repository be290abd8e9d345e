"""The processes of a run, and how they communicate."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """The processes that a run's samples, and perhaps its gradients, are split over.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
        device: where they communicate (the accelerator for NCCL), wherever the gradients are.
        shard_group: those that every gradient is split over; None if each process has it whole.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    shard_group: dist.ProcessGroup | None = None

    @property
    def sharded(self) -> bool:
        """True if every process holds a piece of each gradient."""
        return self.shard_group is not None

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of a few numbers over all processes."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, the same bits in each."""
        return tensor if self.size == 1 else self._communicate(dist.all_reduce, tensor)

    def union(self, items: Iterable[Hashable]) -> list:
        """Return the sortable items that any process has, each once, in the same order in every process."""
        everywhere: list[list] = [list(items)] * self.size
        if self.size > 1:
            dist.all_gather_object(everywhere, list(items))
        return sorted({item for own in everywhere for item in own})

    def sum_pieces(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum a small tensor over the pieces of the gradients: one collective, the same bits in each process."""
        return self._communicate(dist.all_reduce, numbers, group=self.shard_group) if self.sharded else numbers

    def agree(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the first process's version of a small tensor in all processes.

        Eigenvectors are at best unique up to their sign, so processes on different machines may choose differently,
        and replicas that project by different numbers drift apart.
        """
        return numbers if self.size == 1 else self._communicate(dist.broadcast, numbers, src=0)

    def _communicate(self, collective: Callable, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return what a collective makes of a tensor, which itself stays as it is."""
        result = tensor.to(self.device, copy=True)
        collective(result, **options)
        return result.to(tensor.device)


ALONE = Processes()
