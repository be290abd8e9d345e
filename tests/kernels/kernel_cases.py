"""Random cases, and what the kernels should make of them, in float64."""

import os
import sys

import pytest
import torch
from hypothesis import strategies as st

from llamafactory_ogpsa.kernels import make_plan


# Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before triton is imported.
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise ImportError("something imported triton before these tests: set TRITON_INTERPRET=1 for this run.")

    os.environ["TRITON_INTERPRET"] = "1"

from llamafactory_ogpsa.kernels.triton_kernels import INTERPRETED as KERNELS_INTERPRETED


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The relative distance that one rounding may leave. The interpreter rounds float32 to bfloat16 towards zero.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TRUNCATION = {**ROUNDING, torch.bfloat16: 2.0**-7}

gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
interpreted = pytest.mark.skipif(not KERNELS_INTERPRETED, reason="the kernels are compiled")
IMPLEMENTATIONS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("triton", "cpu"), id="triton-interpreted", marks=interpreted),
    pytest.param(("torch", "cuda"), id="torch-gpu", marks=gpu),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=gpu),
]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LAYOUTS = ("plain", "unaligned", "transposed", "none")


class Case:
    """A set of gradients with an orthonormal basis per group.

    Args:
        numels: elements of each tensor.
        groups: the group of each tensor.
        rank: of the basis.
        basis_dtype: what the basis is rounded to.
        dtypes: of the gradients.
        layouts: of the gradients, from LAYOUTS.
        size: the largest gradient element is about this.
        device: where all of it lies.
        seed: of the random numbers.
    """

    def __init__(
        self,
        numels,
        groups,
        rank,
        basis_dtype=torch.float32,
        dtypes=None,
        layouts=None,
        size=1.0,
        device="cpu",
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        count = len(numels)
        self.groups, self.rank, self.num_groups = groups, rank, max(groups) + 1
        self.basis = orthonormal(numels, groups, rank, generator)
        self.basis = [b.to(basis_dtype).to(device) for b in self.basis]
        self.gradients = []
        for numel, dtype, layout in zip(numels, dtypes or [torch.float32] * count, layouts or ["plain"] * count):
            values = (torch.randn(numel, generator=generator) * size).to(dtype).to(device)
            self.gradients.append(lay_out(values, layout))
        self.before = self.copies()

    def plan(self, kernel):
        return make_plan(self.basis, self.groups, self.num_groups, kernel=kernel)

    def copies(self):
        return [None if g is None else g.clone() for g in self.gradients]

    def inverse_gram(self):
        """Invert each group's Gram matrix, with zeros for directions that the group lacks."""
        inverse = torch.zeros(self.num_groups, self.rank, self.rank, dtype=torch.float64)
        for k in range(self.num_groups):
            rows = [b.double().cpu() for b, group in zip(self.basis, self.groups) if group == k]
            if rows:
                stacked = torch.cat(rows, 1)
                inverse[k] = torch.linalg.pinv(stacked @ stacked.T, atol=0.1, hermitian=True)

        return inverse.float().to(self.basis[0].device)

    def coefficients(self):
        """Return the float64 c and sq of the gradients as they were made, and the scale of c's rounding error."""
        c = torch.zeros(self.num_groups, self.rank, dtype=torch.float64)
        sq, basis_sq = torch.zeros(self.num_groups, dtype=torch.float64), torch.zeros_like(c)
        for b, g, k in zip(self.basis, self.before, self.groups):
            basis_sq[k] += b.double().cpu().square().sum(1)
            if g is not None:
                flat = g.double().cpu().reshape(-1)
                c[k] += b.double().cpu() @ flat
                sq[k] += flat.square().sum()

        return c, sq, (basis_sq * sq[:, None]).sqrt()

    def moved(self, delta, scale=1.0):
        """Return the float64 gradients ``scale * (g + B^T delta)``."""
        delta = delta.double().cpu()
        return [
            None if g is None else scale * (g.double().cpu() + (delta[k] @ b.double().cpu()).view(g.shape))
            for b, g, k in zip(self.basis, self.before, self.groups)
        ]

    def orthogonal_delta(self):
        """Return the float64 Δ of the orthogonal projection."""
        c, _, _ = self.coefficients()
        return -(self.inverse_gram().double().cpu() @ c[:, :, None])[:, :, 0]

    def projected_norm(self):
        """Return the float64 norm after the orthogonal projection."""
        # In it a missing gradient is one of zeros, which the projection moves.
        present = self.before
        self.before = [torch.zeros(b.shape[1]) if g is None else g for b, g in zip(self.basis, present)]
        norm = float(sum(g.square().sum() for g in self.moved(self.orthogonal_delta()))) ** 0.5
        self.before = present
        return norm

    def projected(self, max_norm=None):
        """Return the float64 gradients after the orthogonal projection and clipping."""
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (self.projected_norm() + 1e-6))
        return self.moved(self.orthogonal_delta(), scale)


