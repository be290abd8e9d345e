"""Gradients that DeepSpeed's ZeRO has partitioned, in its optimizer's buffers, with and without CPU offload.

The buffers have no public interface that is local and in place (`safe_get_full_grad` gathers a tensor at a time), so
the engines read private attributes of the ZeRO optimizers, and check at the start that they exist.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.version import Version

from ..kernels.rows import squared_norm
from .engine import Engine, Weight
from .processes import Processes


# In older versions, ZeRO-2 with offload silently drops all but the last of several backward passes.
OLDEST_VERSION = "0.19.0"

# What DeepSpeed's engine must have.
_EXPECTED_OF_ENGINE = ("_is_gradient_accumulation_boundary", "set_gradient_accumulation_boundary")


class Place(NamedTuple):
    """Where this process's piece of a gradient is.

    Attributes:
        group: the parameter group (ZeRO-3: the sub-group).
        index: the position of the parameter among those of the group that have a piece here.
        start: the first element of the piece in the group's flat gradient.
        size: its number of elements.
        offset: its first element in the flattened parameter.
    """

    group: int
    index: int
    start: int
    size: int
    offset: int


def find_problems() -> list[str]:
    """Return why OGPSA cannot train with the DeepSpeed and accelerate that are installed; empty if it can."""
    import deepspeed
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    problems = []
    if Version(deepspeed.__version__) < Version(OLDEST_VERSION):
        problems.append(f"it is older than {OLDEST_VERSION}")
    if "sync_gradients" not in inspect.signature(DeepSpeedEngineWrapper.backward).parameters:
        problems.append("accelerate does not tell it when a step is complete")
    return problems


class ZeroEngine(Engine):
    """What the engines of the ZeRO stages have in common.

    DeepSpeed averages gradients over the processes; `backward` compensates for it. It clips inside its step, after the
    projection: the norm that it clips by and logs is the projected gradient's.

    Attributes:
        expected: what the ZeRO optimizer must have, separated by spaces.
        expected_offloading: what it must have with CPU offload too.
    """

    expected: str
    expected_offloading: str

    def __init__(self, model: torch.nn.Module, engine: Any) -> None:
        """Look up the trainable parameters of the bare model, and their partitions in the DeepSpeedEngine around it.

        Raises:
            ValueError: the model has no trainable parameter.
            RuntimeError: this version of DeepSpeed does not look as expected, or does not optimize a parameter.
        """
        self._engine = engine
        self._zero = engine.optimizer
        # Whether the complete gradients are in host memory; ZeRO-3 has the second name.
        self._offload = any(getattr(self._zero, name, False) for name in ("cpu_offload", "offload_optimizer"))
        self._check()
        super().__init__(model)
        self._compute_device = torch.device(engine.device)
        self.device = torch.device("cpu") if self._offload else self._compute_device
        group = self._zero.dp_process_group
        self.processes = Processes(dist.get_rank(group), dist.get_world_size(group), self._compute_device, group)
        self._places = self._find_places()
        self.sizes = [0 if place is None else place.size for place in self._places]
        self.offsets = [0 if place is None else place.offset for place in self._places]

    @property
    def dtypes(self) -> list[torch.dtype]:
        kept = self._buffers()[0].dtype if self._offload else self._zero.gradient_accumulation_dtype
        return [kept] * len(self.parameters)

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        engine, boundary = self._engine, self._engine._is_gradient_accumulation_boundary
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(boundary)

    def backward(self, loss: torch.Tensor, scale: float, last: bool) -> None:
        # At the boundary DeepSpeed copies to the host only the gradients of that backward pass: with offload,
        # `complete` makes it copy those of all passes.
        self._engine.set_gradient_accumulation_boundary(last and not self._finalizes)
        # DeepSpeed multiplies by its own loss scale, and by 1 / gradient_accumulation_steps unless told not to.
        self._engine.backward(loss * (scale * self.processes.size / self.loss_scale), scale_wrt_gas=False)

    def complete(self) -> None:
        if self._finalizes:
            self._zero.finalize_gradient_accumulation_boundary()
        self._wait()

    @property
    def _finalizes(self) -> bool:
        """Whether gradients are reduced in every backward pass and offloaded at the end."""
        return self._offload and getattr(self._zero, "partition_gradients", True)

    def _wait(self) -> None:
        """Wait until copies of offloaded gradients to host memory have arrived."""
        if self._offload and self._compute_device.type != "cpu":
            torch.accelerator.synchronize()

    @abstractmethod
    def _find_places(self) -> list[Place | None]:
        """Return where the piece of each parameter is; None if this process has none."""

    def _check(self) -> None:
        """Check that DeepSpeed has what the engine uses; raise a RuntimeError that lists what is missing."""
        import deepspeed

        kind = type(self._zero).__name__
        expected = [*self.expected.split(), *(self.expected_offloading.split() if self._offload else ())]
        problems = [f"{kind} has no {name}" for name in expected if not hasattr(self._zero, name)]
        problems += [f"its engine has no {name}" for name in _EXPECTED_OF_ENGINE if not hasattr(self._engine, name)]
        problems += find_problems()
        if problems:
            raise RuntimeError(
                f"OGPSA does not know DeepSpeed {deepspeed.__version__} ({'; '.join(problems)}). Use versions that "
                "docs/distributed.md names; stock stages are not affected."
            )

    def _require(self, optimized: Container[int]) -> None:
        """Raise a RuntimeError unless DeepSpeed's optimizer has every trainable parameter, by its id."""
        for name, param in zip(self.names, self.parameters, strict=True):
            if id(param) not in optimized:
                raise RuntimeError(f"OGPSA finds no partition of {name} in DeepSpeed's optimizer.")

    def _buffers(self) -> list[torch.Tensor]:
        """Return the flat gradients in host memory of an offloading optimizer, one a group."""
        return [partition.grad.view(-1) for partition in self._partitions()]

    @abstractmethod
    def _partitions(self) -> list[torch.Tensor]:
        """Return the flat float32 weights that the optimizer steps, one per group, laid out as `Place` says."""

    @abstractmethod
    def _pieces(self) -> dict[int, list[torch.Tensor]]:
        """Return the gradients on the device, by group, in the order of `Place.index`; no group without gradients."""

    def gradients(self) -> list[torch.Tensor | None]:
        if self._offload:
            # The buffers also hold gradients of earlier steps; DeepSpeed has norms only for those of this step.
            norms = self._zero.norm_for_param_grads
            return [piece if key in norms else None for key, piece in self._offloaded()]

        pieces = self._pieces()
        return [
            None if at is None or at.group not in pieces else pieces[at.group][at.index].view(-1).narrow(0, 0, at.size)
            for at in self._places
        ]

    def _offloaded(self) -> Iterator[tuple[int, torch.Tensor | None]]:
        """Yield DeepSpeed's key of each parameter and this process's piece of its gradient in host memory.

        The piece may be of an earlier step; it is None if this process has none.
        """
        self._wait()
        buffers = self._buffers()
        for param, at in zip(self.parameters, self._places, strict=True):
            piece = None if at is None else buffers[at.group].narrow(0, at.start, at.size)
            yield self._zero.get_param_id(param), piece

    def edit(self, indices: Sequence[int], change: Callable[[int, torch.Tensor], None]) -> None:
        weights = self.weights()
        with self._gathered([self.parameters[index] for index in indices]):
            for index in indices:
                whole, weight = self.parameters[index].data, weights[index]
                change(index, whole)
                if weight is not None and weight.size > 0:
                    part = whole.reshape(-1).narrow(0, self.offsets[index], weight.size)
                    weight.part_of(weight.optimized).copy_(part)

    def _gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager:
        """Return a context in which these parameters are whole; changes made in it are kept."""
        return nullcontext()

    def weights(self) -> list[Weight | None]:
        partitions = self._partitions()
        return [
            None
            if at is None
            else Weight(partitions[at.group], at.start, at.size, self._parameter_groups().get(at.group, at.group))
            for at in self._places
        ]

    def _parameter_groups(self) -> dict[int, int]:
        """Return the optimizer's parameter group of each group, if they are not the same."""
        return {}

    def fill(self) -> None:
        # On the device the partitions hold a gradient for every parameter.
        if self._offload:
            norms = self._zero.norm_for_param_grads
            for key, piece in self._offloaded():
                if key not in norms and piece is not None:
                    piece.zero_()
                    norms[key] = torch.zeros((), dtype=torch.float64)

    def projected(self) -> None:
        # With offload the norms were taken when the gradients were copied, before the projection.
        if self._offload:
            norms = self._zero.norm_for_param_grads
            for key, piece in self._offloaded():
                if key in norms and piece is not None:
                    norms[key] = squared_norm(piece).sqrt()
