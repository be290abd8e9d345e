"""Gradients in, projected gradients and figures out, for scopes `parameter` and `global` (`inputs` has its own file).

A group's basis is stored as rows `B`, rounded to its dtype; `Uᵀ = T B` is orthonormal (`T` is `Geometry.whitening`). A
step is

1. measure: the products `p = B g` and `‖g‖²` in one read of the gradient; with them the coefficients `c = Uᵀg = T p`;
2. reduce: if every process holds a piece of the gradient, both are summed over the processes, the only communication
   of a step;
3. policy: `Δ`, which is `-c` for `orthogonal`, and for `conflict` the least change that keeps every reference loss
   from rising; `monitor` stops here;
4. apply: `g ← s (g + UΔ)`, written `s (g + Bᵀδ)` with `δ = TᵀΔ`; `‖g + UΔ‖² = ‖g‖² + 2 c·Δ + ‖Δ‖²` gives the clipping
   factor `s` without another read.

If nothing has to be reduced, `orthogonal` is one call of the plan: with Triton three launches, with nothing between
them.

Nothing here waits for the device; only reading a figure of `ProjectionStats` does. The few numbers are float64: that
costs nothing, and keeps TF32 out of them even if a run allows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .engines.processes import ALONE, Processes
from .geometry import Geometry, ratio
from .kernels import Plan
from .kernels.policy import clipping_factor, conflict_policy, orthogonal_step


METHODS = ("orthogonal", "conflict", "monitor")

# If less than this share of a gradient is left, it is only rounding, whose direction says nothing. So a residual is
# measured against at least this share of the norm before.
RESIDUAL_FLOOR = 1e-3

Projection = Callable[..., "ProjectionStats"]


class StepFigures:
    """The figures that every scope has; a figure is worked out when it is read, which waits for the device."""

    norm_tensor: torch.Tensor
    residual_tensor: torch.Tensor | None

    @property
    def finite_tensor(self) -> torch.Tensor:
        """False if the gradient held inf or NaN and was left as it was; bool, 0-dim."""
        return self.norm_tensor.isfinite()

    @property
    def finite(self) -> bool:
        """False if the gradient held inf or NaN and was left as it was."""
        return bool(self.finite_tensor.item())

    @property
    def norm(self) -> float:
        """`‖g̃‖`, before clipping."""
        return self.norm_tensor.item()

    @property
    def residual(self) -> float | None:
        """How much of the projected gradient lies in the subspace, see `residual_tensor`; None if not measured."""
        return None if self.residual_tensor is None else self.residual_tensor.item()


@dataclass(frozen=True)
class ProjectionStats(StepFigures):
    """What one projection measured, on the gradient's device; a figure is worked out when it is read.

    Attributes:
        norm_tensor: `‖g̃‖` of all groups before clipping, what `clip_grad_norm_` would return; float32, 0-dim. If a
            tensor has no gradient and `measure` is False, a gradient of zeros counts in its place.
        residual_tensor: the largest |cos| left between the gradient and a basis direction of its group; None if it was
            not measured; to measure it takes one more read of the gradient.
        squared_norms: `‖g‖²` of each group, float32 `[groups]`.
        products: `B g` with the basis as stored, float32 `[groups, rank]`.
        policy_delta: the `Δ` of `conflict`, float64 `[groups, rank]`; None for `orthogonal`, whose `Δ` is `-c`, and
            for `monitor`.
        geometry: that of the basis.
    """

    norm_tensor: torch.Tensor
    residual_tensor: torch.Tensor | None
    squared_norms: torch.Tensor
    products: torch.Tensor
    policy_delta: torch.Tensor | None
    geometry: Geometry

    has_cosines = True

    @cached_property
    def coefficients(self) -> torch.Tensor:
        """`c = Uᵀg`, float64 `[groups, rank]`."""
        return self.geometry.coefficients(self.products)

    @cached_property
    def delta(self) -> torch.Tensor:
        """`Δ`, float64 `[groups, rank]`; for `monitor` that of `orthogonal`, which was not applied."""
        if self.policy_delta is not None:
            return self.policy_delta
        return torch.where(self.finite_tensor, -self.coefficients, 0.0)

    @property
    def removed(self) -> float:
        """`‖g − g̃‖ / ‖g‖`, from 0 to 1; for `monitor` what `orthogonal` would have removed."""
        return ratio(self.delta.square().sum().sqrt(), self.squared_norms.sum().sqrt()).item()

    @property
    def cosines(self) -> list[float]:
        """The cosine of the gradient with the gradient of each reference set, before the projection."""
        return ratio(self.geometry.overlaps(self.coefficients), self.squared_norms.sum().sqrt()).tolist()

    @property
    def projected_cosines(self) -> list[float]:
        """The same after the projection: 0 for `orthogonal` with a full rank; for `monitor` what it would be."""
        coefficients = self.coefficients + self.delta
        change = (coefficients.square() - self.coefficients.square()).sum()
        norm = (self.squared_norms.sum() + change).clamp(min=0).sqrt()
        return ratio(self.geometry.overlaps(coefficients), norm).tolist()


def make_projection(plan: Plan, geometry: Geometry, method: str, processes: Processes = ALONE) -> Projection:
    """Make the function that projects gradients in place, by a method and with a basis.

    Args:
        plan: the kernels over the stored basis `B`.
        geometry: the basis's geometry, on the gradients' device.
        method: one of `METHODS`.
        processes: those that gradients and basis may be split over.

    Returns:
        `project(gradients, max_norm=None, measure=False) -> ProjectionStats`. `gradients`: one tensor (or None) for
        each tensor of the basis, changed in place. `max_norm`: clip the projected gradient to this norm, by the rule
        of `torch.nn.utils.clip_grad_norm_`, in the same write. `measure`: also measure the residual, at the price of
        one more read (and one more sum over the processes). If any value of the gradients is not finite, they are not
        projected at all.
    """
    whitening = geometry.whitening
    inverse_gram = (whitening.mT @ whitening).float()
    conflict = conflict_policy(geometry.references) if method == "conflict" else None

    @torch.no_grad()
    def project(
        gradients: Sequence[torch.Tensor | None], max_norm: float | None = None, measure: bool = False
    ) -> ProjectionStats:
        delta = None
        if method == "orthogonal" and not processes.sharded:
            products, squared_norms, norm = plan.orthogonal_(gradients, inverse_gram, max_norm)
        else:
            products, squared_norms = _coefficients(plan, gradients, processes)
            norm = squared_norms.sum().sqrt()
            if method == "orthogonal":
                step, scale, norm = orthogonal_step(products.double(), squared_norms.double(), inverse_gram, max_norm)
                plan.apply_(gradients, step, scale)
            elif conflict is not None:
                c, finite = geometry.coefficients(products), norm.isfinite()
                delta = torch.where(finite, conflict(c), 0.0)
                left = (squared_norms + 2 * (c * delta).sum(1) + delta.square().sum(1)).clamp(min=0).sum().sqrt()
                norm = torch.where(finite, left.float(), norm)
                step = torch.einsum("gij,gi->gj", whitening, delta).float()
                plan.apply_(gradients, step, clipping_factor(norm, max_norm))

        residual = None
        if measure:
            left_products, left = _coefficients(plan, gradients, processes)
            scale = None if method == "monitor" else clipping_factor(norm, max_norm)
            floor = RESIDUAL_FLOOR * (squared_norms.sqrt() * (1 if scale is None else scale))
            largest = geometry.coefficients(left_products).abs().amax(1)
            residual = ratio(largest, torch.maximum(left.sqrt(), floor)).max()
            if max_norm is None and any(gradient is None for gradient in gradients):
                norm = left.sum().sqrt()
        return ProjectionStats(norm, residual, squared_norms, products, delta, geometry)

    return project


def _coefficients(
    plan: Plan, gradients: Sequence[torch.Tensor | None], processes: Processes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure the gradients, summed over the processes if each holds a piece; see `Plan.coefficients`."""
    products, squared_norms = plan.coefficients(gradients)
    if not processes.sharded:
        return products, squared_norms
    total = processes.sum_pieces(torch.cat([products, squared_norms[:, None]], dim=1))
    return total[:, :-1], total[:, -1]
