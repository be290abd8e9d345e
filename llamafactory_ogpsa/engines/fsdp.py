"""Gradients that PyTorch's `fully_shard` (FSDP2) has split into DTensors: each process holds one shard."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .engine import ParameterGradients
from .processes import Processes


class FullyShardedEngine(ParameterGradients):
    """The engine of DTensor gradients, sharded over one dimension of the device mesh (with HSDP, others replicate).

    Every backward pass reduces and scatters. FSDP divides by the number of processes; `backward` compensates for it.
    """

    def __init__(
        self, model: torch.nn.Module, device: torch.device, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Look up the trainable parameters of a model after `fully_shard`; `device` is where processes communicate.

        Raises:
            ValueError: the model has no trainable parameter, or one that is not split as the others are.
        """
        super().__init__(model, scaler)
        groups = [_shard_group(param) for param in self.parameters]
        # Not the groups themselves: `fully_shard` may make a new one for every module, of the same processes.
        processes = [None if own is None else dist.get_process_group_ranks(own) for own in groups]
        for name, own in zip(self.names, processes, strict=True):
            if own is None or own != processes[0]:
                raise ValueError(
                    f"OGPSA cannot train {name} under FSDP: it is not sharded over one mesh dimension as the other "
                    "trainable parameters are; allowed: `fully_shard` (FSDP2) on every trainable parameter."
                )
        self.offsets = [_offset(param) for param in self.parameters]
        self._model = model
        self.processes = Processes(dist.get_rank(), dist.get_world_size(), device, groups[0])

    def backward(self, loss: torch.Tensor, scale: float, last: bool) -> None:
        (loss * (scale * self.processes.size)).backward()

    def edit(self, indices: Sequence[int], change: Callable[[int, torch.Tensor], None]) -> None:
        # A module that is still gathered would use the old weights in its next forward pass.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        super().edit(indices, change)


def _shard_group(param: torch.nn.Parameter) -> dist.ProcessGroup | None:
    """Return the processes that a parameter is split over; None unless its first dimension, and no other, is split."""
    if not isinstance(param, DTensor):
        return None
    sharded = [dim for dim, placement in enumerate(param.placements) if placement.is_shard()]
    if any(not param.placements[dim].is_shard(0) for dim in sharded):
        return None
    return param.device_mesh.get_group(sharded[0]) if len(sharded) == 1 else None


def _offset(param: DTensor) -> int:
    """Return the first element of this process's shard in the flattened parameter, which `torch.chunk` cuts."""
    dim = next(dim for dim, placement in enumerate(param.placements) if placement.is_shard())
    rows = -(-param.shape[0] // param.device_mesh.size(dim))
    return min(param.device_mesh.get_local_rank(dim) * rows, param.shape[0]) * (param.numel() // param.shape[0])
