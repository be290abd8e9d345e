"""Coefficients to the applied gradient: the three moves that every rule of this project is made of.

1. coefficients `c = Uᵀg` (and `‖g‖²` in the same read of the gradient);
2. a policy on those few numbers: `Δ = policy(c)`;
3. `g ← s (g + UΔ)`, where `‖g + UΔ‖² = ‖g‖² + 2 c·Δ + ‖Δ‖²` gives the clipping factor `s` without a further read.

Where every process holds a piece of the gradient, the coefficients are summed over the processes between the first
move and the second: the only communication of a step.

Nothing here waits for the device; only reading a figure of `ProjectionStats` does. The few numbers are float64: that
costs nothing, and keeps TF32 out of them where a run allows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch

from .engines.processes import ALONE, Processes
from .geometry import Geometry, ratio
from .kernels import Plan


METHODS = ("orthogonal", "conflict", "monitor")

# Up to this many reference gradients, all faces of their dual cone are tried at once, which is exact.
_MOST_FACES = 6
# Beyond it: steps of an active-set method for each reference gradient; it typically takes one to two.
_ACTIVE_SET_STEPS = 6
# A group that kept less than this share of its norm has no direction left worth the name: what is there is rounding.
_RESIDUAL_FLOOR = 1e-3

Policy = Callable[[torch.Tensor], torch.Tensor]
Projection = Callable[..., "ProjectionStats"]


@dataclass(frozen=True)
class ProjectionStats:
    """What one projection measured, on the gradient's device; a figure is worked out when it is read.

    Attributes:
        norm_tensor: `‖g̃‖` of all groups before clipping, what `clip_grad_norm_` would return; float32, 0-dim. Where a
            tensor has no gradient and nothing measures, it is counted as if a gradient of zeros had been projected.
        residual_tensor: see `residual`; None where it was not measured, which takes one more read of the gradient.
        squared_norms: `‖g‖²` of each group, float32 `[groups]`.
        products: `B g` with the basis as stored, float32 `[groups, rank]`.
        policy_delta: the `Δ` that a policy chose, float64 `[groups, rank]`; None where the kernels chose `-c`, or nothing was applied.
        geometry: that of the basis.
    """

    norm_tensor: torch.Tensor
    residual_tensor: torch.Tensor | None
    squared_norms: torch.Tensor
    products: torch.Tensor
    policy_delta: torch.Tensor | None
    geometry: Geometry

    has_cosines = True

    @property
    def finite_tensor(self) -> torch.Tensor:
        """False where the gradient held inf or NaN and was left as it was; bool, 0-dim."""
        return self.norm_tensor.isfinite()

    @cached_property
    def coefficients(self) -> torch.Tensor:
        """`c = Uᵀg`, float64 `[groups, rank]`."""
        return _whiten(self.geometry, self.products)

    @cached_property
    def delta(self) -> torch.Tensor:
        """`Δ`, float64 `[groups, rank]`; for `monitor` that of `orthogonal`, which was not applied."""
        if self.policy_delta is not None:
            return self.policy_delta
        return torch.where(self.finite_tensor, -self.coefficients, 0.0)

    @property
    def norm(self) -> float:
        """`‖g̃‖`, before clipping."""
        return self.norm_tensor.item()

    @property
    def removed(self) -> float:
        """`‖g − g̃‖ / ‖g‖`, from 0 to 1; for `monitor` what `orthogonal` would have removed."""
        return ratio(self.delta.square().sum().sqrt(), self.squared_norms.sum().sqrt()).item()

    @property
    def finite(self) -> bool:
        """False where the gradient held inf or NaN and was left as it was."""
        return bool(self.finite_tensor.item())

    @property
    def cosines(self) -> list[float]:
        """The cosine of the gradient with the gradient of each reference set, before the projection."""
        return self._cosines(self.coefficients, self.squared_norms.sum().sqrt())

    @property
    def projected_cosines(self) -> list[float]:
        """The same after the projection: 0 for `orthogonal` with a full rank, for `monitor` what it would be."""
        coefficients = self.coefficients + self.delta
        change = (coefficients.square() - self.coefficients.square()).sum()
        return self._cosines(coefficients, (self.squared_norms.sum() + change).clamp(min=0).sqrt())

    def _cosines(self, coefficients: torch.Tensor, norm: torch.Tensor) -> list[float]:
        geometry = self.geometry
        overlap = torch.einsum("gnr,gr,gn->n", geometry.references, coefficients, geometry.shares)
        return ratio(overlap, norm).tolist()

    @property
    def residual(self) -> float | None:
        """The largest |cos| left between the gradient and a basis direction of its group; None if not measured."""
        return None if self.residual_tensor is None else self.residual_tensor.item()


def conflict_policy(references: torch.Tensor) -> Policy:
    r"""Make the policy `conflict`: the least change after which no reference loss rises to first order.

    `min ‖Δ‖² subject to a_d·(c + Δ) ≥ 0 for every d`: the constraint of GEM (Lopez-Paz and Ranzato, 2017, eq. 11),
    written in the coordinates of the subspace. Its dual is `min_{μ ≥ 0} ½ μᵀAAᵀμ + μᵀAc`, with `Δ = Aᵀμ`. With few
    reference gradients the solution is found by trying every face of the cone, whose matrices are made here, once a
    refresh; with many by an active-set method on the dual (Lawson and Hanson, 1974).

    Args:
        references: float64 `[groups, n, rank]`, unit reference gradients in orthonormal coordinates.

    Returns:
        the policy, from coefficients float64 `[groups, rank]` to `Δ` of the same shape.
    """
    normals, n = references, references.shape[1]
    if n > _MOST_FACES:
        return lambda c: _active_set(normals, c)

    masks = torch.tensor(list(product((0.0, 1.0), repeat=n)), dtype=torch.float64, device=normals.device)
    active = masks[None, :, :, None] * normals[:, None]  # [groups, faces, n, rank]
    multipliers = -torch.linalg.pinv(active @ active.mT, hermitian=True) @ active  # μ of each face is this times c

    def policy(c: torch.Tensor) -> torch.Tensor:
        mu = torch.einsum("gfnr,gr->gfn", multipliers, c)
        candidates = c[:, None] + torch.einsum("gfnr,gfn->gfr", active, mu)
        slack = torch.einsum("gnr,gfr->gfn", normals, candidates)
        # The optimum is the one face with μ ≥ 0 and no constraint broken; rounding decides between equals.
        violation = (-slack).clamp(min=0).amax(-1) + (-mu).clamp(min=0).amax(-1)
        best = violation.argmin(1)[:, None, None].expand(-1, 1, c.shape[1])
        return candidates.gather(1, best)[:, 0] - c

    return policy


def _active_set(normals: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Solve the dual of `conflict_policy` for all groups at once, without a host synchronisation.

    Lawson and Hanson's method with its two loops made one: in every step a group either moves to the optimum on its
    active constraints and takes the most violated one in, or, where that would make a multiplier negative, goes only
    as far as the first zero and drops that constraint. A group that is done stays where it is.

    Args:
        normals: float64 `[groups, n, rank]`.
        c: float64 `[groups, rank]`.

    Returns:
        `Δ`, float64 `[groups, rank]`.
    """
    gram, n = normals @ normals.mT, normals.shape[1]
    offset = torch.einsum("gnr,gr->gn", normals, c)
    tolerance = 1e-12 * (1 + c.norm(dim=1, keepdim=True))
    mu, active = torch.zeros_like(offset), torch.zeros_like(offset, dtype=torch.bool)
    for _ in range(_ACTIVE_SET_STEPS * n):
        block = gram * active[:, :, None] * active[:, None, :] + torch.diag_embed((~active).double())
        solution = torch.linalg.solve_ex(block, -offset * active)[0]
        blocked = active & (solution <= 0)
        stuck = blocked.any(1, keepdim=True)

        lengths = torch.where(blocked, mu / (mu - solution), torch.full_like(mu, torch.inf))
        length = lengths.amin(1, keepdim=True).clamp(max=1.0)
        mu = torch.where(stuck, mu + length * (solution - mu), solution) * active
        dropped = stuck & (lengths <= length)
        mu = mu.masked_fill(dropped, 0.0)

        violation = (-offset - torch.einsum("gnm,gm->gn", gram, mu)).masked_fill(active, -torch.inf)
        worst = violation.amax(1, keepdim=True)
        taken = ~stuck & (violation == worst) & (worst > tolerance)
        first = torch.zeros_like(active).scatter(1, taken.long().argmax(1, keepdim=True), True)
        active = (active & ~dropped) | (taken & first)
    return torch.einsum("gnr,gn->gr", normals, mu)


