"""From reference gradients to an orthonormal basis of the subspace that they span.

Notation, after arXiv 2602.07892: `r_d` is the gradient of the loss on reference set `d`, `U` an orthonormal basis of
`span{r_1 … r_n}`, `g` the safety gradient. A *group* is what one basis spans: one parameter tensor (scope `parameter`)
or all of them (scope `global`). Reference gradients are kept per tensor as rows of a matrix `[n, numel]`, whatever the
scope, and the basis replaces them in the same memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .engines.processes import ALONE, Processes


SCOPES = ("parameter", "global", "inputs")

# Elements that are converted to float64 at a time.
_CHUNK = 1 << 22
# Columns of a chunk that one matrix multiplication sums over.
_SLICE = 1 << 13


def ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Divide; anything divided by 0 is 0, so that a gradient of norm zero has cosines of 0."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def gram_matrices(
    rows: Sequence[torch.Tensor], groups: Sequence[int], device: torch.device, processes: Processes = ALONE
) -> torch.Tensor:
    """Compute the Gram matrices of the rows, one per group: `G = R Rᵀ`, summed over the tensors of the group.

    Args:
        rows: one tensor `[n, numel_i]` per parameter, of any float dtype, on any device.
        groups: the group of each tensor, numbered from 0.
        device: where chunks of the rows are multiplied (rows in host memory are copied there chunk by chunk).
        processes: the processes that the rows may be split over; the result is the sum of theirs.

    Returns:
        float64 `[groups, n, n]` on the CPU. float64, so that gradients of norm 1e±100 neither overflow nor vanish.
    """
    n = rows[0].shape[0]
    gram = torch.zeros(max(groups) + 1, n, n, dtype=torch.float64, device=device)
    for row, group in zip(rows, groups, strict=True):
        for chunk in row.split(max(1, _CHUNK // n), dim=1):
            gram[group] += _product(_to_float64(chunk, device))
    return processes.agree(processes.sum_pieces(gram)).cpu()


def products_with(row: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return `row @ vector`, chunk by chunk in float64.

    Args:
        row: `[n, numel]`, of any float dtype, on any device.
        vector: `[numel]`, on the device that multiplies.

    Returns:
        float64 `[n]`, on the vector's device.
    """
    total = torch.zeros(row.shape[0], dtype=torch.float64, device=vector.device)
    size = _CHUNK // row.shape[0]
    for chunk, part in zip(row.split(size, dim=1), vector.split(size), strict=True):
        total += _to_float64(chunk, vector.device) @ part.to(torch.float64)
    return total


def _product(chunk: torch.Tensor) -> torch.Tensor:
    """Return `chunk @ chunk.T` for a chunk that is much wider than high, `[n, width]`."""
    # In many small products: a GPU's matrix multiplication is parallel over the rows and columns of the result, which
    # are few here, but not always over the long sum (rocBLAS issue 1195: below 5 GB/s).
    whole = chunk.shape[1] // _SLICE * _SLICE
    slices = chunk[:, :whole].unflatten(1, (-1, _SLICE)).transpose(0, 1) if whole else chunk[None, :, :0]
    rest = chunk[:, whole:]
    return (slices @ slices.mT).sum(0) + rest @ rest.T


