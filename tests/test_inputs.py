"""Scope `inputs`: the projection against float64, shards that cut rows, outputs that do not change."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ogpsa import Subspace
from llamafactory_ogpsa.geometry import leading_directions
from llamafactory_ogpsa.inputs import InputSubspace, Protected
from llamafactory_ogpsa.inputs.segments import split_piece
from llamafactory_ogpsa.kernels.rows import squared_norm


SHAPES = {"wide": (5, 12), "tall": (40, 6), "gain": (7,), "experts": (4, 3, 9), "conv": (4, 3, 2, 2)}


def random_gradients(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def oracle(references, gradient, rank):
    """Remove from the rows of a gradient the leading right singular vectors of unit references, in float64."""
    width = gradient[0].numel() if gradient.dim() == 4 else gradient.shape[-1]
    rows = torch.cat([(r.double() / r.double().norm()).reshape(-1, width) for r in references])
    basis = torch.linalg.svd(rows, full_matrices=False)[2][:rank]
    flat = gradient.double().reshape(-1, width)
    return (flat - flat @ basis.T @ basis).reshape(gradient.shape)


def test_a_gradient_that_is_not_contiguous_is_projected_in_place():
    references = [random_gradients(seed, shapes={"wide": (5, 12)}) for seed in (1, 2)]
    subspace = Subspace.from_gradients(references, scope="inputs", rank=3)
    dense = random_gradients(3, shapes={"wide": (5, 12)})
    strided = {"wide": dense["wide"].T.contiguous().T}
    subspace.project_(dense)
    stats = subspace.project_(strided)
    assert torch.equal(strided["wide"], dense["wide"])
    assert stats.residual < 1e-6


def test_without_a_rank_at_most_half_of_the_inputs_are_kept():
    references = [random_gradients(seed, shapes={"square": (64, 64)}) for seed in (1, 2)]
    stats = Subspace.from_gradients(references, scope="inputs").project_(
        random_gradients(3, shapes={"square": (64, 64)})
    )
    assert stats.removed == pytest.approx(math.sqrt(0.5), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_projection_equals_the_float64_formula(dtype, kernel, rank):
    if kernel == "triton" and not torch.cuda.is_available():
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    move = lambda gradients: {name: tensor.to(device) for name, tensor in gradients.items()}
    references = [move(random_gradients(seed)) for seed in (1, 2)]
    gradients = move(random_gradients(3, dtype))
    before = {name: value.clone() for name, value in gradients.items()}
    stats = Subspace.from_gradients(references, scope="inputs", rank=rank).project_(gradients, kernel=kernel)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    removed = total = 0.0
    for name in ("wide", "tall", "experts", "conv"):
        expected = oracle([reference[name].cpu() for reference in references], before[name].cpu(), rank)
        torch.testing.assert_close(gradients[name].cpu().double(), expected, rtol=tolerance, atol=tolerance)
        removed += (before[name].cpu().double() - expected).square().sum().item()
    removed += before["gain"].double().square().sum().item()
    total = sum(value.double().square().sum().item() for value in before.values())
    assert not gradients["gain"].any()
    assert stats.removed == pytest.approx(math.sqrt(removed / total), rel=1e-4)
    assert stats.norm == pytest.approx(math.sqrt(total - removed), rel=1e-4)
    assert stats.residual < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_outputs_for_inputs_in_the_span_do_not_change_over_many_steps(momentum):
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 5, bias=False)
    reference = torch.randn(3, 12)
    names = ["weight"]
    protected = [Protected(leading_directions(reference, 12))]
    project = InputSubspace(names, protected, [layer.weight.numel()], torch.device("cpu")).projection()
    inside, outside = torch.randn(8, 3) @ reference, torch.randn(8, 12)
    before, other = layer(inside).detach(), layer(outside).detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05 * (1 - momentum), momentum=momentum)
    for _ in range(50):
        optimizer.zero_grad()
        (layer(outside) - 3).square().mean().backward()
        project([layer.weight.grad])
        optimizer.step()
    assert (layer(inside) - before).norm() <= 1e-6 * before.norm()
    assert (layer(outside) - other).abs().max() > 0.1


def test_monitor_changes_nothing_and_measures_the_same():
    references, gradients = [random_gradients(1)], random_gradients(3)
    subspace = Subspace.from_gradients(references, scope="inputs", rank=2)
    before = {name: value.clone() for name, value in gradients.items()}
    watched = subspace.project_(gradients, method="monitor")
    assert all(torch.equal(before[name], gradients[name]) for name in SHAPES)
    assert watched.removed == pytest.approx(subspace.project_(gradients).removed, rel=1e-6)
    assert watched.norm == pytest.approx(math.sqrt(sum(v.square().sum().item() for v in before.values())), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_as_it_is(bad):
    gradients = random_gradients(3)
    gradients["wide"][1, 1] = bad
    before = {name: value.clone() for name, value in gradients.items()}
    stats = Subspace.from_gradients([random_gradients(1)], scope="inputs", rank=2).project_(gradients)
    assert not stats.finite
    for name, value in before.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_not_finite_is_clipped_as_in_stock_training():
    """Stock training multiplies every tensor by a factor that is 0 or NaN; tensors without a basis are no exception."""
    gradients = random_gradients(3)
    gradients["wide"][1, 1] = float("inf")
    parameters = [torch.nn.Parameter(torch.zeros_like(value)) for value in gradients.values()]
    for param, value in zip(parameters, gradients.values(), strict=True):
        param.grad = value.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    subspace = Subspace.from_gradients([random_gradients(1)], scope="inputs", rank=2)
    stats = subspace.projection()(list(gradients.values()), max_norm=1.0)
    assert not stats.finite
    for param, value in zip(parameters, gradients.values(), strict=True):
        torch.testing.assert_close(value, param.grad, rtol=0, atol=0, equal_nan=True)


def test_the_norm_of_a_long_vector_is_exact():
    """torch's own float32 norm of so many numbers is too small by 0.3 % on the CPU."""
    vector = torch.full((1 << 22,), 1e-2)
    assert squared_norm(vector).sqrt().item() == pytest.approx(vector.double().norm().item(), rel=1e-6)
    for size in (0, 1, 1023, 1025):
        part = torch.randn(size)
        assert squared_norm(part).item() == pytest.approx(part.double().square().sum().item(), rel=1e-5)


