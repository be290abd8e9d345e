"""The interface between a run and the way in which its model is trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from .processes import Processes


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a DTensor; any other tensor is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Weight(NamedTuple):
    """The elements of a parameter that go with its (piece of a) gradient, as the optimizer updates them.

    Attributes:
        optimized: the tensor that the optimizer steps, the key of its state: the parameter, or DeepSpeed's flat
            float32 partition of many parameters.
        start: the first element, in the flattened local part of `optimized`.
        size: the number of elements.
        group: the index of the optimizer's parameter group that steps it; None if the group lists `optimized` itself.
    """

    optimized: torch.Tensor
    start: int
    size: int
    group: int | None = None

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return these elements, `[size]`, of `optimized` or of a tensor of its shape in the optimizer's state."""
        return local_part(tensor).detach().reshape(-1).narrow(0, self.start, self.size)


class Engine(ABC):
    """Where each trainable parameter's accumulated gradient is, and how reference gradients are computed into it.

    A gradient is complete when `gradients` is called: accumulated, reduced over the processes, not yet clipped. If
    processes hold a piece of each gradient, everything here is about this process's piece.

    Attributes:
        names: the names of the trainable parameters; tied parameters appear once.
        parameters: the parameters.
        sizes: the number of elements of each gradient (of its local piece), which may be 0.
        offsets: the first element of each piece in the flattened parameter.
        dtypes: the dtype of each gradient.
        num_parameters: the number of trainable parameters of the model.
        device: where the gradients are.
        processes: the processes that the samples, and perhaps the gradients, are split over.
    """

    sizes: list[int]
    offsets: list[int]
    dtypes: list[torch.dtype]
    device: torch.device
    processes: Processes

    def __init__(self, model: torch.nn.Module) -> None:
        """Look up the trainable parameters of a bare model, but for empty ones.

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
        self.names = [name for name, _ in trainable]
        self.parameters = [param for _, param in trainable]
        self.num_parameters = sum(getattr(param, "ds_numel", param.numel()) for param in self.parameters)

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """What losses are multiplied by now, so that float16 gradients do not vanish; 1 if they are not multiplied."""

    @abstractmethod
    def gradients(self) -> list[torch.Tensor | None]:
        """Return the gradients, None for a parameter without one; writing to them changes the step."""

    @abstractmethod
    def clear(self) -> None:
        """Drop all gradients, and all other state of the backward passes since the last step."""

    def reference_pass(self) -> AbstractContextManager:
        """Return the context of the backward passes of a reference gradient."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor, scale: float, last: bool) -> None:
        """Add the gradient of `scale` times the sum of the processes' losses; every process calls it equally often.

        Args:
            loss: this process's part of the loss, a scalar.
            scale: the loss scale to use.
            last: this is the last call before `complete`.
        """

    def complete(self) -> None:
        """Make the gradients complete after the last `backward`."""

    @abstractmethod
    def fill(self) -> None:
        """Give parameters without a gradient a gradient of zeros, to which a projection can be written."""

    def projected(self) -> None:
        """Update what was derived from the gradients before they were changed in place."""

    @abstractmethod
    def edit(self, indices: Sequence[int], change: Callable[[int, torch.Tensor], None]) -> None:
        """Change parameters in place, and the optimizer's copies of them; every process calls it.

        Args:
            indices: of the parameters.
            change: given an index and whole rows of the parameter, changes them in place.
        """

    @abstractmethod
    def weights(self) -> list[Weight | None]:
        """Return where the weights of each gradient are; None if this process has none of them."""


class ParameterGradients(Engine):
    """What the engines have in common whose gradients are in `param.grad`."""

    def __init__(self, model: torch.nn.Module, scaler: torch.amp.GradScaler | None) -> None:
        super().__init__(model)
        self.sizes = [local_part(param).numel() for param in self.parameters]
        self.dtypes = [param.dtype for param in self.parameters]
        self._scaler = scaler

    @property
    def device(self) -> torch.device:
        return local_part(self.parameters[0]).device

    @property
    def loss_scale(self) -> float:
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def gradients(self) -> list[torch.Tensor | None]:
        return [None if param.grad is None else local_part(param.grad) for param in self.parameters]

    def clear(self) -> None:
        for param in self.parameters:
            param.grad = None

    def fill(self) -> None:
        for param in self.parameters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)

    def edit(self, indices: Sequence[int], change: Callable[[int, torch.Tensor], None]) -> None:
        for index in indices:
            change(index, local_part(self.parameters[index]).data)

    def weights(self) -> list[Weight | None]:
        return [Weight(param, 0, size) for param, size in zip(self.parameters, self.sizes, strict=True)]
