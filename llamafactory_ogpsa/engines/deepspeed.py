"""The engines of DeepSpeed's ZeRO stages, and the place between its backward pass and its step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .zero import Place, ZeroEngine


class Zero12Engine(ZeroEngine):
    """ZeRO-1 and ZeRO-2: a process owns a range of all parameters laid end to end: whole ones, and parts of two."""

    expected = (
        "all_grad_tensors averaged_gradients bit16_groups cpu_offload dp_process_group "
        "finalize_gradient_accumulation_boundary get_param_id grad_partition_insertion_offset "
        "grad_start_offset gradient_accumulation_dtype loss_scale micro_step_id params_in_partition "
        "partition_size real_dp_process_group reset_cpu_buffers single_partition_of_fp32_groups zero_grad"
    )
    expected_offloading = "accumulated_grads_in_cpu norm_for_param_grads"

    def _find_places(self) -> list[Place | None]:
        # Not `_hp_mapping`, which ignores `round_robin_gradients`.
        zero, places = self._zero, {}
        for group, params in enumerate(zero.params_in_partition):
            offsets, starts = zero.grad_partition_insertion_offset[group], zero.grad_start_offset[group]
            rank = dist.get_rank(zero.real_dp_process_group[group])
            for index, param in enumerate(params):
                key = zero.get_param_id(param)
                start, skipped = int(offsets[rank][key]), int(starts[rank][key])
                size = min(param.numel() - skipped, int(zero.partition_size[group]) - start)
                places[id(param)] = Place(group, index, start, size, skipped)
        self._require({id(param) for group in zero.bit16_groups for param in group})
        return [places.get(id(param)) for param in self.parameters]

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
            # A parameter that the next backward pass does not reach would keep these numbers, or add to them.
            for buffer in [*self._buffers(), *zero.accumulated_grads_in_cpu.values()]:
                buffer.zero_()


class Zero3Engine(ZeroEngine):
    """ZeRO-3: every parameter is split evenly, the last parts padded."""

    expected = (
        "_pre_step averaged_gradients dp_process_group finalize_gradient_accumulation_boundary fp16_groups "
        "fp32_partitioned_groups_flat get_param_id grad_partitions_flat_buffer grad_position "
        "gradient_accumulation_dtype loss_scale offload_optimizer reset_cpu_buffers sub_group_to_group_id "
        "zero_grad"
    )
    expected_offloading = "norm_for_param_grads"

    def _find_places(self) -> list[Place | None]:
        zero = self._zero
        indices = {id(param): index for params in zero.fp16_groups for index, param in enumerate(params)}
        self._require(indices)
        places = []
        for param in self.parameters:
            group, start, part = zero.grad_position[zero.get_param_id(param)]
            # The rest of the last parts is padding.
            size = max(0, min(part, param.ds_numel - self.processes.rank * part))
            places.append(Place(group, indices[id(param)], start, size, self.processes.rank * part))
        return places

    def _partitions(self) -> list[torch.Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _parameter_groups(self) -> dict[int, int]:
        return self._zero.sub_group_to_group_id

    def _gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)

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


_ENGINES = {"DeepSpeedZeroOptimizer": Zero12Engine, "DeepSpeedZeroOptimizer_Stage3": Zero3Engine}


def make_zero_engine(model: torch.nn.Module, engine: Any) -> ZeroEngine:
    """Make the engine of a DeepSpeed run.

    Raises:
        ValueError: the optimizer is not one of ZeRO stage 1, 2 or 3 that OGPSA supports; names it.
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
    """While the context is open, call `action` between the last backward pass of DeepSpeed's step and the step itself.

    accelerate's wrapper calls `engine.backward` and `engine.step` in one; the gradients are complete between the two.
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
