"""Where a run keeps its basis, in which precision, and what projects it."""

import logging

import torch

from ..engines import Engine
from ..kernels import triton_obstacle


logger = logging.getLogger("llamafactory.ogpsa")

# On an accelerator, `ogpsa_basis_device: auto` keeps the basis there while it takes at most this share of what is free
# before training: optimizer state and activations are still to come.
_BASIS_SHARE = 0.4


def choose_basis_dtype(choice: str, engine: Engine) -> torch.dtype:
    """Return the dtype of the basis: the one that was chosen, or for `auto` bfloat16 where all gradients are."""
    if choice != "auto":
        return getattr(torch, choice)
    return torch.bfloat16 if all(dtype == torch.bfloat16 for dtype in engine.dtypes) else torch.float32


def choose_basis_device(choice: str, gradient_device: torch.device, num_bytes: int) -> torch.device:
    """Decide where the basis lives: with the gradients, or in host memory where it would not leave room to train."""
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


def agree(engine: Engine, basis_device: torch.device, kernel: str) -> tuple[torch.device, str]:
    """Let all processes take the same basis device and kernel; every process calls it.

    Sums in another order differ in their last bits, and replicas that differ drift apart: what one process cannot do,
    none does.

    Args:
        engine: where the gradients live.
        basis_device: what `choose_basis_device` gave in this process.
        kernel: `auto`, `triton` or `torch`.

    Returns:
        the device and the kernel.
    """
    here = kernel == "auto" and triton_obstacle(engine.device.type, interpret=False) is not None
    hosted, obstructed = engine.processes.totals([float(basis_device.type == "cpu"), float(here)])
    if obstructed and not here:
        logger.warning("OGPSA projects gradients by torch: Triton cannot run in every process.")
        kernel = "torch"
    return torch.device("cpu") if hosted else basis_device, kernel
