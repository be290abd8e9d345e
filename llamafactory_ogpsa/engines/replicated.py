"""Gradients that every process holds whole: one process, or several under DistributedDataParallel."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class ReplicatedEngine:
    """The trainable parameters of a model and their accumulated gradients, `param.grad`, equal in all processes.

    The projection needs no communication here: every process computes the same numbers from the same gradients.

    Attributes:
        names: the names of the trainable parameters; tied parameters appear once.
        parameters: the parameters, in the same order.
        rank: the number of this process.
        world_size: the number of processes that the samples are split over.
    """

    def __init__(self, model: torch.nn.Module, wrapped: torch.nn.Module | None = None) -> None:
        """Look up the trainable parameters of a model.

        Args:
            model: the bare model.
            wrapped: what the trainer calls for a forward pass; DistributedDataParallel makes the engine distributed.

        Raises:
            ValueError: the model has no trainable parameter.
        """
        trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        if not trainable:
            raise ValueError("the model has no trainable parameter")
        self.names = [name for name, _ in trainable]
        self.parameters = [param for _, param in trainable]
        wrapped = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's wrapper
        self._ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        self.rank = dist.get_rank() if self._ddp is not None else 0
        self.world_size = dist.get_world_size() if self._ddp is not None else 1

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.parameters[0].device

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the accumulated gradients, None where a parameter has none; writing to them changes the step."""
        return [param.grad for param in self.parameters]

    def clear(self) -> None:
        """Drop all gradients, as `zero_grad(set_to_none=True)` does."""
        for param in self.parameters:
            param.grad = None

    def reference_pass(self) -> AbstractContextManager:
        """Return the context of reference passes: gradients stay in the process until `sum_gradients`.

        Without reduction in the backward pass, processes may have different numbers of batches, or none.
        """
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def sum_gradients(self) -> None:
        """Sum the gradients over the processes, in place; a parameter without one counts as zero."""
        if self.world_size == 1:
            return

        for param in self.parameters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        for work in [dist.all_reduce(param.grad, async_op=True) for param in self.parameters]:
            work.wait()

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of a few numbers over the processes."""
        if self.world_size == 1:
            return list(numbers)

        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()