def make_projection(plan: Plan, geometry: Geometry, method: str, processes: Processes = ALONE) -> Projection:
    """Bind a method to a basis: make the function that projects gradients in place.

    Args:
        plan: the kernels over the stored basis `B`.
        geometry: the basis's geometry, on the gradients' device.
        method: one of `METHODS`.
        processes: those that gradients and basis may be split over.

    Returns:
        `project(gradients, max_norm=None, measure=False) -> ProjectionStats`. `gradients`: one tensor (or None) for
        each tensor of the basis, changed in place. `max_norm`: clip the projected gradient to this norm, by the rule
        of `torch.nn.utils.clip_grad_norm_`, in the same write. `measure`: also measure the residual, at the price of
        one more read (and one more sum over the processes). A gradient that is not finite anywhere is not projected
        at all.
    """
    whitening = geometry.whitening
    inverse_gram = (whitening.mT @ whitening).float()
    conflict = conflict_policy(geometry.references) if method == "conflict" else None
    fused = method == "orthogonal" and not processes.sharded

    @torch.no_grad()
    def project(
        gradients: Sequence[torch.Tensor | None], max_norm: float | None = None, measure: bool = False
    ) -> ProjectionStats:
        delta = None
        if fused:
            products, squared_norms, norm = plan.orthogonal_(gradients, inverse_gram, max_norm)
        else:
            products, squared_norms = _coefficients(plan, gradients, processes)
            norm = squared_norms.sum().sqrt()
        if method != "monitor" and not fused:
            c, finite = _whiten(geometry, products), norm.isfinite()
            delta = torch.where(finite, conflict(c) if conflict is not None else -c, 0.0)
            left = (squared_norms + 2 * (c * delta).sum(1) + delta.square().sum(1)).clamp(min=0).sum().sqrt()
            norm = torch.where(finite, left.float(), norm)
            scale = _clipping_factor(norm, max_norm)
            plan.apply_(gradients, torch.einsum("gij,gi->gj", whitening, delta).float(), scale)

        residual = None
        if measure:
            norms, scale = squared_norms.sqrt(), None if method == "monitor" else _clipping_factor(norm, max_norm)
            norms = norms if scale is None else scale * norms
            residual, left = _residual(plan, gradients, processes, geometry, norms)
            if max_norm is None and any(gradient is None for gradient in gradients):
                norm = left
        return ProjectionStats(norm, residual, squared_norms, products, delta, geometry)

    return project


