"""Gradients that DeepSpeed's ZeRO has partitioned, in its optimizer's buffers, with and without CPU offload.

The buffers have no public interface that is local and in place (`safe_get_full_grad` gathers a tensor at a time), so
the engines read the ZeRO optimizers' own bookkeeping, and check at the start that it is there.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.version import Version

from .engine import Weight, trainable_parameters
from .processes import Processes


# Before it, ZeRO-2 with offload dropped all but the last of several backward passes, without a message.
OLDEST_VERSION = "0.19.0"

# What each ZeRO optimizer must have, by the name of its class.
_EXPECTED = {
    "DeepSpeedZeroOptimizer": (
        "all_grad_tensors",
        "averaged_gradients",
        "bit16_groups",
        "cpu_offload",
        "dp_process_group",
        "finalize_gradient_accumulation_boundary",
        "get_param_id",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "gradient_accumulation_dtype",
        "loss_scale",
        "micro_step_id",
        "params_in_partition",
        "partition_size",
        "real_dp_process_group",
        "reset_cpu_buffers",
        "single_partition_of_fp32_groups",
        "zero_grad",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "_pre_step",
        "averaged_gradients",
        "dp_process_group",
        "finalize_gradient_accumulation_boundary",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "grad_partitions_flat_buffer",
        "grad_position",
        "gradient_accumulation_dtype",
        "loss_scale",
        "offload_optimizer",
        "reset_cpu_buffers",
        "zero_grad",
    ),
}
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
    """Return what keeps OGPSA from training with the DeepSpeed and accelerate that are installed."""
    import deepspeed
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    problems = []
    if Version(deepspeed.__version__) < Version(OLDEST_VERSION):
        problems.append(f"it is older than {OLDEST_VERSION}")
    if "sync_gradients" not in inspect.signature(DeepSpeedEngineWrapper.backward).parameters:
        problems.append("accelerate does not tell it when a step is complete")
    return problems


def _check(engine: Any) -> None:
    """Check that DeepSpeed looks as the engines expect.

    Raises:
        RuntimeError: it does not; says what was looked for.
    """
    import deepspeed

    zero = engine.optimizer
    problems = [
        f"{type(zero).__name__} has no {name}" for name in _EXPECTED[type(zero).__name__] if not hasattr(zero, name)
    ]
    problems += [f"its engine has no {name}" for name in _EXPECTED_OF_ENGINE if not hasattr(engine, name)]
    problems += find_problems()
    if problems:
        raise RuntimeError(
            f"OGPSA does not know DeepSpeed {deepspeed.__version__} ({'; '.join(problems)}). Use versions that the "
            "README names; stock stages are not affected."
        )


class ZeroEngine(ABC):
    """What the engines of the ZeRO stages have in common.

    DeepSpeed averages gradients over the processes, which `backward` makes up for, and clips inside its step, after
    the projection: the norm that it clips by and logs is the projected gradient's.
    """

    def __init__(self, model: torch.nn.Module, engine: Any) -> None:
        """Look up the trainable parameters of a model and their partitions.

        Args:
            model: the bare model.
            engine: the DeepSpeedEngine around it.

        Raises:
            ValueError: the model has no trainable parameter.
            RuntimeError: this version of DeepSpeed does not look as expected, or does not optimize a parameter.
        """
        _check(engine)
        self._engine = engine
        self._zero = engine.optimizer
        trainable = trainable_parameters(model)
        self.names = [name for name, _ in trainable]
        self.parameters = [param for _, param in trainable]
        self.num_parameters = sum(getattr(param, "ds_numel", param.numel()) for param in self.parameters)
        self._compute_device = torch.device(engine.device)
        self._offload = self._offloads()
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
        # At the boundary DeepSpeed copies what that backward pass reached to the host, and nothing else: with offload
        # `complete` has it copy what any has reached.
        self._engine.set_gradient_accumulation_boundary(last and not self._finalizes)
        # DeepSpeed multiplies by its own loss scale, and by 1 / gradient_accumulation_steps unless asked not to.
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
    def _offloads(self) -> bool:
        """Return True where the complete gradients are in host memory."""

    @abstractmethod
    def _find_places(self) -> list[Place | None]:
        """Return where the piece of each parameter is; None where this process has none."""

    @abstractmethod
    def _buffers(self) -> list[torch.Tensor]:
        """Return the flat gradients in host memory of an offloading optimizer, one a group."""

    @abstractmethod
    def _partitions(self) -> list[torch.Tensor]:
        """Return the flat float32 weights that the optimizer steps, one a group, laid out as `Place` says."""

    @abstractmethod
    def _pieces(self) -> dict[int, list[torch.Tensor]]:
        """Return the gradients on the device, by group, in the order of `Place.index`; no group without gradients."""

    def gradients(self) -> list[torch.Tensor | None]:
        self._wait()
        if self._offload:
            # The buffers keep what they were last given; DeepSpeed notes the norms of what this step has reached.
            reached = self._zero.norm_for_param_grads
            return [
                piece if self._zero.get_param_id(param) in reached else None
                for param, piece in zip(self.parameters, self._offloaded(), strict=True)
            ]

        pieces = self._pieces()
        return [
            None if at is None or at.group not in pieces else pieces[at.group][at.index].view(-1).narrow(0, 0, at.size)
            for at in self._places
        ]

    def _offloaded(self) -> list[torch.Tensor | None]:
        """Return this process's pieces of the gradients in host memory, whatever is in them."""
        buffers = self._buffers()
        return [None if at is None else buffers[at.group].narrow(0, at.start, at.size) for at in self._places]

    def weights(self) -> list[Weight | None]:
        partitions = self._partitions()
        return [
            None
            if at is None
            else Weight(partitions[at.group], at.start, at.size, self._parameter_groups().get(at.group, at.group))
            for at in self._places
        ]

    def _parameter_groups(self) -> dict[int, int]:
        """Return the optimizer's parameter group of each group, where they are not the same."""
        return {}

    def fill(self) -> None:
        # On the device the partitions hold something for every parameter, which is what DeepSpeed steps by.
        if self._offload:
            norms = self._zero.norm_for_param_grads
            for param, piece in zip(self.parameters, self._offloaded(), strict=True):
                key = self._zero.get_param_id(param)
                if key not in norms and piece is not None:
                    norms[key] = torch.linalg.vector_norm(piece.zero_())

    def projected(self) -> None:
        # With offload the norms were taken when the gradients were copied, before the projection.
        if self._offload:
            norms = self._zero.norm_for_param_grads
            for param, gradient in zip(self.parameters, self.gradients(), strict=True):
                key = self._zero.get_param_id(param)
                if key in norms and gradient is not None:
                    norms[key] = torch.linalg.vector_norm(gradient, dtype=torch.float32)


