"""Which implementation a plan gets, and which arguments are refused."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import interpreted

from llamafactory_ogpsa.kernels import factory, make_plan
from llamafactory_ogpsa.kernels.torch_plan import TorchPlan


def _run(script):
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return run.stdout


def test_auto_is_torch_on_the_cpu_and_says_so_once(caplog):
    factory._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="llamafactory_ogpsa"):
        plans = [make_plan([torch.ones(1, 4)], [0], 1) for _ in range(3)]
    assert all(isinstance(plan, TorchPlan) for plan in plans)
    assert len(caplog.messages) == 1
    assert "torch" in caplog.messages[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_triton_on_a_gpu():
    assert not isinstance(make_plan([torch.ones(1, 4, device="cuda")], [0], 1), TorchPlan)


def test_auto_without_triton_is_torch(monkeypatch):
    monkeypatch.setattr(factory.importlib.util, "find_spec", lambda name: None)
    assert isinstance(make_plan([torch.ones(1, 4)], [0], 1), TorchPlan)
    with pytest.raises(ValueError, match="not installed"):
        make_plan([torch.ones(1, 4)], [0], 1, kernel="triton")


def test_auto_on_the_cpu_does_not_import_triton():
    script = """
import sys, torch
from llamafactory_ogpsa.kernels import make_plan
make_plan([torch.ones(1, 4)], [0], 1)
print("triton" in sys.modules)
"""
    assert _run(script) == "False\n"


def test_triton_on_the_cpu_is_an_error_that_says_why():
    script = """
import torch
from llamafactory_ogpsa.kernels import make_plan
try:
    make_plan([torch.ones(1, 4)], [0], 1, kernel="triton")
except ValueError as error:
    print(error)
"""
    assert "needs a CUDA or ROCm device, and the gradients are on cpu" in _run(script)


@interpreted
def test_interpreted_kernels_do_not_get_addresses_on_a_gpu():
    assert "TRITON_INTERPRET is set" in factory.triton_obstacle("cuda", interpret=True)


def test_a_triton_that_cannot_launch_is_an_obstacle():
    script = """
from types import SimpleNamespace
from triton.runtime import driver
from llamafactory_ogpsa.kernels import triton_obstacle

def build():
    raise RuntimeError("Failed to find C compiler.")

driver.set_active(SimpleNamespace(get_current_device=build))
print(triton_obstacle("cuda", interpret=False))
"""
    assert _run(script) == "Triton does not work here (RuntimeError: Failed to find C compiler.)\n"


@interpreted
def test_triton_does_not_run_on_other_devices():
    with pytest.raises(ValueError, match="meta"):
        make_plan([torch.ones(1, 4, device="meta")], [0], 1, kernel="triton")


@pytest.mark.parametrize(
    ("basis", "groups", "message"),
    [
        ([], [], "no tensors"),
        ([torch.ones(33, 4)], [0], "1 to 32"),
        ([torch.ones(0, 4)], [0], "1 to 32"),
        ([torch.ones(2, 4), torch.ones(3, 4)], [0, 0], "tensor 1"),
        ([torch.ones(4, 2).t()], [0], "contiguous"),
        ([torch.ones(2, 4, dtype=torch.float64)], [0], "float64"),
        ([torch.ones(2, 4)], [1], "0 to 0"),
        ([torch.ones(2, 4)], [-1], "0 to 0"),
        ([torch.ones(2, 4)], [], "groups"),
    ],
)
def test_arguments_that_contradict_are_refused(basis, groups, message):
    with pytest.raises(ValueError, match=message):
        make_plan(basis, groups, 1)


def test_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        make_plan([torch.ones(1, 4)], [0], 1, kernel="cuda")


def test_a_basis_on_another_accelerator_is_refused():
    with pytest.raises(ValueError, match="cannot serve"):
        make_plan([torch.ones(1, 4, device="meta")], [0], 1, device="cpu")
