"""Reference gradients to an orthonormal basis of the subspace they span.

Notation, after arXiv 2602.07892: `r_d` is the gradient of the loss on reference set `d`, `U` an orthonormal basis of
`span{r_1 … r_n}`, `g` the safety gradient. A *group* is what one basis spans: one parameter tensor (scope `parameter`)
or all of them (scope `global`). Reference gradients are kept per tensor as rows of a matrix `[n, numel]`, whatever the
scope, and the basis replaces them in the same memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .kernels import Plan, make_plan
from .projection import METHODS, Projection, ProjectionStats, make_projection, ratio


SCOPES = ("parameter", "global")

# Elements that are converted to float64 at a time: the only temporary of a refresh.
_CHUNK = 1 << 22


def gram_matrices(
    rows: Sequence[torch.Tensor], groups: Sequence[int], num_groups: int, device: torch.device
) -> torch.Tensor:
    """Compute the Gram matrices of the rows, one a group: `G = R Rᵀ`, summed over the tensors of the group.

    Args:
        rows: one tensor `[n, numel_i]` a parameter, of any float dtype, on any device.
        groups: the group of each tensor.
        num_groups: how many groups there are.
        device: where chunks of the rows are multiplied (rows in host memory are copied there chunk by chunk).

    Returns:
        float64 `[num_groups, n, n]` on the CPU. float64, so that gradients of norm 1e±100 neither overflow nor vanish.
    """
    n = rows[0].shape[0]
    gram = torch.zeros(num_groups, n, n, dtype=torch.float64, device=device)
    for row, group in zip(rows, groups, strict=True):
        for chunk in row.split(max(1, _CHUNK // n), dim=1):
            chunk = chunk.to(device=device, dtype=torch.float64)
            gram[group].addmm_(chunk, chunk.T)
    return gram.cpu()


def _transform_rows_(rows: Sequence[torch.Tensor], groups: Sequence[int], weights: torch.Tensor, device) -> None:
    """Replace the first `rank` rows of every tensor by `weights[group] @ rows`, chunk by chunk, in place."""
    rank = weights.shape[1]
    weights = weights.to(device)
    for row, group in zip(rows, groups, strict=True):
        for chunk in row.split(max(1, _CHUNK // row.shape[0]), dim=1):
            chunk[:rank].copy_(weights[group] @ chunk.to(device=device, dtype=torch.float64))


@dataclass(frozen=True)
class Geometry:
    """The few numbers that describe a basis, one entry a group; all that a policy needs beside the coefficients.

    Attributes:
        whitening: float32 `[groups, rank, rank]`, `T` with `T B` orthonormal, where `B` is the basis as stored: it
            takes out what rounding the basis to its dtype did to its orthonormality. `T Bᵀg` are the coefficients.
        references: float32 `[groups, sets, rank]`, the unit reference gradients in orthonormal coordinates,
            `r_d / ‖r_d‖ = U a_d`; zero where the reference gradient is.
        shares: float32 `[groups, sets]`, `‖r_d‖` of the group over `‖r_d‖` of all groups.
        ranks: the number of directions of each group.
    """

    whitening: torch.Tensor
    references: torch.Tensor
    shares: torch.Tensor
    ranks: tuple[int, ...]

    def to(self, device: torch.device) -> "Geometry":
        """Return the same numbers on `device`."""
        return Geometry(self.whitening.to(device), self.references.to(device), self.shares.to(device), self.ranks)


def orthonormalise_(
    rows: Sequence[torch.Tensor],
    groups: Sequence[int],
    num_groups: int,
    rank: int | None = None,
    device: torch.device | None = None,
    parts: int = 1,
) -> tuple[list[torch.Tensor], Geometry]:
    """Turn reference gradients into an orthonormal basis of their span, in their own memory.

    The basis comes from the eigenvectors of the Gram matrix of the unit reference gradients (every capability weighs
    the same, however large its gradient): `C = V Λ Vᵀ`, `U = Λ^{-1/2} Vᵀ R`. Directions whose eigenvalue is below
    what rounding alone produces are dropped, so two equal reference gradients give rank 1 and zero ones rank 0.

    Args:
        rows: one tensor `[n, numel_i]` a parameter (float32 or bfloat16); overwritten.
        groups: the group of each tensor.
        num_groups: how many groups there are.
        rank: most directions kept; None keeps all `n`.
        device: where the arithmetic runs; None: where the rows are.
        parts: consecutive rows that together, summed, are the gradient of one reference set.

    Returns:
        the basis, one tensor `[r, numel_i]` a parameter, `r` the largest rank of any group (unused rows are zero), and
        its `Geometry` on the CPU.

    Raises:
        FloatingPointError: a reference gradient is not finite.
    """
    device = device or rows[0].device
    gram = gram_matrices(rows, groups, num_groups, device)
    if not torch.isfinite(gram).all():
        raise FloatingPointError("a reference gradient is not finite")

    n = gram.shape[1]
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse_norms = ratio(torch.ones_like(norms), norms)
    cosines = gram * inverse_norms[:, :, None] * inverse_norms[:, None, :]
    eigenvalues, eigenvectors = torch.linalg.eigh(cosines)
    eigenvalues, eigenvectors = eigenvalues.flip(-1), eigenvectors.flip(-1)

    tolerance = max((4 * torch.finfo(rows[0].dtype).eps) ** 2, 1e-10)
    kept = eigenvalues > tolerance * n
    kept[:, rank if rank is not None else n :] = False
    ranks = tuple(kept.sum(1).tolist())
    r = max(1, *ranks)
    kept, eigenvectors = kept[:, :r], eigenvectors[:, :, :r]
    roots = eigenvalues[:, :r].clamp(min=0).sqrt() * kept

    weights = ratio(torch.ones_like(roots), roots)[:, :, None] * eigenvectors.mT * inverse_norms[:, None, :]
    _transform_rows_(rows, groups, weights, device)
    # A rank below n leaves unused rows behind the basis: copied out, so that their memory is given back.
    basis = [row if r == n else row[:r].clone() for row in rows]

    coordinates = (norms[:, :, None] * eigenvectors * roots[:, None, :]).unflatten(1, (-1, parts)).sum(2)
    blocks = gram.unflatten(2, (-1, parts)).unflatten(1, (-1, parts)).diagonal(dim1=1, dim2=3)
    set_norms = blocks.sum((1, 2)).clamp(min=0).sqrt()
    total_norms = set_norms.square().sum(0).sqrt()
    geometry = Geometry(
        whitening=_whitening(gram_matrices(basis, groups, num_groups, device), kept).float(),
        references=ratio(coordinates, set_norms[:, :, None]).float(),
        shares=ratio(set_norms, total_norms).float(),
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


class Subspace:
    """An orthonormal basis of the span of reference gradients, ready to be projected out of other gradients.

    Example:
        >>> subspace = Subspace.from_gradients([helpful_gradients, truthful_gradients])
        >>> stats = subspace.project_({name: p.grad for name, p in model.named_parameters()})
        >>> stats.removed
    """

    def __init__(
        self,
        names: Sequence[str],
        basis: Sequence[torch.Tensor],
        geometry: Geometry,
        groups: Sequence[int],
        device: torch.device | None = None,
    ) -> None:
        """Wrap a finished basis; most callers want `from_gradients`.

        Args:
            names: the names of the tensors.
            basis: their bases, `[rank, numel_i]`, as `orthonormalise_` returns them.
            geometry: its geometry.
            groups: the group of each tensor.
            device: where the gradients live; None: where the basis is.
        """
        self.names = tuple(names)
        self.basis = list(basis)
        self.groups = tuple(groups)
        self.device = device or self.basis[0].device
        self.geometry = geometry.to(self.device)
        self._plans: dict[str, Plan] = {}
        self._projections: dict[tuple[str, str], Projection] = {}

    @property
    def rank(self) -> int:
        """The largest number of directions of any group."""
        return max(self.geometry.ranks)

    @classmethod
    @torch.no_grad()
    def from_gradients(
        cls,
        gradients: Sequence[dict[str, torch.Tensor]],
        scope: Literal["parameter", "global"] = "parameter",
        rank: int | None = None,
    ) -> "Subspace":
        """Build the subspace spanned by reference gradients. The gradients are copied, not kept.

        Args:
            gradients: one dict a reference gradient, tensors by parameter name, all with the same names and shapes.
                A tensor may be None where the reference loss does not touch the parameter.
            scope: `parameter`: one basis a tensor (the paper's experiments); `global`: one for all (its theorem).
            rank: most directions kept, at least 1; None keeps one for each reference gradient.

        Returns:
            the subspace, on the gradients' device and in their dtype (float16 becomes float32).

        Raises:
            ValueError: no gradient, different names or shapes, an unknown scope, a rank below 1.
            FloatingPointError: a reference gradient is not finite.
        """
        if not gradients or not gradients[0]:
            raise ValueError("`gradients` must hold at least one dict of tensors")
        if scope not in SCOPES:
            raise ValueError(f"`scope` is {scope!r}; allowed: {', '.join(SCOPES)}")
        if rank is not None and rank < 1:
            raise ValueError(f"`rank` is {rank}; allowed: a positive integer or None")

        names = list(gradients[0])
        if any(list(other) != names for other in gradients):
            raise ValueError("`gradients` must all have the same names in the same order")

        rows, kept_names = [], []
        for name in names:
            tensors = [gradient[name] for gradient in gradients]
            present = [tensor for tensor in tensors if tensor is not None]
            if not present:
                continue
            if any(tensor.shape != present[0].shape for tensor in present):
                raise ValueError(f"`gradients` have different shapes for {name}")
            dtype = torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in present) else torch.float32
            row = torch.zeros(len(tensors), present[0].numel(), dtype=dtype, device=present[0].device)
            for index, tensor in enumerate(tensors):
                if tensor is not None:
                    row[index].view(tensor.shape).copy_(tensor)
            rows.append(row)
            kept_names.append(name)
        if not rows:
            raise ValueError("`gradients` hold no tensor at all")

        groups, num_groups = assign_groups(len(rows), scope)
        basis, geometry = orthonormalise_(rows, groups, num_groups, rank)
        return cls(kept_names, basis, geometry, groups)

    def plan(self, kernel: str = "auto") -> Plan:
        """Return the kernels over this basis, made ready at their first use; see `kernels.make_plan`."""
        if kernel not in self._plans:
            num_groups = len(self.geometry.ranks)
            self._plans[kernel] = make_plan(self.basis, self.groups, num_groups, kernel=kernel, device=self.device)
        return self._plans[kernel]

    def projection(self, method: str = "orthogonal", kernel: str = "auto") -> Projection:
        """Return the projection of gradients given in the order of `names`, made at its first use.

        Args:
            method: as in `project_`.
            kernel: as in `project_`.

        Returns:
            the function that `projection.make_projection` describes.

        Raises:
            ValueError: an unknown method or kernel, or a kernel that cannot run here.
        """
        if method not in METHODS:
            raise ValueError(f"`method` is {method!r}; allowed: {', '.join(METHODS)}")
        if (method, kernel) not in self._projections:
            self._projections[method, kernel] = make_projection(self.plan(kernel), self.geometry, method)
        return self._projections[method, kernel]

    @torch.no_grad()
    def project_(
        self,
        gradients: dict[str, torch.Tensor | None],
        method: Literal["orthogonal", "conflict", "monitor"] = "orthogonal",
        kernel: Literal["auto", "triton", "torch"] = "auto",
    ) -> ProjectionStats:
        """Project gradients in place and measure what was removed and what is left.

        Args:
            gradients: tensors by parameter name, any float dtype, changed in place; a missing name or None counts as
                zero, a name that no reference gradient touched is left alone.
            method: `orthogonal` removes the whole component in the subspace (the paper); `conflict` makes the least
                change after which no reference loss rises to first order; `monitor` changes nothing.
            kernel: `triton`, `torch`, or `auto` for triton where it runs.

        Returns:
            the figures of this projection; reading one waits for the device.

        Raises:
            ValueError: an unknown method or kernel, a tensor with another number of elements than its reference.
        """
        ordered = [gradients.get(name) for name in self.names]
        for name, gradient, basis in zip(self.names, ordered, self.basis, strict=True):
            if gradient is not None and gradient.numel() != basis.shape[1]:
                raise ValueError(
                    f"the gradient of {name} has {gradient.numel()} elements, its reference gradient {basis.shape[1]}"
                )
        return self.projection(method, kernel)(ordered, measure=True)


def assign_groups(num_tensors: int, scope: str) -> tuple[list[int], int]:
    """Return the group of each tensor and the number of groups for a scope (`parameter` or `global`)."""
    if scope == "parameter":
        return list(range(num_tensors)), num_tensors
    return [0] * num_tensors, 1