def orthonormal(numels, groups, rank, generator):
    """Return float32 bases, orthonormal within each group, with rows of zeros where a group is too small."""
    basis = [torch.zeros(rank, numel) for numel in numels]
    for k in set(groups):
        members = [i for i, group in enumerate(groups) if group == k]
        total = sum(numels[i] for i in members)
        if total > 0:
            q = torch.linalg.qr(torch.randn(total, min(rank, total), dtype=torch.float64, generator=generator))[0]
            for i, part in zip(members, q.T.float().split([numels[i] for i in members], 1)):
                basis[i][: part.shape[0]] = part

    return basis


def lay_out(values, layout):
    """Return a tensor of these values that lies in memory as asked."""
    if layout == "none":
        return None

    if layout == "unaligned":
        return torch.cat([values.new_zeros(1), values])[1:]

    if layout == "transposed":
        rows = next((r for r in (7, 5, 3, 2) if values.numel() % r == 0), 1)
        return values.view(rows, -1).t().contiguous().t()

    return values


def assert_close(actual, expected, before, kernel, slack=4e-7):
    """Check gradients against float64 ones: within a rounding to their dtype of what float32 arithmetic gives."""
    for a, e, b in zip(actual, expected, before, strict=True):
        if e is None:
            assert a is None
            continue
        rounding = (TRUNCATION if kernel == "triton" and KERNELS_INTERPRETED else ROUNDING)[a.dtype]
        tiny = torch.finfo(a.dtype).smallest_normal
        largest = b.double().cpu().abs().max() if b.numel() else 0.0
        bound = rounding * e.abs() + slack * (b.double().cpu().abs() + largest) + tiny
        assert a.shape == e.shape
        assert ((a.double().cpu() - e).abs() <= bound).all()


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            integers = torch.int32 if a.dtype == torch.float32 else torch.int16
            assert torch.equal(a.contiguous().view(integers), e.contiguous().view(integers))


@st.composite
def cases(draw, max_numel=600):
    """Draw a case of up to four tensors, of whatever can occur."""
    count = draw(st.integers(1, 4))
    pick = lambda values: draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
    sizes = st.one_of(st.sampled_from([0, 1, 8, 512]), st.integers(0, max_numel))
    scope = draw(st.sampled_from(["parameter", "global", "any"]))
    groups = {"parameter": list(range(count)), "global": [0] * count, "any": pick([0, 1, 2, 5])}[scope]
    return dict(
        numels=draw(st.lists(sizes, min_size=count, max_size=count)),
        groups=groups,
        rank=draw(st.one_of(st.integers(1, 9), st.integers(1, 32))),
        basis_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        dtypes=pick(DTYPES),
        layouts=pick(LAYOUTS),
        size=draw(st.sampled_from([1e-4, 1.0, 100.0])),
        seed=draw(st.integers(0, 1000)),
    )
