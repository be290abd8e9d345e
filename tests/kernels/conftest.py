"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before triton is imported."""

import os

import pytest
import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernel_cases import IMPLEMENTATIONS, KERNELS_INTERPRETED


if not torch.cuda.is_available() and not KERNELS_INTERPRETED:
    raise pytest.UsageError("triton was imported before tests/kernels/conftest.py: set TRITON_INTERPRET=1.")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each way to run the kernels here: a pair (kernel, device)."""
    return request.param
