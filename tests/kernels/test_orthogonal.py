"""The fused path: clipping as torch does it, non-finite values, launches."""

import pytest
import torch
from kernel_cases import IMPLEMENTATIONS, Case, assert_same_bits, each_implementation

from llamafactory_ogpsa.kernels import make_plan


def _stock_clip(gradients, max_norm):
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return [p.grad for p in parameters]


@each_implementation
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clips_as_torch_does(implementation, max_norm):
    kernel, device = implementation
    case = Case([600, 50, 3], [0, 1, 1], 2, device=device)
    plan = case.plan(kernel)
    plain = case.copies()
    plan.orthogonal_(plain, case.inverse_gram())
    plan.orthogonal_(case.gradients, case.inverse_gram(), max_norm)
    for g, e in zip(case.gradients, _stock_clip(plain, max_norm), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6 * max_norm)


@each_implementation
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e25])
def test_non_finite_follows_the_stock_rule(implementation, value):
    kernel, device = implementation
    case = Case([600, 50], [0, 1], 2, device=device)
    case.gradients[1][7] = value
    # There it would have to ask the host, and adds zeros instead, which loses the sign of a zero and a NaN's bits.
    adds_zeros = (kernel, device) == ("torch", "cuda")
    if not adds_zeros:
        case.gradients[0][:9] = -0.0
    before = case.copies()
    plan = case.plan(kernel)
    c, sq, norm = plan.orthogonal_(case.gradients, case.inverse_gram())
    if adds_zeros:
        torch.testing.assert_close(case.gradients, before, rtol=0, atol=0, equal_nan=True)
    else:
        assert_same_bits(case.gradients, before)
    assert not sq.sum().isfinite()
    assert not norm.isfinite()
    assert c[0].isfinite().all()

    plan.orthogonal_(case.gradients, case.inverse_gram(), 1.0)
    for g, e in zip(case.gradients, _stock_clip(before, 1.0), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)


@each_implementation
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_squared_norm_beyond_float32_follows_the_stock_rule(implementation):
    """Its tiles are finite, and so is its sum in float64."""
    kernel, device = implementation
    case = Case([600], [0], 2, device=device)
    case.gradients[0][[3, 590]] = 1.5e19
    before = case.copies()
    _, _, norm = case.plan(kernel).orthogonal_(case.gradients, case.inverse_gram(), 1.0)
    assert norm.item() == float("inf")
    for g, e in zip(case.gradients, _stock_clip(before, 1.0), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)


@each_implementation
def test_the_default_dtype_does_not_matter(implementation):
    kernel, device = implementation
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        case = Case([600, 50], [0, 1], 2, device=device)
        torch.set_default_dtype(dtype)
        try:
            figures = case.plan(kernel).orthogonal_(case.gradients, case.inverse_gram(), 1.0)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([*figures, *case.gradients])
    assert_same_bits(*results)


@each_implementation
@pytest.mark.parametrize("scale", [None, 1.0])
def test_zero_delta_leaves_every_bit(implementation, scale):
    kernel, device = implementation
    if (kernel, device) == ("torch", "cuda"):
        pytest.skip("without asking the host, torch cannot leave out the write: -0.0 becomes 0.0")
    case = Case([300], [0], 2, dtypes=[torch.bfloat16], device=device)
    case.gradients[0][:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])
    before = case.copies()
    scale = None if scale is None else torch.tensor(scale, device=device)
    case.plan(kernel).apply_(case.gradients, torch.zeros(1, 2, device=device), scale)
    assert_same_bits(case.gradients, before)


@each_implementation
def test_directions_that_a_group_lacks_are_left_out(implementation):
    kernel, device = implementation
    case = Case([300, 1], [0, 1], 3, device=device)
    plan = case.plan(kernel)
    inverse_gram = case.inverse_gram()
    assert inverse_gram[1].count_nonzero() == 1
    plan.orthogonal_(case.gradients, inverse_gram)
    c, sq = plan.coefficients(case.gradients)
    assert (c[0].abs() <= 1e-6 * sq[0].sqrt()).all()
    assert case.gradients[1].abs().item() <= 1e-6


@each_implementation
def test_a_remainder_below_zero_is_not_taken_from_the_norm(implementation):
    """Rounding can make a group's remainder negative; an inverse Gram matrix that is too large does so reliably."""
    kernel, device = implementation
    case = Case([400, 400], [0, 1], 1, device=device)
    case.gradients[0].copy_(100 * case.basis[0][0])
    inverse_gram = torch.tensor([1.5, 1.0], device=device).view(2, 1, 1)
    case.plan(kernel).orthogonal_(case.gradients, inverse_gram, 1.0)
    assert case.gradients[1].norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("way", [p for p in IMPLEMENTATIONS if "triton" in p.id])
@pytest.mark.parametrize("count", [1, 40])
def test_three_launches_for_any_number_of_tensors(way, count, monkeypatch):
    from llamafactory_ogpsa.kernels import triton_plan

    launched = []
    launch = triton_plan._launch
    monkeypatch.setattr(triton_plan, "_launch", lambda k, *a, **o: (launched.append(k), launch(k, *a, **o)))
    case = Case([24] * count, list(range(count)), 2, device=way[1])
    case.plan("triton").orthogonal_(case.gradients, case.inverse_gram(), 1.0)
    assert launched == [triton_plan.partial_sums_kernel, triton_plan.reduce_kernel, triton_plan.apply_kernel]


@each_implementation
def test_more_groups_than_a_program_adds_up_at_a_time(implementation):
    kernel, device = implementation
    count = 41
    gradients = [torch.full((1,), 2.0, device=device) for _ in range(count)]
    plan = make_plan([torch.zeros(1, 1, device=device)] * count, list(range(count)), count, kernel=kernel)
    if kernel == "triton":
        plan._apply_options["GROUPS"] = 16
    plan.orthogonal_(gradients, torch.zeros(count, 1, 1, device=device), 1.0)
    expected = 2.0 / (4.0 * count) ** 0.5
    torch.testing.assert_close(torch.cat(gradients), torch.full((count,), expected, device=device))


@each_implementation
def test_warmup_changes_nothing(implementation):
    kernel, device = implementation
    case = Case([300, 0, 41], [0, 1, 2], 2, device=device)
    plan = case.plan(kernel)
    expected = plan.coefficients(case.gradients)
    plan.warmup([g.dtype for g in case.gradients])
    assert_same_bits(case.gradients, case.before)
    assert_same_bits(plan.coefficients(case.gradients), expected)