def _to_float64(chunk: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a chunk to `device` as float64."""
    # In two steps: a copy that also converts would do so on the host, and move the larger type to the accelerator.
    return chunk.to(device).to(torch.float64)


def _transform_rows_(rows: Sequence[torch.Tensor], groups: Sequence[int], weights: torch.Tensor, device) -> None:
    """Replace the first `rank` rows of every tensor by `weights[group] @ rows`, chunk by chunk, in place."""
    rank = weights.shape[1]
    weights = weights.to(device)
    for row, group in zip(rows, groups, strict=True):
        for chunk in row.split(max(1, _CHUNK // row.shape[0]), dim=1):
            chunk[:rank].copy_((weights[group] @ _to_float64(chunk, device)).to(row.dtype))


def _first_rows(row: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the first `rank` rows of a tensor and free the memory of the others, if that is possible."""
    # Pinned memory stays with the process when it is freed, so a copy would need more.
    if rank == row.shape[0] or row.is_pinned():
        return row[:rank]
    kept = row[:rank].clone()
    row.set_()
    return kept


@dataclass(frozen=True)
class Geometry:
    """The few numbers that describe a basis, one entry per group.

    Attributes:
        whitening: float64 `[groups, rank, rank]`, `T` with `Uᵀ = T B` orthonormal, where `B` is the basis as stored,
            whose rows are orthonormal only up to the rounding of its dtype. The coefficients are `c = Uᵀg = T B g`.
        references: float64 `[groups, sets, rank]`, the unit reference gradients in orthonormal coordinates,
            `r_d / ‖r_d‖ = U a_d`; zero if the reference gradient is zero.
        shares: float64 `[groups, sets]`, `‖r_d‖` of the group over `‖r_d‖` of all groups.
        norms: float64 `[sets]`, `‖r_d‖` of all groups.
        ranks: the number of directions of each group.
    """

    whitening: torch.Tensor
    references: torch.Tensor
    shares: torch.Tensor
    norms: torch.Tensor
    ranks: tuple[int, ...]

    def to(self, device: torch.device) -> "Geometry":
        """Return the same numbers on `device`."""
        tensors = [getattr(self, name).to(device) for name in ("whitening", "references", "shares", "norms")]
        return Geometry(*tensors, self.ranks)

    def coefficients(self, products: torch.Tensor) -> torch.Tensor:
        """Return `c = Uᵀg = T p` from the products `p = B g` with the basis as stored; float64 `[groups, rank]`."""
        return torch.einsum("gij,gj->gi", self.whitening, products.double())

    def overlaps(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return `⟨g, r_d⟩ / ‖r_d‖` over all groups for each reference set; float64 `[sets]`."""
        return torch.einsum("gnr,gr,gn->n", self.references, coefficients, self.shares)


def orthonormalise_(
    rows: Sequence[torch.Tensor],
    groups: Sequence[int],
    rank: int | None = None,
    device: torch.device | None = None,
    parts: int = 1,
    processes: Processes = ALONE,
) -> tuple[list[torch.Tensor], Geometry]:
    """Turn reference gradients into an orthonormal basis of their span, in their own memory.

    The basis comes from the eigenvectors of the Gram matrix of the unit reference gradients (every capability has the
    same weight, however large its gradient): `C = V Λ Vᵀ`, `Uᵀ = Λ^{-1/2} Vᵀ R`. Directions whose eigenvalue may come
    from rounding alone are dropped, so two equal reference gradients give rank 1 and zero ones rank 0.

    Args:
        rows: one tensor `[n, numel_i]` per parameter (float32 or bfloat16); overwritten, or emptied.
        groups: the group of each tensor, numbered from 0.
        rank: the most directions to keep; None keeps all `n`.
        device: where the arithmetic runs; None: where the rows are.
        parts: how many consecutive rows add up to the gradient of one reference set.
        processes: the processes that make this basis together, each from its piece of the rows or each from all of
            them; they get the same numbers, to the last bit.

    Returns:
        the basis, one tensor `[r, numel_i]` per parameter, `r` the largest rank of any group (unused rows are zero),
        and its `Geometry` on the CPU.

    Raises:
        FloatingPointError: a reference gradient is not finite.
    """
    device = device or rows[0].device
    gram = gram_matrices(rows, groups, device, processes)
    if not torch.isfinite(gram).all():
        raise FloatingPointError("a reference gradient is not finite")

    n = gram.shape[1]
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse_norms = ratio(torch.ones_like(norms), norms)
    cosines = gram * inverse_norms[:, :, None] * inverse_norms[:, None, :]
    eigenvalues, eigenvectors = torch.linalg.eigh(cosines)
    solution = processes.agree(torch.cat([eigenvalues[:, None], eigenvectors], dim=1)).flip(-1)
    eigenvalues, eigenvectors = solution[:, 0], solution[:, 1:]

    tolerance = max((4 * max(torch.finfo(row.dtype).eps for row in rows)) ** 2, 1e-10)
    kept = eigenvalues > tolerance * n
    kept[:, rank if rank is not None else n :] = False
    ranks = tuple(kept.sum(1).tolist())
    r = max(1, *ranks)
    kept, eigenvectors = kept[:, :r], eigenvectors[:, :, :r]
    roots = eigenvalues[:, :r].clamp(min=0).sqrt() * kept

    weights = ratio(torch.ones_like(roots), roots)[:, :, None] * eigenvectors.mT * inverse_norms[:, None, :]
    _transform_rows_(rows, groups, weights, device)
    basis = [_first_rows(row, r) for row in rows]

    coordinates = (norms[:, :, None] * eigenvectors * roots[:, None, :]).unflatten(1, (-1, parts)).sum(2)
    blocks = gram.unflatten(2, (-1, parts)).unflatten(1, (-1, parts)).diagonal(dim1=1, dim2=3)
    set_norms = blocks.sum((1, 2)).clamp(min=0).sqrt()
    total_norms = set_norms.square().sum(0).sqrt()
    geometry = Geometry(
        whitening=processes.agree(_whitening(gram_matrices(basis, groups, device, processes), kept)),
        references=ratio(coordinates, set_norms[:, :, None]),
        shares=ratio(set_norms, total_norms),
        norms=total_norms,
        ranks=ranks,
    )
    return basis, geometry


def _whitening(gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return `T` with `T G Tᵀ = I` on the kept directions and zero elsewhere (`T = L⁻¹`, `G = L Lᵀ`)."""
    kept = kept.to(gram.dtype)
    block = kept[:, :, None] * kept[:, None, :]
    padded = gram * block + torch.diag_embed(1 - kept)
    inverse = torch.linalg.inv(torch.linalg.cholesky(padded))
    return inverse * block


def assign_groups(num_tensors: int, scope: str) -> list[int]:
    """Return the group of each tensor for a scope (`parameter` or `global`)."""
    return list(range(num_tensors)) if scope == "parameter" else [0] * num_tensors


def leading_directions(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the leading right singular vectors of a matrix, those of the largest singular values.

    Args:
        rows: `[n, in]`, any float dtype; the sums are float64.
        rank: the most directions to return.

    Returns:
        float32 `[k, in]`, `k` at most `rank`, `n` and `in`, fewer if only rounding is left, and 0 without rows.
    """
    rows = rows.double()
    wide = rows.shape[0] <= rows.shape[1]
    eigenvalues, eigenvectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    eigenvalues, eigenvectors = eigenvalues.flip(0)[:rank], eigenvectors.flip(1)[:, :rank]
    kept = eigenvalues > 1e-10 * eigenvalues[:1].clamp(min=torch.finfo(torch.float64).tiny)
    eigenvalues, eigenvectors = eigenvalues[kept], eigenvectors[:, kept]
    directions = eigenvectors.T @ rows / eigenvalues.sqrt()[:, None] if wide else eigenvectors.T
    return directions.float().contiguous()
