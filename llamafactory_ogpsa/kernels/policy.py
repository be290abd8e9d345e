"""The default policy on the coefficients, in plain torch."""

import torch


def orthogonal_step(
    c: torch.Tensor, sq: torch.Tensor, inverse_gram: torch.Tensor, max_norm: float | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Choose Δ, the clipping factor and the norm of :meth:`Plan.orthogonal_`, without asking the host.

    Args:
        c: floating ``[num_groups, rank]``.
        sq: floating ``[num_groups]``, of the same dtype.
        inverse_gram: float32 ``[num_groups, rank, rank]``.
        max_norm: the largest norm to leave, or None.

    Returns:
        delta, float32 ``[num_groups, rank]``; scale, float32 without dimensions, or None without max_norm; the norm of
        what is left, float32 without dimensions.
    """
    removed = (inverse_gram.to(c.dtype) @ c.unsqueeze(-1)).squeeze(-1)
    total = sq.sum()
    # In float32, in which the caller sees the same sum.
    total = total.float()
    finite = total.isfinite()
    delta = torch.where(finite, -removed, 0.0).float()
    kept = (sq - (c * removed).sum(-1)).clamp(min=0.0).sum()
    norm = torch.where(finite, kept, total.to(kept.dtype)).sqrt()
    scale = None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    return delta, scale, norm.float()
