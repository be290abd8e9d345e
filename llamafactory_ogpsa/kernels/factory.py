"""The choice between Triton and torch."""

import functools
import importlib.util
import logging
from collections.abc import Sequence

import torch

from .basis import ResidentBasis, StreamedBasis
from .plan import Plan
from .rows import TorchRows
from .torch_plan import TorchPlan


logger = logging.getLogger(__name__)

# The kernels are made for up to this many directions.
MAX_RANK = 32
BASIS_DTYPES = (torch.float32, torch.bfloat16)


def make_plan(
    basis: Sequence[torch.Tensor],
    groups: Sequence[int],
    num_groups: int,
    kernel: str = "auto",
    device: torch.device | str | None = None,
) -> Plan:
    """Prepare the passes over a set of parameter tensors for one basis.

    The plan keeps the basis's addresses: make another when the basis is replaced, and do not resize the tensors.

    Args:
        basis: one contiguous tensor `[rank, numel_i]` per parameter tensor, float32 or bfloat16, all of the same rank,
            1 to 32, and on the same device; `numel_i` may be zero.
        groups: the group of each tensor, over which products are summed: `0, 1, 2, ...` for a basis per tensor, all
            zero for one basis over all tensors together, or any other mapping.
        num_groups: number of groups; a group may have no tensors.
        kernel: `triton`, `torch`, or `auto` for Triton if it can run.
        device: the gradients' device; None for the basis's. With the basis on the CPU, in pinned memory, and the
            gradients elsewhere, each pass streams the basis through two buffers on the device.

    Raises:
        ValueError: the arguments are not as above, or `triton` cannot run here.
    """
    _check(basis, groups, num_groups)
    device = basis[0].device if device is None else torch.empty(0, device=device).device
    if basis[0].device == device:
        source = ResidentBasis(basis, groups)
    elif basis[0].device.type == "cpu":
        source = StreamedBasis(basis, groups, device)
    else:
        raise ValueError(f"a basis on {basis[0].device} cannot serve gradients on {device}.")

    numels = [b.shape[1] for b in basis]
    if use_triton(kernel, device):
        from .triton_plan import TritonPlan

        return TritonPlan(source, numels, num_groups, basis[0].shape[0])

    return TorchPlan(source, numels, num_groups, basis[0].shape[0])


def make_rows_kernel(kernel: str, device: torch.device) -> TorchRows:
    """Choose the implementation for gradients on a device, as `make_plan` does.

    Raises:
        ValueError: an unknown kernel, or `triton` if it cannot run.
    """
    if use_triton(kernel, device):
        from .triton_rows import TritonRows

        return TritonRows()

    return TorchRows()


def _check(basis: Sequence[torch.Tensor], groups: Sequence[int], num_groups: int) -> None:
    if not basis:
        raise ValueError("the basis has no tensors.")

    rank, device = basis[0].shape[0], basis[0].device
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the basis's rank must be 1 to {MAX_RANK}, not {rank}.")

    for i, b in enumerate(basis):
        if b.dim() != 2 or b.shape[0] != rank or b.device != device or not b.is_contiguous():
            raise ValueError(f"basis tensor {i} must be contiguous [{rank}, numel] on {device}, like the first.")

        if b.dtype not in BASIS_DTYPES:
            raise ValueError(f"basis tensor {i} must be float32 or bfloat16, not {b.dtype}.")

    if len(groups) != len(basis) or not all(0 <= group < num_groups for group in groups):
        raise ValueError(
            f"groups must hold, for each of the {len(basis)} tensors, a number from 0 to {num_groups - 1}."
        )


def use_triton(kernel: str, device: torch.device) -> bool:
    """Choose between Triton and torch, and log the choice of `auto`; see `make_plan`."""
    if kernel not in ("auto", "triton", "torch"):
        raise ValueError(f"kernel must be auto, triton or torch, not {kernel!r}.")

    if kernel == "torch":
        return False

    # Interpreted kernels are for tests: `auto` does not choose them.
    obstacle = triton_obstacle(device.type, interpret=kernel == "triton")
    if kernel == "triton" and obstacle:
        raise ValueError(f"kernel triton cannot run here: {obstacle}.")

    if kernel == "auto":
        _say(f"torch, because {obstacle}" if obstacle else "Triton")

    return not obstacle


def triton_obstacle(device_type: str, interpret: bool) -> str | None:
    """Return why Triton cannot run on this type of device, None if it can; with `interpret` its interpreter counts."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"

    if device_type == "cuda":
        return _driver_obstacle()

    if device_type == "cpu" and interpret:
        from .triton_kernels import INTERPRETED

        if INTERPRETED:
            return None

    return f"Triton needs a CUDA or ROCm device, and the gradients are on {device_type}"


def _driver_obstacle() -> str | None:
    """Return why Triton cannot launch kernels on this machine's accelerator, None if it can."""
    try:
        from triton.runtime import driver

        from .triton_kernels import INTERPRETED

        if INTERPRETED:
            # Interpreted kernels would read the accelerator's addresses as the host's.
            return "TRITON_INTERPRET is set, and interpreted kernels cannot read an accelerator's memory"

        # Builds the driver's code, for which Triton needs a C compiler and Python's headers.
        driver.active.get_current_device()
    except Exception as err:
        return f"Triton does not work here ({type(err).__name__}: {err})"

    return None


@functools.cache
def _say(choice: str) -> None:
    logger.info("Gradients are projected by %s.", choice)
