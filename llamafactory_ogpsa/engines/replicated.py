"""Gradients that every process holds whole: one process, or several under DistributedDataParallel."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .engine import ParameterGradients, Weight
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
        self.sizes = [param.numel() for param in self.parameters]
        self.offsets = [0] * len(self.sizes)
        wrapped = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's wrapper
        self._ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        self.processes = Processes(device=device)
        if self._ddp is not None:
            self.processes = Processes(dist.get_rank(), dist.get_world_size(), device)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def gradients(self) -> list[torch.Tensor | None]:
        return [param.grad for param in self.parameters]

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

    def edit(self, indices: Sequence[int], change: Callable[[int, torch.Tensor], None]) -> None:
        for index in indices:
            change(index, self.parameters[index].data)

    def weights(self) -> list[Weight | None]:
        return [Weight(param, 0, param.numel()) for param in self.parameters]
