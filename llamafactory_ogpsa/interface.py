"""The Python interface: a subspace that is projected out of gradients, without LLaMA-Factory."""

from collections.abc import Sequence
from typing import Literal

import torch

from .engines.shards import Shards
from .kernels import MAX_RANK, Plan, make_plan
from .projection import METHODS, Projection, ProjectionStats, make_projection
from .subspace import SCOPES, Geometry, assign_groups, orthonormalise_


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
        shards: Shards | None = None,
    ) -> None:
        """Wrap a finished basis; most callers want `from_gradients`.

        Args:
            names: the names of the tensors.
            basis: their bases, `[rank, numel_i]`, as `orthonormalise_` returns them.
            geometry: its geometry.
            groups: the group of each tensor.
            device: where the gradients live; None: where the basis is.
            shards: the processes that gradients and basis are split over; None: they are whole.
        """
        self.names = tuple(names)
        self.basis = list(basis)
        self.groups = tuple(groups)
        self.device = device or self.basis[0].device
        self.shards = shards
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
            rank: most directions kept, at least 1; None keeps one for each reference gradient, of which 32 at most may
                be independent.

        Returns:
            the subspace, on the gradients' device and in their dtype (float16 becomes float32).

        Raises:
            ValueError: no gradient, different names or shapes, an unknown scope, a rank below 1, or more than 32
                directions.
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
        if max(geometry.ranks) > MAX_RANK:
            raise ValueError(
                f"`gradients` span {max(geometry.ranks)} directions; allowed: at most {MAX_RANK}, or a `rank` of that"
            )
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
            self._projections[method, kernel] = make_projection(self.plan(kernel), self.geometry, method, self.shards)
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
            gradients: float32, bfloat16 or float16 tensors by parameter name, changed in place; a missing name or
                None counts as zero, a name that no reference gradient touched is left alone.
            method: `orthogonal` removes the whole component in the subspace (the paper); `conflict` makes the least
                change after which no reference loss rises to first order; `monitor` changes nothing.
            kernel: `triton`, `torch`, or `auto` for triton where it runs.

        Returns:
            the figures of this projection; reading one waits for the device.

        Raises:
            ValueError: an unknown method or kernel, a tensor with another number of elements than its reference.
            TypeError: a tensor of another dtype.
        """
        ordered = [gradients.get(name) for name in self.names]
        for name, gradient, basis in zip(self.names, ordered, self.basis, strict=True):
            if gradient is not None and gradient.numel() != basis.shape[1]:
                raise ValueError(
                    f"the gradient of {name} has {gradient.numel()} elements, its reference gradient {basis.shape[1]}"
                )
        return self.projection(method, kernel)(ordered, measure=True)
