"""The maths, against float64 oracles: basis, policies, figures."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch.utils._python_dispatch import TorchDispatchMode

from llamafactory_ogpsa import Subspace
from llamafactory_ogpsa.geometry import gram_matrices
from llamafactory_ogpsa.kernels.policy import conflict_policy


SHAPES = {"a": (5, 7), "b": (11,), "c": (3, 4, 2), "d": (1,)}


def random_gradients(seed, dtype=torch.float32, shapes=SHAPES, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in shapes.items()
    }


def flat(gradients, names):
    return torch.cat([gradients[name].double().flatten() for name in names])


def groups_of(scope):
    return [[name] for name in SHAPES] if scope == "parameter" else [list(SHAPES)]


def oracle_basis(references, names, rank=None):
    """The span of unit reference gradients, its leading directions, by SVD in float64."""
    matrix = torch.stack([flat(reference, names) for reference in references])
    matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-300)
    _, singular, rows = torch.linalg.svd(matrix, full_matrices=False)
    return rows[singular > 1e-4 * singular[0]][:rank]


@pytest.mark.parametrize("scope", ["parameter", "global"])
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    rank=st.none() | st.integers(1, 6),
    exponent=st.integers(-6, 6),
)
@settings(max_examples=40, deadline=None)
def test_orthogonal_equals_the_float64_projection(scope, seed, count, rank, exponent):
    references = [random_gradients(seed + 1 + i, scale=10.0 ** (exponent * (-1) ** i)) for i in range(count)]
    gradients = random_gradients(seed)
    expected, squared_removed = {}, 0.0
    for names in groups_of(scope):
        basis, g = oracle_basis(references, names, rank), flat(gradients, names)
        removed = basis.T @ (basis @ g)
        squared_removed += removed.square().sum().item()
        expected[tuple(names)] = g - removed

    norm = flat(gradients, list(SHAPES)).norm().item()
    stats = Subspace.from_gradients(references, scope=scope, rank=rank).project_(gradients)
    for names, value in expected.items():
        torch.testing.assert_close(flat(gradients, names), value, rtol=0, atol=2e-5 * norm)
    assert stats.finite
    assert stats.removed == pytest.approx(math.sqrt(squared_removed) / norm, abs=1e-5)
    left = math.sqrt(sum(value.square().sum().item() for value in expected.values()))
    assert stats.norm == pytest.approx(left, abs=1e-4 * norm)
    assert stats.residual <= 1e-3  # the one-element tensor keeps rounding only, measured against the floor


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_residual_is_rounding_in_float32_and_small_in_bfloat16(scope):
    shapes = {"a": (200, 300), "b": (4000,)}
    for dtype, bound in [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)]:
        references = [random_gradients(i, dtype, shapes) for i in range(3)]
        gradients = random_gradients(9, dtype, shapes)
        with_reference = {name: 3 * references[1][name] + value for name, value in gradients.items()}
        stats = Subspace.from_gradients(references, scope=scope).project_(with_reference)
        assert 0.9 < stats.removed < 1
        assert stats.residual <= bound


@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("method", ["orthogonal", "conflict", "monitor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_reference_gradients(scope, method, dtype):
    first, zero = random_gradients(1), {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tiny = {name: 1e-30 * value for name, value in random_gradients(2).items()}
    huge = {name: 1e30 * value for name, value in random_gradients(3).items()}
    untouched = {**random_gradients(4), "b": None}
    for references, rank in [
        ([first, first], 1),
        ([first, {name: -2 * value for name, value in first.items()}], 1),
        ([first, zero], 1),
        ([zero, zero], 0),
        ([tiny, huge], 2),
        ([first, untouched], 2),
    ]:
        references = [
            {name: None if value is None else value.to(dtype) for name, value in reference.items()}
            for reference in references
        ]
        subspace = Subspace.from_gradients(references, scope=scope)
        gradients = random_gradients(7, dtype)
        before = {name: value.clone() for name, value in gradients.items()}
        stats = subspace.project_(gradients, method=method)
        assert subspace.rank == rank
        assert all(value.isfinite().all() for value in gradients.values())
        assert math.isfinite(stats.norm)
        assert 0 <= stats.removed <= 1 + 1e-6
        assert all(math.isfinite(cosine) and abs(cosine) <= 1 + 1e-6 for cosine in stats.cosines)
        if rank == 0:
            assert stats.removed == 0
            assert all(torch.equal(before[name], gradients[name]) for name in gradients)


def test_a_gradient_inside_the_subspace_becomes_zero():
    references = [random_gradients(1), random_gradients(2)]
    gradients = {name: 2 * references[0][name] - references[1][name] for name in SHAPES}
    stats = Subspace.from_gradients(references, scope="global").project_(gradients)
    assert stats.removed == pytest.approx(1, abs=1e-6)
    assert flat(gradients, list(SHAPES)).norm() < 1e-5
    assert stats.residual < 1e-3


def test_methods_agree_where_they_must():
    references = [random_gradients(1), random_gradients(2)]
    subspace = Subspace.from_gradients(references, scope="global")
    helpful, opposed = flat(references[0], SHAPES), flat(references[1], SHAPES)

    monitored = random_gradients(5)
    before = {name: value.clone() for name, value in monitored.items()}
    watched = subspace.project_(monitored, method="monitor")
    assert all(torch.equal(before[name], monitored[name]) for name in SHAPES)
    projected = random_gradients(5)
    assert subspace.project_(projected).removed == pytest.approx(watched.removed, rel=1e-6)
    g = flat(before, SHAPES)
    cosines = [(g @ r / g.norm() / r.norm()).item() for r in (helpful, opposed)]
    assert watched.cosines == pytest.approx(cosines, abs=1e-6)

    agreeing = {name: references[0][name] + references[1][name] for name in SHAPES}
    assert subspace.project_(agreeing, method="conflict").removed == 0


@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_cosines_are_those_of_the_gradient_before_and_after(method, scope):
    references = [random_gradients(1), random_gradients(2)]
    gradients = random_gradients(5)
    before = flat(gradients, SHAPES)
    stats = Subspace.from_gradients(references, scope=scope).project_(gradients, method=method)
    after = flat(gradients, SHAPES)
    for reference, cosine, projected in zip(references, stats.cosines, stats.projected_cosines, strict=True):
        r = flat(reference, SHAPES)
        assert cosine == pytest.approx((before @ r / before.norm() / r.norm()).item(), abs=1e-6)
        assert projected == pytest.approx((after @ r / after.norm() / r.norm()).item(), abs=1e-6)
    if method == "conflict":
        assert max(stats.projected_cosines) > 1e-3  # the seed has a set that the gradient agrees with


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["orthogonal", "conflict", "monitor"])
def test_a_gradient_that_is_not_finite_is_left_as_it_is(bad, method):
    gradients = random_gradients(3)
    gradients["b"][4] = bad
    before = {name: value.clone() for name, value in gradients.items()}
    stats = Subspace.from_gradients([random_gradients(1), random_gradients(2)]).project_(gradients, method=method)
    assert not stats.finite
    for name, value in before.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("widths", [(1,), (15, 16), (17, 0, 100)])
def test_gram_matrices_of_rows_in_several_chunks_and_slices(monkeypatch, widths):
    monkeypatch.setattr("llamafactory_ogpsa.geometry._CHUNK", 3 * 40)
    monkeypatch.setattr("llamafactory_ogpsa.geometry._SLICE", 16)
    rows = [torch.randn(3, width, generator=torch.Generator().manual_seed(width)) for width in widths]
    whole = torch.cat(rows, dim=1).double()
    gram = gram_matrices(rows, [0] * len(rows), torch.device("cpu"))
    torch.testing.assert_close(gram[0], whole @ whole.T, rtol=1e-13, atol=1e-13)


def test_reference_gradients_that_are_not_finite_are_refused():
    broken = random_gradients(1)
    broken["a"][0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"`gradients\[1\]` is not finite, the first time in a"):
        Subspace.from_gradients([random_gradients(2), broken])


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    rank=st.integers(1, 8),
    duplicate=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_conflict_is_the_least_change_that_meets_the_constraints(seed, count, rank, duplicate):
    rng = np.random.default_rng(seed)
    normals = rng.standard_normal((3, count, rank))
    if duplicate:
        normals[:, -1] = normals[:, 0]
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    c = rng.standard_normal((3, rank))
    delta = conflict_policy(torch.tensor(normals))(torch.tensor(c)).numpy()
    for group in range(3):
        # The dual of the problem is a non-negative least-squares problem, which SciPy solves exactly.
        mu, _ = nnls(normals[group].T, -c[group])
        assert np.allclose(delta[group], normals[group].T @ mu, atol=1e-6)
        assert (normals[group] @ (c[group] + delta[group])).min() >= -1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradients": []}, "at least one dict"),
        ({"gradients": [{}]}, "at least one dict"),
        ({"scope": "layer"}, "`scope` is 'layer'"),
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 33}, "`rank` is 33; allowed: an integer from 1 to 32"),
        ({"gradients": [random_gradients(i) for i in range(33)]}, "span 33 directions; allowed: at most 32"),
        ({"gradients": [{"a": torch.ones(2)}, {"b": torch.ones(2)}]}, "same names.* differ in a, b"),
        ({"gradients": [{"a": None, "b": None}, {"b": None, "a": None}]}, "differ in their order"),
        ({"gradients": [{"a": torch.ones(2)}, {"a": torch.ones(3)}]}, r"different shapes for a: \[2\], \[3\]"),
        ({"gradients": [{"a": None}]}, "no tensor"),
    ],
)
def test_bad_reference_gradients_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Subspace.from_gradients(**{"gradients": [random_gradients(1)], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradients": random_gradients(1)}, "must be a list of dicts .* not dict"),
        ({"gradients": [random_gradients(1), None]}, r"`gradients\[1\]` must be a dict .* not NoneType"),
        ({"gradients": [{"a": 1.0}]}, r"`gradients\[0\]` has float for a"),
        (
            {"gradients": [{"a": torch.ones(2, dtype=torch.int64)}]},
            "torch.int64 for a; allowed: a real floating dtype",
        ),
        ({"gradients": [{"a": torch.ones(2, dtype=torch.complex64)}]}, "torch.complex64 for a"),
        ({"gradients": [{"a": torch.eye(2).to_sparse()}]}, "layout torch.sparse_coo for a"),
        ({"rank": 1.5}, "`rank` is 1.5; allowed: an integer"),
        ({"rank": "2"}, "`rank` is '2'; allowed: an integer"),
    ],
)
def test_reference_gradients_of_a_wrong_type_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        Subspace.from_gradients(**{"gradients": [random_gradients(1)], **arguments})


def test_bad_gradients_are_refused():
    subspace = Subspace.from_gradients([random_gradients(1)])
    with pytest.raises(ValueError, match="`method` is 'threshold'; allowed: orthogonal, conflict, monitor"):
        subspace.project_(random_gradients(2), method="threshold")
    with pytest.raises(ValueError, match="gradient of a has 2 elements, its reference gradient 35"):
        subspace.project_({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="none of the subspace's names: a, b, c and 1 more; it has module.a"):
        subspace.project_({"module.a": torch.ones(5, 7)})
    with pytest.raises(ValueError, match="none of the subspace's names: .*; it has none"):
        subspace.project_({})
    with pytest.raises(TypeError, match="must be a dict .* not list"):
        subspace.project_([torch.ones(5, 7)])
    with pytest.raises(TypeError, match="torch.float64 for b; allowed: float32, bfloat16 or float16"):
        subspace.project_(random_gradients(2) | {"b": torch.ones(11, dtype=torch.float64)})
    with pytest.raises(TypeError, match="layout torch.sparse_coo for a"):
        subspace.project_({"a": torch.ones(5, 7).to_sparse()})


def test_what_no_reference_gradient_touched_may_be_anything():
    subspace = Subspace.from_gradients([random_gradients(1)])
    gradients = {**random_gradients(2), "other": torch.ones(3, dtype=torch.float64)}
    assert subspace.project_(gradients).removed > 0
    assert torch.equal(gradients["other"], torch.ones(3, dtype=torch.float64))


def test_conflict_needs_a_direction_for_every_reference_gradient():
    subspace = Subspace.from_gradients([random_gradients(1), random_gradients(2)], rank=1)
    with pytest.raises(ValueError, match="`method` conflict needs .* of 2, `rank` kept 1"):
        subspace.project_(random_gradients(3), method="conflict")
    assert subspace.project_(random_gradients(3)).removed > 0


def test_a_subspace_that_was_used_can_be_pickled():
    subspace = Subspace.from_gradients([random_gradients(1), random_gradients(2)])
    gradients, again = random_gradients(3), random_gradients(3)
    subspace.project_(gradients)
    pickle.loads(pickle.dumps(subspace)).project_(again)
    assert all(torch.equal(gradients[name], again[name]) for name in SHAPES)


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_rows_that_a_rank_leaves_out_take_no_memory(scope):
    references = [random_gradients(seed) for seed in range(4)]
    subspace = Subspace.from_gradients(references, scope=scope, rank=2)
    for basis, name in zip(subspace.basis, subspace.names, strict=True):
        assert basis.untyped_storage().nbytes() == 2 * 4 * references[0][name].numel()


class Operations(TorchDispatchMode):
    """Lists the torch operations that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_an_orthogonal_step_queues_nothing_beside_its_launches(monkeypatch):
    from llamafactory_ogpsa.kernels import triton_plan

    launched = []
    monkeypatch.setattr(triton_plan, "_launch", lambda kernel, *args, **options: launched.append(kernel))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gradients, *references = ([t.to(device) for t in random_gradients(seed).values()] for seed in range(3))
    subspace = Subspace.from_gradients([dict(zip(SHAPES, tensors, strict=True)) for tensors in references])
    project = subspace.projection("orthogonal", "triton")
    project(gradients, 1.0)  # makes the table of addresses
    launched.clear()
    with Operations() as operations:
        project(gradients, 1.0)
    assert len(launched) == 3
    assert set(operations.names) <= {"empty", "empty_like", "new_empty"}