class Zero12Engine(ZeroEngine):
    """ZeRO-1 and ZeRO-2: a process owns a range of all parameters laid end to end, so whole ones and parts of two."""

    def _offloads(self) -> bool:
        return bool(self._zero.cpu_offload)

    def _find_places(self) -> list[Place | None]:
        # Not `_hp_mapping`, which does not know of `round_robin_gradients`.
        zero, places = self._zero, {}
        for group, params in enumerate(zero.params_in_partition):
            offsets, starts = zero.grad_partition_insertion_offset[group], zero.grad_start_offset[group]
            rank = dist.get_rank(zero.real_dp_process_group[group])
            for index, param in enumerate(params):
                key = zero.get_param_id(param)
                start, skipped = int(offsets[rank][key]), int(starts[rank][key])
                size = min(param.numel() - skipped, int(zero.partition_size[group]) - start)
                places[id(param)] = Place(group, index, start, size, skipped)
        optimized = {id(param) for group in zero.bit16_groups for param in group}
        _require(optimized, self.names, self.parameters)
        return [places.get(id(param)) for param in self.parameters]

    def _buffers(self) -> list[torch.Tensor]:
        return [partition.grad.view(-1) for partition in self._partitions()]

    def _partitions(self) -> list[torch.Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def _pieces(self) -> dict[int, list[torch.Tensor]]:
        return {
            group: [piece for piece in averaged if not getattr(piece, "_zero_padding", False)]
            for group, averaged in self._zero.averaged_gradients.items()
            if averaged is not None
        }

    def clear(self) -> None:
        zero = self._zero
        self._wait()
        zero.micro_step_id = -1  # the next backward pass is the first of a step
        zero.zero_grad(set_to_none=True)
        for tensors in (zero.averaged_gradients, zero.all_grad_tensors):
            for group in tensors:
                tensors[group] = None
        if self._offload:
            zero.reset_cpu_buffers()
            # A parameter that the next backward pass does not reach would keep, or be added to, what is in these.
            for buffer in [*self._buffers(), *zero.accumulated_grads_in_cpu.values()]:
                buffer.zero_()


class Zero3Engine(ZeroEngine):
    """ZeRO-3: every parameter is split evenly, the last parts padded."""

    def _offloads(self) -> bool:
        return bool(self._zero.offload_optimizer)

    def _find_places(self) -> list[Place | None]:
        zero = self._zero
        indices = {id(param): index for params in zero.fp16_groups for index, param in enumerate(params)}
        _require(indices, self.names, self.parameters)
        places = []
        for param in self.parameters:
            group, start, part = zero.grad_position[zero.get_param_id(param)]
            size = max(
                0, min(part, param.ds_numel - self.processes.rank * part)
            )  # the rest of the last parts is padding
            places.append(Place(group, indices[id(param)], start, size, self.processes.rank * part))
        return places

    def _buffers(self) -> list[torch.Tensor]:
        return [group.grad for group in self._partitions()]

    def _partitions(self) -> list[torch.Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _parameter_groups(self) -> dict[int, int]:
        return self._zero.sub_group_to_group_id

    def _pieces(self) -> dict[int, list[torch.Tensor]]:
        return self._zero.averaged_gradients

    def clear(self) -> None:
        zero = self._zero
        self._wait()
        zero._pre_step()
        zero.zero_grad(set_to_none=True)
        # The buffers are reused: a parameter that the next pass does not reach would keep this one's gradient.
        zero.grad_partitions_flat_buffer.zero_()
        if self._offload:
            zero.reset_cpu_buffers()
            for buffer in self._buffers():
                buffer.zero_()
        else:
            zero.averaged_gradients = {}


def _require(optimized: Container[int], names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
    """Check that DeepSpeed's optimizer has every trainable parameter, given by its id.

    Raises:
        RuntimeError: it lacks one.
    """
    for name, param in zip(names, parameters, strict=True):
        if id(param) not in optimized:
            raise RuntimeError(f"OGPSA finds no partition of {name} in DeepSpeed's optimizer.")


_ENGINES = {"DeepSpeedZeroOptimizer": Zero12Engine, "DeepSpeedZeroOptimizer_Stage3": Zero3Engine}


def make_zero_engine(model: torch.nn.Module, engine: Any) -> ZeroEngine:
    """Make the engine of a DeepSpeed run.

    Raises:
        ValueError: not a ZeRO optimizer of stage 1, 2 or 3 that OGPSA knows; says which.
        RuntimeError: this version of DeepSpeed does not look as expected.
    """
    kind = type(engine.optimizer).__name__
    if kind not in _ENGINES:
        raise ValueError(
            f"`deepspeed` leads to the optimizer {kind}, which OGPSA does not support; allowed: ZeRO stages 1, 2 and "
            "3 (stage 1 in bf16 without `data_types.grad_accum_dtype: fp32`)."
        )
    return _ENGINES[kind](model, engine)


@contextmanager
def before_step(engine: Any, action: Callable[[], None]) -> Iterator[None]:
    """While the context is open, call `action` between DeepSpeed's backward pass and its step.

    accelerate's wrapper calls `engine.backward` and `engine.step` in one; the gradients are complete between the two,
    in the last micro-batch of a step.
    """
    stock = engine.step

    def step(*args, **kwargs):
        if engine.is_gradient_accumulation_boundary():
            action()
        return stock(*args, **kwargs)

    engine.step = step
    try:
        yield
    finally:
        del engine.step
