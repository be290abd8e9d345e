"""Where gradients are: one engine for each way of training."""

import torch
from torch.distributed.tensor import DTensor

from .engine import Engine, Weight
from .fsdp import FullyShardedEngine
from .processes import Processes
from .replicated import ReplicatedEngine


__all__ = ["Engine", "Processes", "Weight", "make_engine"]


def make_engine(
    model: torch.nn.Module, wrapped: torch.nn.Module, device: torch.device, scaler: torch.amp.GradScaler | None = None
) -> Engine:
    """Make the engine of a run.

    Args:
        model: the bare model, prepared for training.
        wrapped: what the trainer calls for a forward pass.
        device: this process's device.
        scaler: the run's gradient scaler.

    Returns:
        the engine that fits how the model was prepared.

    Raises:
        ValueError: the model has no trainable parameter, or is prepared in a way that OGPSA does not support.
        RuntimeError: a version of DeepSpeed that OGPSA does not know.
    """
    if type(wrapped).__name__ == "DeepSpeedEngine":
        from .deepspeed import make_zero_engine

        return make_zero_engine(model, wrapped)
    if any(isinstance(param, DTensor) for param in model.parameters()):
        return FullyShardedEngine(model, device, scaler)
    return ReplicatedEngine(model, wrapped, scaler)
