"""The numbers: both implementations against float64."""

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import IMPLEMENTATIONS, Case, assert_close, assert_same_bits, cases, each_implementation, gpu

from llamafactory_ogpsa.kernels import make_plan


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=cases())
def test_any_case_agrees_with_float64(way, drawn):
    kernel, device = way
    case = Case(**drawn, device=device)
    plan = case.plan(kernel)
    c, sq = plan.coefficients(case.gradients)
    expected_c, expected_sq, size = case.coefficients()
    assert c.dtype == sq.dtype == torch.float32
    assert c.device.type == device
    assert ((c.double().cpu() - expected_c).abs() <= 1e-6 * size).all()
    assert ((sq.double().cpu() - expected_sq).abs() <= 1e-6 * expected_sq).all()
    assert_same_bits(case.gradients, case.before)

    max_norm = 0.5 * float(expected_sq.sum()) ** 0.5
    returned = plan.orthogonal_(case.gradients, case.inverse_gram(), max_norm)
    assert torch.equal(returned[0], c)
    assert torch.equal(returned[1], sq)
    # A difference of squares: their rounding is what remains, however little of the gradient does.
    assert returned[2].square().item() == pytest.approx(
        case.projected_norm() ** 2, abs=2e-6 * float(expected_sq.sum())
    )
    assert_close(case.gradients, case.projected(max_norm), case.before, kernel, slack=2e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn=cases())
@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_apply_moves_along_the_basis(way, drawn):
    kernel, device = way
    case = Case(**drawn, device=device)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(case.num_groups, case.rank, generator=generator).to(device) * drawn["size"]
    case.plan(kernel).apply_(case.gradients, delta, torch.tensor(0.375, device=device))
    slack = 1e-6 * (1 + float(delta.abs().max()) * case.rank / drawn["size"])
    assert_close(case.gradients, case.moved(delta, 0.375), case.before, kernel, slack)


@pytest.mark.parametrize("numel", [1_000_003, 10_000_000])
@pytest.mark.parametrize(
    "way", [pytest.param(("torch", "cpu"), id="torch"), pytest.param(("triton", "cuda"), id="triton-gpu", marks=gpu)]
)
def test_float32_at_size(way, numel):
    kernel, device = way
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(numel, 2, generator=generator))[0].T.contiguous()
    # A tenth of it lies in the span: of next to nothing no relative error could be asked.
    gradient = torch.randn(numel, generator=generator) + 0.5 + 0.1 * numel**0.5 * basis[0]
    exact = basis.double() @ gradient.double()
    exact_sq = gradient.double().square().sum()
    gram = torch.linalg.inv(basis.double() @ basis.double().T).float()[None].to(device)
    moved = gradient.to(device)
    plan = make_plan([basis.to(device)], [0], 1, kernel=kernel)
    c, sq, norm = plan.orthogonal_([moved], gram)
    assert (c[0].double().cpu() - exact).norm() <= 1e-6 * exact.norm()
    assert (sq[0].double().cpu() - exact_sq).abs() <= 1e-6 * exact_sq
    left = moved.double().cpu()
    assert ((basis.double() @ left).abs() <= 1e-6 * left.norm()).all()
    assert norm.item() == pytest.approx(left.norm().item(), rel=1e-6)


@each_implementation
@pytest.mark.parametrize("value", [0.1, -3.0])
def test_equal_elements_do_not_build_up_error(implementation, value):
    kernel, device = implementation
    numel = 300_000 if device == "cuda" or kernel == "torch" else 4000
    gradient = torch.full((numel,), value, device=device)
    basis = torch.full((1, numel), 0.7, device=device)
    c, sq = make_plan([basis], [0], 1, kernel=kernel).coefficients([gradient])
    expected = float(gradient.double().sum() * basis[0, 0].double())
    assert abs(c.item() - expected) <= 1e-6 * abs(expected)
    assert abs(sq.item() - float(gradient.double().square().sum())) <= 1e-6 * sq.item()


@each_implementation
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_tiny_and_huge_gradients(implementation, size):
    kernel, device = implementation
    case = Case([300, 41], [0, 1], 2, size=size, device=device)
    case.plan(kernel).orthogonal_(case.gradients, case.inverse_gram())
    assert_close(case.gradients, case.projected(), case.before, kernel, slack=2e-6)


@each_implementation
def test_bfloat16_residual(implementation):
    kernel, device = implementation
    case = Case([900, 700], [0, 0], 2, torch.bfloat16, [torch.bfloat16] * 2, device=device)
    plan = case.plan(kernel)
    plan.orthogonal_(case.gradients, case.inverse_gram())
    c, sq = plan.coefficients(case.gradients)
    assert (c[0].abs() <= 2e-3 * sq.sqrt()).all()


@each_implementation
def test_implementations_agree(implementation):
    kernel, device = implementation
    case = Case([700, 33, 512], [1, 0, 1], 3, device=device)
    reference = Case([700, 33, 512], [1, 0, 1], 3)
    c, sq, norm = case.plan(kernel).orthogonal_(case.gradients, case.inverse_gram(), 1.0)
    expected = reference.plan("torch").orthogonal_(reference.gradients, reference.inverse_gram(), 1.0)
    torch.testing.assert_close(c.cpu(), expected[0], rtol=0, atol=1e-6 * float(sq.sum()) ** 0.5)
    torch.testing.assert_close(sq.cpu(), expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.cpu(), expected[2], rtol=1e-6, atol=0)
    for g, e in zip(case.gradients, reference.gradients, strict=True):
        torch.testing.assert_close(g.cpu(), e, rtol=1e-6, atol=1e-7)


@each_implementation
def test_every_run_gives_the_same_bits(implementation):
    kernel, device = implementation
    case = Case([700, 33, 512], [1, 0, 1], 3, torch.bfloat16, [torch.float32] * 3, device=device)
    results = []
    for _ in range(2):
        gradients = case.copies()
        figures = case.plan(kernel).orthogonal_(gradients, case.inverse_gram(), 1.0)
        results.append([*figures, *gradients])
    assert_same_bits(*results)
