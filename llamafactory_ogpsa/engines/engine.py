"""What the rest of the project knows of the way in which a model is trained."""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist

from .shards import Shards


class Engine(Protocol):
    """Where each trainable parameter's accumulated gradient is, and how reference gradients are computed into it.

    A gradient is complete when `gradients` is called: accumulated, reduced over the processes, not yet clipped. Where
    processes hold a piece of each gradient, everything here is about this process's piece.

    Attributes:
        names: the names of the trainable parameters; tied parameters appear once.
        sizes: the number of elements of each gradient (of its local piece), which may be 0.
        dtypes: the dtype of each gradient.
        num_parameters: the number of trainable parameters of the model.
        device: where the gradients are.
        shards: the processes that every gradient is split over; None where each process has it whole.
        rank: the number of this process.
        world_size: the number of processes that the samples are split over.
    """

    names: list[str]
    sizes: list[int]
    dtypes: list[torch.dtype]
    num_parameters: int
    device: torch.device
    shards: Shards | None
    rank: int
    world_size: int

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by at present so that float16 gradients do not vanish; 1 where they are not."""

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the gradients, None where a parameter has none; writing to them changes the step."""

    def clear(self) -> None:
        """Drop all gradients, and with them whatever else is kept of the backward passes since the last step."""

    def reference_pass(self) -> AbstractContextManager:
        """Return the context of the backward passes of a reference gradient."""

    def backward(self, loss: torch.Tensor, scale: float, last: bool) -> None:
        """Add the gradient of `scale` times the sum of the processes' losses; every process calls it as often.

        Args:
            loss: this process's part of the loss, a scalar.
            scale: the loss scale to use.
            last: this is the last call before `complete`.
        """

    def complete(self) -> None:
        """Make the gradients complete after the last `backward`."""

    def fill(self) -> None:
        """Give parameters that the loss did not reach a gradient of zeros, to which a projection can be written."""

    def projected(self) -> None:
        """Take note that the gradients were changed in place."""


def sum_numbers(engine: Engine, numbers: list[float]) -> list[float]:
    """Return the sums of a few numbers over all processes."""
    if engine.world_size == 1:
        return list(numbers)

    device = engine.shards.device if engine.shards is not None else engine.device
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the trainable parameters, but for empty ones, with their names.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    trainable = [
        (name, param)
        for name, param in model.named_parameters()
        if param.requires_grad and getattr(param, "ds_numel", param.numel()) > 0
    ]
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    return trainable
