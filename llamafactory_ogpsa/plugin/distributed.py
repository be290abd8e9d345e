"""Which distributed set-ups OGPSA trains with, checked before the model is loaded.

Every refusal is a ValueError that names the option, its value and what is allowed.
"""

import os
from typing import Any

from .optimizers import refuse_deepspeed_optimizer


# DeepSpeed's settings with which the engines would not find the gradients, and the values that turn them off.
_UNSUPPORTED = {
    "compile.deepcompile": (False,),
    "expert_parallel.enabled": (False,),
    "managed_gradient_accumulation": (True,),
    "sequence_parallel_size": (1, 0),
    "tensor_parallel.autotp_size": (1, 0),
    "torch_autocast.enabled": (False,),
    "zero_optimization.mics_shard_size": (-1, 0, 1),
    "zero_optimization.offload_optimizer.ratio": (1.0,),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.zenflow": (False,),
    "zero_optimization.zero_hpz_partition_size": (1, 0),
}


def check_distributed(training_args: Any) -> None:
    """Refuse what OGPSA has no engine for."""
    if os.getenv("ACCELERATE_USE_MEGATRON_LM", "false").lower() in ("true", "1"):
        raise ValueError("`ACCELERATE_USE_MEGATRON_LM` is set: OGPSA does not support Megatron; allowed: unset.")

    plugin = getattr(training_args, "deepspeed_plugin", None)
    if plugin is not None:
        check_deepspeed(plugin.hf_ds_config.config)
    check_fsdp(training_args)
    check_parallelism(getattr(training_args, "parallelism_config", None))


def check_deepspeed(config: dict[str, Any]) -> None:
    """Refuse a DeepSpeed configuration that OGPSA does not support."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"`zero_optimization.stage` of `deepspeed` is {stage!r} under OGPSA; allowed: 1, 2, 3.")

    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise ValueError(
                f"`zero_optimization.{name}.device` of `deepspeed` is 'nvme', where OGPSA cannot project gradients; "
                "allowed: none, cpu."
            )
    refuse_deepspeed_optimizer(config)
    if stage == 1 and (config.get("data_types") or {}).get("grad_accum_dtype") == "fp32":
        raise ValueError(
            "`data_types.grad_accum_dtype` of `deepspeed` is 'fp32' with stage 1, whose optimizer for bf16 OGPSA does "
            "not support; allowed: unset, or stage 2."
        )

    for name, unset in _UNSUPPORTED.items():
        value: Any = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value not in unset:
            raise ValueError(
                f"`{name}` of `deepspeed` is {value!r}, which OGPSA does not support; allowed: {unset[0]!r} or unset."
            )


def check_fsdp(training_args: Any) -> None:
    """Refuse FSDP, asked for by LLaMA-Factory's options or by `accelerate launch`, unless it is FSDP2."""
    config = training_args.fsdp_config if isinstance(training_args.fsdp_config, dict) else {}
    if training_args.fsdp:
        source, version = "fsdp_config.version", config.get("version", 1)
    elif os.getenv("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        source, version = "fsdp_version", os.getenv("FSDP_VERSION", "1")
    else:
        return

    if config.get("xla"):
        raise ValueError("`fsdp_config.xla` is set, which OGPSA does not support; allowed: unset.")
    if str(version) != "2":
        raise ValueError(f"`{source}` is {version} under OGPSA; allowed: 2 (FSDP2, PyTorch's `fully_shard`).")


def check_parallelism(config: Any) -> None:
    """Refuse any parallelism but data parallelism."""
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(config, name, None) or int(os.getenv(f"PARALLELISM_CONFIG_{name.upper()}", "1"))
        if size > 1:
            raise ValueError(
                f"`parallelism_config.{name}` is {size}: OGPSA does not support tensor or sequence parallelism; "
                "allowed: 1."
            )