def _whiten(geometry: Geometry, products: torch.Tensor) -> torch.Tensor:
    """Turn products with the basis as stored into coefficients in orthonormal coordinates, float64."""
    return torch.einsum("gij,gj->gi", geometry.whitening, products.double())


def _clipping_factor(norm: torch.Tensor, max_norm: float | None) -> torch.Tensor | None:
    """Return the factor of `torch.nn.utils.clip_grad_norm_`, None where nothing is clipped."""
    return None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _coefficients(
    plan: Plan, gradients: Sequence[torch.Tensor | None], processes: Processes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure the gradients, summed over the processes where each holds a piece; see `Plan.coefficients`."""
    products, squared_norms = plan.coefficients(gradients)
    if not processes.sharded:
        return products, squared_norms
    total = processes.sum_pieces(torch.cat([products, squared_norms[:, None]], dim=1))
    return total[:, :-1], total[:, -1]


def _residual(
    plan: Plan,
    gradients: Sequence[torch.Tensor | None],
    processes: Processes,
    geometry: Geometry,
    norms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure the largest |cos| between what the gradients now are and a basis direction, and their norm.

    Args:
        plan: the kernels over the basis.
        gradients: the gradients after the projection.
        processes: those that they may be split over.
        geometry: that of the basis.
        norms: `[groups]`, their norms before it, times the clipping factor.

    Returns:
        the cosine, 0-dim; a group of which less than `_RESIDUAL_FLOOR` is left is measured against that floor. And
        the norm of all groups, 0-dim.
    """
    products, left = _coefficients(plan, gradients, processes)
    coefficients = _whiten(geometry, products).abs().amax(1)
    cosines = ratio(coefficients, torch.maximum(left.sqrt(), _RESIDUAL_FLOOR * norms))
    return cosines.max(), left.sum().sqrt()
