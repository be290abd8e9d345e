"""Where a run keeps its basis, in which precision, and with which kernel it projects."""

import logging

import torch

from ..engines import Engine
from ..kernels import triton_obstacle


logger = logging.getLogger("llamafactory.ogpsa")

# `ogpsa_basis_device: auto` keeps the basis on an accelerator if it takes at most this share of the memory that is
# free before training, because optimizer state and activations still have to be allocated.
_BASIS_SHARE = 0.4


def choose_basis_dtype(choice: str, engine: Engine) -> torch.dtype:
    """Return the dtype of the basis; `auto` is bfloat16 if all gradients are, else float32."""
    if choice != "auto":
        return getattr(torch, choice)
    return torch.bfloat16 if all(dtype == torch.bfloat16 for dtype in engine.dtypes) else torch.float32


def choose_basis_device(choice: str, gradient_device: torch.device, num_bytes: int) -> torch.device:
    """Return where the basis is kept: with the gradients, or in host memory if it would not leave room to train."""
    if choice == "cpu" or gradient_device.type == "cpu":
        return torch.device("cpu")

    if choice == "auto" and gradient_device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(gradient_device)
        if num_bytes > _BASIS_SHARE * free:
            logger.warning(
                f"OGPSA keeps its basis ({num_bytes / 2**30:.2f} GiB) in host memory: "
                f"only {free / 2**30:.2f} GiB are free on {gradient_device}."
            )
            return torch.device("cpu")
    return gradient_device


def settle_placement(engine: Engine, basis_device: torch.device, kernel: str) -> tuple[torch.device, str]:
    """Return the same basis device and kernel (`auto`, `triton` or `torch`) in all processes; every process calls it.

    Sums in another order differ in their last bits, and replicas that differ drift apart. So the CPU or torch is used
    in all processes if one needs it.
    """
    obstacle = triton_obstacle(engine.device.type, interpret=False) if kernel == "auto" else None
    hosted, without_triton = engine.processes.totals([float(basis_device.type == "cpu"), float(obstacle is not None)])
    if without_triton:
        kernel = "torch"
        if obstacle is None:
            logger.warning("OGPSA projects gradients by torch: Triton cannot run in every process.")
        elif engine.processes.rank == 0:
            logger.info(f"OGPSA projects gradients by torch: {obstacle}.")
    return torch.device("cpu") if hosted else basis_device, kernel