def test_what_scope_inputs_does_not_do_is_refused():
    subspace = Subspace.from_gradients([random_gradients(1)], scope="inputs", rank=2)
    with pytest.raises(ValueError, match="`method` is 'conflict'; allowed with scope inputs: orthogonal, monitor"):
        subspace.project_(random_gradients(2), method="conflict")
    with pytest.raises(ValueError, match="lacks tall"):
        subspace.project_({name: value for name, value in random_gradients(2).items() if name != "tall"})
    with pytest.raises(ValueError, match="`rank` is 5000; allowed: an integer from 1 to 4096"):
        Subspace.from_gradients([random_gradients(1)], scope="inputs", rank=5000)


@given(width=st.integers(1, 9), rows=st.integers(1, 9), data=st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_of_a_matrix_are_split_into_rows_and_parts_of_rows(width, rows, data):
    """Cut anywhere, the segments of all pieces give every element back once, in its row and column."""
    bounds = sorted(data.draw(st.lists(st.integers(0, width * rows), max_size=4)))
    bounds = [0, *bounds, width * rows]
    cuts = {(0, row): row for row in range(rows)}
    seen = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        for part in split_piece(0, width, start, stop - start, cuts):
            assert (part.stop - part.start) == (part.rows * width if part.cut is None else part.stop - part.start)
            first = start + part.start
            assert part.column == first % width
            if part.cut is not None:
                assert first // width == part.cut == (start + part.stop - 1) // width
            seen += range(first, start + part.stop)
    assert seen == list(range(width * rows))


def test_tokens_that_reference_samples_use_keep_their_embedding():
    tokens = torch.tensor([True, False, True, False])
    subspace = InputSubspace(["embedding"], [Protected(width=3, tokens=tokens)], [12], torch.device("cpu"))
    gradient = torch.ones(4, 3)
    stats = subspace.projection()([gradient], measure=True)
    assert gradient.sum(1).tolist() == [0, 3, 0, 3]
    assert stats.removed == pytest.approx(math.sqrt(0.5))
    assert subspace.find_covered() == [True]


def test_directions_of_dependent_rows_are_as_many_as_there_are():
    rows = torch.randn(2, 6).repeat(4, 1)
    directions = leading_directions(rows, 5)
    assert directions.shape == (2, 6)
    torch.testing.assert_close(directions @ directions.T, torch.eye(2), atol=1e-6, rtol=0)
    assert leading_directions(torch.zeros(3, 6), 5).shape == (0, 6)
    assert leading_directions(torch.zeros(0, 6), 5).shape == (0, 6)


def test_a_tensor_without_a_reference_gradient_is_not_covered():
    reference = {"seen": torch.randn(4, 6), "unseen": torch.zeros(4, 6), "bias": torch.zeros(4)}
    subspace = Subspace.from_gradients([reference], scope="inputs", rank=2)
    assert subspace.find_covered() == [True, False, False]
    gradients = {name: torch.randn_like(tensor) for name, tensor in reference.items()}
    before = {name: tensor.clone() for name, tensor in gradients.items()}
    subspace.project_(gradients)
    assert not torch.equal(gradients["seen"], before["seen"])
    assert all(torch.equal(gradients[name], before[name]) for name in ("unseen", "bias"))


def test_a_subspace_that_is_saved_projects_as_before(tmp_path):
    subspace = Subspace.from_gradients([random_gradients(1), random_gradients(2)], scope="inputs", rank=3)
    subspace.save(str(tmp_path / "inputs.safetensors"))
    gradients, again = random_gradients(3), random_gradients(3)
    subspace.project_(gradients)
    Subspace.load(str(tmp_path / "inputs.safetensors")).project_(again)
    assert all(torch.equal(gradients[name], again[name]) for name in SHAPES)


def test_a_damaged_file_is_named_once(tmp_path):
    path = tmp_path / "inputs.safetensors"
    Subspace.from_gradients([random_gradients(1)], scope="inputs", rank=3).save(str(path))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} has other numbers in") as caught:
        Subspace.load(str(path))
    assert str(caught.value).count(str(path)) == 1
