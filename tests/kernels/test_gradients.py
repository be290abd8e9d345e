"""What may be among the gradients, and what must not be touched."""

import mmap

import pytest
import torch
from kernel_cases import (
    DTYPES,
    IMPLEMENTATIONS,
    Case,
    assert_close,
    assert_same_bits,
    each_implementation,
    interpreted,
)

from llamafactory_ogpsa.kernels import make_plan


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [8, 1])
def test_neighbours_are_not_touched(implementation, dtype, offset):
    kernel, device = implementation
    case = Case([519, 8], [0, 1], 2, dtypes=[dtype] * 2, device=device)
    pools = [torch.full((g.numel() + 64,), float("nan"), dtype=dtype, device=device) for g in case.gradients]
    inside = [pool[offset : offset + g.numel()] for pool, g in zip(pools, case.gradients, strict=True)]
    for slot, gradient in zip(inside, case.gradients, strict=True):
        slot.copy_(gradient)
    case.plan(kernel).orthogonal_(inside, case.inverse_gram())
    assert_close(inside, case.projected(), case.before, kernel, slack=2e-6)
    for pool, slot in zip(pools, inside, strict=True):
        assert pool.isnan().sum() == pool.numel() - slot.numel()


@each_implementation
def test_neighbours_of_the_basis_are_not_read(implementation):
    kernel, device = implementation
    case = Case([519, 8], [0, 0], 3, device=device)
    pools = [torch.full((b.numel() + 32,), float("nan"), device=device) for b in case.basis]
    basis = [pool[5 : 5 + b.numel()].view(b.shape).copy_(b) for pool, b in zip(pools, case.basis, strict=True)]
    make_plan(basis, [0, 0], 1, kernel=kernel).orthogonal_(case.gradients, case.inverse_gram())
    assert_close(case.gradients, case.projected(), case.before, kernel, slack=2e-6)


@each_implementation
def test_every_partial_sum_is_written(implementation):
    kernel, device = implementation
    case = Case([1200, 0, 77], [0, 1, 2], 2, layouts=["plain", "plain", "none"], device=device)
    plan = case.plan(kernel)
    first = plan.coefficients(case.gradients)
    plan._partials.fill_(float("nan"))
    assert_same_bits(plan.coefficients(case.gradients), first)


@each_implementation
@pytest.mark.parametrize("layout", ["transposed", "unaligned"])
def test_unusual_memory_is_changed_in_place(implementation, layout):
    kernel, device = implementation
    case = Case([630], [0], 2, layouts=[layout], device=device)
    address, strides = case.gradients[0].data_ptr(), case.gradients[0].stride()
    delta = torch.tensor([[1.0, -2.0]], device=device)
    case.plan(kernel).apply_(case.gradients, delta)
    assert case.gradients[0].data_ptr() == address
    assert case.gradients[0].stride() == strides
    assert_close(case.gradients, case.moved(delta), case.before, kernel, slack=2e-6)


@each_implementation
def test_gradients_may_come_go_move_and_change_dtype(implementation):
    kernel, device = implementation
    case = Case([300, 64], [0, 1], 2, device=device)
    plan = case.plan(kernel)
    a, b = case.gradients
    for gradients in ([a, b], [a.clone(), None], [None, None], [a.bfloat16(), b.half()], [a, b]):
        c, sq = plan.coefficients(gradients)
        for k, g in enumerate(gradients):
            flat = torch.zeros(1) if g is None else g.double().cpu()
            expected = torch.zeros(2) if g is None else case.basis[k].double().cpu() @ flat
            torch.testing.assert_close(c[k].double().cpu(), expected.double(), rtol=1e-6, atol=1e-5)
            assert sq[k].item() == pytest.approx(flat.square().sum().item(), rel=1e-6)


@each_implementation
def test_same_address_another_dtype(implementation):
    kernel, device = implementation
    plan = make_plan([torch.ones(1, 16, device=device)], [0], 1, kernel=kernel)
    gradient = torch.ones(16, dtype=torch.bfloat16, device=device)
    assert plan.coefficients([gradient])[0].item() == 16.0
    assert plan.coefficients([gradient.view(torch.float16)])[0].item() == 30.0


@each_implementation
def test_only_empty_tensors(implementation):
    kernel, device = implementation
    case = Case([0, 0], [0, 1], 2, device=device)
    c, sq, norm = case.plan(kernel).orthogonal_(case.gradients, case.inverse_gram(), 1.0)
    assert c.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert sq.tolist() == [0.0, 0.0]
    assert norm.item() == 0.0


@each_implementation
@pytest.mark.parametrize(
    ("gradients", "error"),
    [
        ([torch.zeros(7)], ValueError),
        ([torch.zeros(8), torch.zeros(8)], ValueError),
        ([torch.zeros(8, dtype=torch.float64)], TypeError),
        ([torch.zeros(8, device="meta")], ValueError),
    ],
)
def test_gradients_that_do_not_fit_are_refused(implementation, gradients, error):
    kernel, device = implementation
    if gradients[0].device.type == "cpu":
        gradients = [g.to(device) for g in gradients]
    plan = make_plan([torch.ones(1, 8, device=device)], [0], 1, kernel=kernel)
    with pytest.raises(error):
        plan.coefficients(gradients)


@each_implementation
@pytest.mark.parametrize("shape", [(1,), (2, 1), (1, 3)])
def test_tables_that_do_not_fit_are_refused(implementation, shape):
    kernel, device = implementation
    plan = make_plan([torch.ones(2, 8, device=device)], [0], 1, kernel=kernel)
    with pytest.raises(ValueError, match="delta must be"):
        plan.apply_([torch.ones(8, device=device)], torch.zeros(shape, device=device))
    with pytest.raises(ValueError, match="inverse_gram must be"):
        plan.orthogonal_([torch.ones(8, device=device)], torch.zeros(shape, device=device))


def _untouched_memory(numel, dtype):
    """Return zeros that take no memory until they are written."""
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype)


@pytest.mark.parametrize("way", [p for p in IMPLEMENTATIONS if "interpreted" in p.id])
def test_elements_beyond_32_bits(way, monkeypatch):
    numel = 2**31 + 700
    basis = _untouched_memory(numel, torch.bfloat16).view(1, numel)
    gradient = _untouched_memory(numel, torch.bfloat16)
    basis[0, -600:] = 1.0
    gradient[-600:] = 2.0
    plan = make_plan([basis], [0], 1, kernel="triton")
    # Only the last tiles are run: the interpreter would take days for the others, which are all zeros.
    plan._partials.zero_()
    [bucket] = plan._spans
    plan._spans[bucket] = (plan._num_tiles - 3, plan._num_tiles)
    c, sq = plan.coefficients([gradient])
    assert (c.item(), sq.item()) == (1200.0, 2400.0)
    plan.apply_([gradient], torch.tensor([[-0.5]]))
    assert (gradient[-600:] == 1.5).all()
    assert (gradient[-1000:-600] == 0.0).all()


@interpreted
def test_tiles_of_a_hundred_billion_elements():
    """The tables are made without touching the tensors, so their arithmetic can be checked at any size."""
    from llamafactory_ogpsa.kernels.triton_plan import _integers, _starts

    counts = _integers([2**31 + 5, 0, 2**33, 1])
    assert _starts(counts).tolist() == [0, 2**31 + 5, 2**31 + 5, 2**31 + 5 + 2**33, 2**31 + 6 + 2**33]
