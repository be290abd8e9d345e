"""The policies, which choose the change from the few numbers that were measured, and the clipping factor.

`orthogonal` and the clipping factor are also in the Triton kernels, which do a whole step without coming back to
torch; tests compare the two.
"""

from collections.abc import Callable
from itertools import product

import torch


# With up to this many reference gradients, all faces of their dual cone are tried at once, which is exact.
_MOST_FACES = 6
# With more: steps of an active-set method for each reference gradient; it typically takes one to two.
_ACTIVE_SET_STEPS = 6

Policy = Callable[[torch.Tensor], torch.Tensor]


def clipping_factor(norm: torch.Tensor, max_norm: float | None) -> torch.Tensor | None:
    """Return the factor of `torch.nn.utils.clip_grad_norm_`, in the norm's dtype; None if nothing is clipped."""
    return None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)


def orthogonal_step(
    products: torch.Tensor, squared_norms: torch.Tensor, inverse_gram: torch.Tensor, max_norm: float | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Choose `δ` of `Plan.apply_` for the policy `orthogonal` (arXiv 2602.07892), without waiting for the device.

    With the products `p = B g` and `A = (B Bᵀ)⁻¹`, `δ = -A p`: `g + Bᵀδ = g - U Uᵀg`, with the squared norm
    `‖g‖² - pᵀA p`. A gradient that is not finite is not changed.

    Args:
        products: float32 or float64 `[groups, rank]`.
        squared_norms: `‖g‖²`, of the same dtype, `[groups]`.
        inverse_gram: `A`, float32 `[groups, rank, rank]`.
        max_norm: the largest norm to leave, or None.

    Returns:
        `δ`, float32 `[groups, rank]`; the clipping factor, float32, 0-dim, or None without `max_norm`; the norm of
        what is left, float32, 0-dim.
    """
    removed = (inverse_gram.to(products.dtype) @ products.unsqueeze(-1)).squeeze(-1)
    total = squared_norms.sum().float()  # in float32, so that the caller sees the same sum
    finite = total.isfinite()
    delta = torch.where(finite, -removed, 0.0).float()
    kept = (squared_norms - (products * removed).sum(-1)).clamp(min=0.0).sum()
    norm = torch.where(finite, kept, total.to(kept.dtype)).sqrt()
    scale = clipping_factor(norm, max_norm)
    return delta, None if scale is None else scale.float(), norm.float()


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

    Lawson and Hanson's method with its two loops merged into one: in every step a group either moves to the optimum on
    its active constraints and adds the most violated one, or, if that would make a multiplier negative, moves until
    the first multiplier is zero and drops that constraint. A group that is done does not move.

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
