"""The kernels of scope `inputs`: both implementations against float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    IMPLEMENTATIONS,
    assert_close,
    assert_same_bits,
    each_implementation,
    lay_out,
    orthonormal,
)

from llamafactory_ogpsa.kernels.factory import make_rows_kernel
from llamafactory_ogpsa.kernels.rows import TorchRows


class RowsCase:
    """A gradient `[rows, width]` and an orthonormal basis `[k, width]`; more directions than `width` are of norm one.

    Args:
        rows, width, k: the sizes.
        dtype: of the gradient.
        layout: of the gradient, from `LAYOUTS`.
        device: where both lie.
        seed: of the random numbers.
    """

    def __init__(self, rows, width, k, dtype=torch.float32, layout="plain", device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.basis = orthonormal([width], [0], k, generator)[0].to(device)
        values = torch.randn(rows, width, generator=generator).to(dtype).to(device)
        if layout == "transposed":
            self.gradient = values.t().contiguous().t()
        else:
            self.gradient = lay_out(values.reshape(-1), layout).view(rows, width)
        self.before = self.gradient.clone()
        exact, v = self.before.double().cpu(), self.basis.double().cpu()
        self.coefficients = exact @ v.T
        self.projected = exact - self.coefficients @ v
        self.sums = torch.stack([exact.square().sum(), self.coefficients.square().sum()])

    def check(self, kernel, scale=None):
        """Take both passes and compare all that they give with float64."""
        rows = make_rows_kernel(kernel, self.basis.device)
        factor = None if scale is None else torch.tensor(scale, device=self.basis.device)
        c, sums = rows.coefficients(self.gradient, self.basis)
        assert_same_bits([self.gradient], [self.before])
        assert (c.dtype, sums.dtype) == (torch.float32, torch.float64)
        assert (c.double().cpu() - self.coefficients).norm() <= 1e-6 * self.sums[0].sqrt()
        assert ((sums.cpu() - self.sums).abs() <= 2e-6 * self.sums[0]).all()
        rows.apply_(self.gradient, c, self.basis, factor)
        expected = self.projected if scale is None else scale * self.projected
        assert_close([self.gradient], [expected], [self.before], kernel, slack=2e-6)


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.sampled_from([1, 32, 33]), st.integers(1, 70)),
    width=st.one_of(st.sampled_from([1, 64, 65, 128]), st.integers(1, 150)),
    k=st.one_of(st.sampled_from([1, 16, 17, 64, 96, 127, 128, 129]), st.integers(1, 140)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "unaligned", "transposed"]),
    scale=st.sampled_from([None, 1.0, 0.375]),
    seed=st.integers(0, 1000),
)
def test_any_matrix_agrees_with_float64(way, rows, width, k, dtype, layout, scale, seed):
    kernel, device = way
    RowsCase(rows, width, k, dtype, layout, device, seed).check(kernel, scale)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 128])
def test_a_wide_matrix_of_odd_width(implementation, dtype, k):
    kernel, device = implementation
    RowsCase(37, 1187, k, dtype, device=device).check(kernel, 0.5)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_in_the_span(implementation, dtype):
    kernel, device = implementation
    case = RowsCase(40, 300, 96, dtype, device=device)
    rows = make_rows_kernel(kernel, case.basis.device)
    c, _ = rows.coefficients(case.gradient, case.basis)
    rows.apply_(case.gradient, c, case.basis, None)
    _, left = rows.coefficients(case.gradient, case.basis)
    assert (left[1] / left[0]).sqrt() <= (1e-6 if dtype == torch.float32 else 1e-2)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_coefficients_change_nothing(implementation, dtype):
    """What a step that is not finite does: inf and NaN stay too, and with Triton the sign of zero."""
    kernel, device = implementation
    case = RowsCase(40, 70, 8, dtype, device=device)
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0], dtype=dtype, device=device)
    case.gradient.view(-1)[[3, 100, 200, 2000]] = values
    before = case.gradient.clone()
    rows = make_rows_kernel(kernel, case.basis.device)
    for scale in (None, torch.ones((), device=device)):
        rows.apply_(case.gradient, torch.zeros(40, 8, device=device), case.basis, scale)
        torch.testing.assert_close(case.gradient, before, rtol=0, atol=0, equal_nan=True)
        if kernel == "triton":
            assert_same_bits([case.gradient], [before])


@each_implementation
def test_a_value_that_is_not_finite_is_seen_in_the_sums(implementation):
    kernel, device = implementation
    rows = make_rows_kernel(kernel, torch.device(device))
    for value in (float("nan"), float("inf")):
        case = RowsCase(33, 65, 3, device=device)
        case.gradient[32, 64] = value
        _, sums = rows.coefficients(case.gradient, case.basis)
        assert not sums[0].isfinite()


@each_implementation
def test_every_run_gives_the_same_bits(implementation):
    kernel, device = implementation
    results = []
    for _ in range(2):
        case = RowsCase(70, 333, 17, torch.bfloat16, device=device)
        rows = make_rows_kernel(kernel, case.basis.device)
        c, sums = rows.coefficients(case.gradient, case.basis)
        rows.apply_(case.gradient, c, case.basis, torch.tensor(0.5, device=device))
        results.append((sums, [c, case.gradient]))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])


@each_implementation
def test_columns_that_a_process_holds_add_up(implementation):
    """A row that is cut between processes: the coefficients of its parts are its own, summed."""
    kernel, device = implementation
    case = RowsCase(1, 200, 9, device=device)
    rows = make_rows_kernel(kernel, case.basis.device)
    parts = [slice(0, 77), slice(77, 200)]
    total = sum(rows.coefficients(case.gradient[:, p], case.basis[:, p].contiguous())[0] for p in parts)
    assert (total.double().cpu() - case.coefficients).norm() <= 1e-6 * case.sums[0].sqrt()


@each_implementation
@pytest.mark.parametrize(("rows", "k"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_matrix_or_basis_is_none_to_worry_about(implementation, rows, k):
    """A process can have no rows, and reference inputs of zero have no direction; clipping is still done."""
    kernel, device = implementation
    RowsCase(rows, 40, k, device=device).check(kernel, 0.5)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has the older setting alone"
)
@pytest.mark.parametrize("chosen", ["torch.backends", "torch.backends.cuda.matmul", "allow_tf32"])
def test_products_are_float32_whatever_the_run_has_chosen(chosen):
    """In a process of its own: torch does not forget that both of its settings were used."""
    script = f"""
import torch

from llamafactory_ogpsa.kernels.rows import exact_products

matmul = torch.backends.cuda.matmul
if {chosen!r} == "allow_tf32":
    matmul.allow_tf32 = True
else:
    {chosen if "." in chosen else "matmul"}.fp32_precision = "tf32"
with exact_products():
    print(matmul.fp32_precision)
print(matmul.fp32_precision)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.split() == ["ieee", "tf32"], run.stderr


def test_more_directions_than_fit_go_to_torch(monkeypatch):
    kernel = pytest.importorskip("llamafactory_ogpsa.kernels.triton_rows")
    asked = []
    monkeypatch.setattr(TorchRows, "coefficients", lambda *_: asked.append("coefficients"))
    monkeypatch.setattr(TorchRows, "apply_", lambda *_: asked.append("apply_"))
    rows, k = kernel.TritonRows(), kernel.MAX_DIRECTIONS + 1
    rows.coefficients(torch.zeros(2, 200), torch.zeros(k, 200))
    rows.apply_(torch.zeros(2, 200), torch.zeros(2, k), torch.zeros(k, 200), None)
    assert asked == ["coefficients", "apply_"]
