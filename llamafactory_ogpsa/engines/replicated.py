"""Gradients that every process holds whole: one process, or several under DistributedDataParallel."""

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .engine import ParameterGradients
from .processes import Processes


class ReplicatedEngine(ParameterGradients):
    """The engine of `param.grad`, equal in all processes, so that the projection needs no communication."""

    def __init__(
        self,
        model: torch.nn.Module,
        wrapped: torch.nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Look up the trainable parameters; the engine is distributed if `wrapped` is a DistributedDataParallel.

        Raises:
            ValueError: the model has no trainable parameter, or has them on several devices.
        """
        super().__init__(model, scaler)
        device = self.device
        for name, param in zip(self.names, self.parameters, strict=True):
            if param.device != device:
                raise ValueError(
                    f"OGPSA cannot train a model that is split over devices: {self.names[0]} is on {device}, "
                    f"{name} on {param.device}; allowed: all trainable parameters on one device in each process."
                )
        self.offsets = [0] * len(self.sizes)
        wrapped = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's wrapper
        self._ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        rank, size = (0, 1) if self._ddp is None else (dist.get_rank(), dist.get_world_size())
        self.processes = Processes(rank, size, device)

    def reference_pass(self) -> AbstractContextManager:
        # Reduced once, in `complete`, not in every backward pass.
        return super().reference_pass() if self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: torch.Tensor, scale: float, last: bool) -> None:
        (loss * scale).backward()

    def complete(self) -> None:
        if self.processes.size == 1:
            return

        self.fill()
        for work in [dist.all_reduce(param.grad, async_op=True) for param in self.parameters]:
            work.wait()
