"""`Subspace`: the basis that a run keeps and projects gradients with, and the Python interface."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, Literal

import torch

from .checks import check_references, order_gradients
from .engines.processes import ALONE, Processes
from .geometry import SCOPES, Geometry, assign_groups, orthonormalise_, products_with
from .inputs import MOST_DIRECTIONS, InputSubspace
from .kernels import MAX_RANK, Plan, make_plan
from .projection import METHODS, Projection, ProjectionStats, make_projection
from .storage import Read, open_tensors, save_tensors


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
        processes: Processes = ALONE,
        most_directions: int | None = None,
    ) -> None:
        """Wrap a finished basis; most callers want `from_gradients`.

        Args:
            names: the names of the tensors.
            basis: their bases, `[rank, numel_i]`, as `orthonormalise_` returns them.
            geometry: its geometry.
            groups: the group of each tensor.
            device: where the gradients are; None: where the basis is.
            processes: those that gradients and basis may be split over.
            most_directions: the rank that was asked for, if any.
        """
        self.names = tuple(names)
        self.basis = list(basis)
        self.groups = tuple(groups)
        self.device = device or self.basis[0].device
        self.processes = processes
        self.geometry = geometry.to(self.device)
        self._most_directions = most_directions
        self._plans: dict[str, Plan] = {}
        self._projections: dict[tuple[str, str], Projection] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled and is made again when it is used."""
        return {**self.__dict__, "_plans": {}, "_projections": {}}

    @property
    def sharded(self) -> bool:
        """True if this process has only a piece of the basis."""
        return self.processes.sharded

    @property
    def rank(self) -> int:
        """The largest number of directions of any group."""
        return max(self.geometry.ranks)

    @classmethod
    @torch.no_grad()
    def from_gradients(
        cls,
        gradients: Sequence[dict[str, torch.Tensor]],
        scope: Literal["parameter", "global", "inputs"] = "parameter",
        rank: int | None = None,
    ) -> "Subspace | InputSubspace":
        """Build the subspace spanned by reference gradients. The gradients are copied, not kept.

        Each reference gradient needs tensors of its own: after `zero_grad(set_to_none=False)` the next backward pass
        writes into those of the one before.

        Args:
            gradients: one dict a reference gradient, tensors by parameter name, all with the same names and shapes.
                A tensor may be None where the reference loss does not touch the parameter. Any real floating dtype.
            scope: `parameter`: one basis a tensor (the paper's experiments); `global`: one for all (its theorem);
                `inputs`: for each matrix `[out, in]` the leading directions of the inputs that the reference gradients
                name, their right singular vectors: see `inputs/subspace.py`.
            rank: most directions kept, 1 to 32; None keeps one for each reference gradient. With scope `inputs` most
                directions of a matrix, 1 to 4096; None: 96, but at most half of its inputs.

        Returns:
            the subspace, on the gradients' device; a tensor's basis is bfloat16 if its gradients are, else float32.
            With scope `inputs` an `InputSubspace`, which projects in the same way.

        Raises:
            ValueError: no gradient, different names or shapes, an unknown scope, a rank or a number of independent
                reference gradients that is not 1 to 32.
            TypeError: anything but a sequence of dicts of dense tensors of a real floating dtype, a rank that is not
                an integer.
            FloatingPointError: a reference gradient is not finite (names it), or becomes infinite in float32.
        """
        names = check_references(gradients)
        if scope not in SCOPES:
            raise ValueError(f"`scope` is {scope!r}; allowed: {', '.join(SCOPES)}")
        most = MOST_DIRECTIONS if scope == "inputs" else MAX_RANK
        if rank is not None and not isinstance(rank, Integral):
            raise TypeError(f"`rank` is {rank!r}; allowed: an integer from 1 to {most}, or None")
        if rank is not None and not 1 <= rank <= most:
            raise ValueError(f"`rank` is {rank}; allowed: an integer from 1 to {most}, or None")
        if scope == "inputs":
            return InputSubspace.from_gradients(gradients, rank)

        rows = {}
        for name in names:
            tensors = [gradient[name] for gradient in gradients]
            present = [tensor for tensor in tensors if tensor is not None]
            if not present:
                continue
            dtype = torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in present) else torch.float32
            row = torch.zeros(len(tensors), present[0].numel(), dtype=dtype, device=present[0].device)
            for index, tensor in enumerate(tensors):
                if tensor is not None:
                    row[index].view(tensor.shape).copy_(tensor)
            rows[name] = row
        groups = assign_groups(len(rows), scope)
        basis, geometry = orthonormalise_(list(rows.values()), groups, rank)
        if max(geometry.ranks) > MAX_RANK:
            raise ValueError(
                f"`gradients` span {max(geometry.ranks)} directions; allowed: at most {MAX_RANK}, or a `rank` of that"
            )

        return cls(list(rows), basis, geometry, groups, most_directions=rank)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the bases as `basis.<name>` and the numbers of the geometry as `geometry.<field>`, contiguous."""
        tensors = {f"basis.{name}": rows for name, rows in zip(self.names, self.basis, strict=True)}
        for field in fields(Geometry):
            tensors[f"geometry.{field.name}"] = torch.as_tensor(getattr(self.geometry, field.name)).contiguous()
        return tensors

    def save(self, path: str) -> None:
        """Write the subspace to a safetensors file, under a temporary name first; `load` reads it."""
        kept = {"names": list(self.names), "groups": list(self.groups), "most_directions": self._most_directions}
        save_tensors(path, self.tensors(), {"subspace": json.dumps(kept)})

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu") -> "Subspace | InputSubspace":
        """Read a subspace that `save` wrote; it projects like the saved one, to the last bit.

        Args:
            path: the file.
            device: where the gradients will be.

        Raises:
            ValueError: the file is missing, damaged or not a subspace.
        """
        try:
            with open_tensors(path) as (read, metadata, stored):
                if "inputs" in metadata:
                    return InputSubspace.restore(read, metadata["inputs"], stored, device)
                if "subspace" not in metadata:
                    raise ValueError("is not a subspace")
                kept = json.loads(metadata["subspace"])
                basis = [read(f"basis.{name}").to(device) for name in kept["names"]]
                most = kept["most_directions"]
                return cls(kept["names"], basis, read_geometry(read), kept["groups"], most_directions=most)
        except ValueError as err:
            raise ValueError(f"{path} {err}") from err

    def find_covered(self) -> list[bool]:
        """Return for each tensor whether it has a direction, in any process; others are not projected."""
        touched = torch.stack([row.any() for row in self.basis]).tolist()
        return [count > 0 for count in self.processes.totals(touched)]

    @torch.no_grad()
    def measure(self, changes: Iterable[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure a change of the weights along the basis, one tensor at a time.

        Args:
            changes: pairs of a tensor's index and its change, `[numel_i]` (this process's piece of it).

        Returns:
            the coefficients, float64 `[groups, rank]`, and the squared norm of the whole change, float64, 0-dim.
        """
        sums = torch.zeros(len(self.geometry.ranks), self.basis[0].shape[0] + 1, dtype=torch.float64)
        sums = sums.to(self.device)
        for index, change in changes:
            sums[self.groups[index], :-1] += products_with(self.basis[index], change)
            sums[self.groups[index], -1] += torch.linalg.vector_norm(change, dtype=torch.float64).square()
        sums = self.processes.sum_pieces(sums)
        return self.geometry.coefficients(sums[:, :-1]), sums[:, -1].sum()

    def plan(self, kernel: str = "auto") -> Plan:
        """Return the kernels over this basis, prepared at their first use; see `kernels.make_plan`."""
        if kernel not in self._plans:
            num_groups = len(self.geometry.ranks)
            self._plans[kernel] = make_plan(self.basis, self.groups, num_groups, kernel=kernel, device=self.device)
        return self._plans[kernel]

    def projection(self, method: str = "orthogonal", kernel: str = "auto") -> Projection:
        """Return the projection of gradients given in the order of `names`; see `make_projection`.

        Raises:
            ValueError: an unknown method or kernel, a kernel that cannot run here, or `conflict` if `rank` was below
                the number of reference gradients, independent or not.
        """
        if method not in METHODS:
            raise ValueError(f"`method` is {method!r}; allowed: {', '.join(METHODS)}")
        num_references, most = self.geometry.references.shape[1], self._most_directions
        if method == "conflict" and most is not None and most < num_references:
            # A reference loss could rise along the directions that were dropped.
            raise ValueError(
                f"`method` conflict needs a direction for every reference gradient; of {num_references}, `rank` kept "
                f"{most} at most"
            )
        if (method, kernel) not in self._projections:
            self._projections[method, kernel] = make_projection(
                self.plan(kernel), self.geometry, method, self.processes
            )
        return self._projections[method, kernel]

    @torch.no_grad()
    def project_(
        self,
        gradients: dict[str, torch.Tensor | None],
        method: Literal["orthogonal", "conflict", "monitor"] = "orthogonal",
        kernel: Literal["auto", "triton", "torch"] = "auto",
    ) -> ProjectionStats:
        """Project gradients in place and measure what was removed and what is left.

        Call it once per optimizer step: after the last micro-batch's backward pass, after `GradScaler.unscale_` if
        there is a scaler, and before clipping. Gradients must be whole: with several processes, those that
        DistributedDataParallel has averaged, and not those that FSDP or DeepSpeed shards.

        Args:
            gradients: float32, bfloat16 or float16 tensors by parameter name, changed in place; every name of the
                subspace is required. None, for a parameter without gradient, counts as zero; with scope `global` its
                part of the projection cannot be written, so a component may be left, which `residual` shows. Names
                without a reference gradient are not changed.
            method: `orthogonal` removes the whole component in the subspace (the paper); `conflict` makes the least
                change after which no reference loss rises to first order; `monitor` changes nothing.
            kernel: `triton`, `torch`, or `auto` for triton if it runs here.

        Returns:
            the figures of this projection; reading one waits for the device.

        Raises:
            ValueError: an unknown method or kernel, a name of the subspace that is missing, a tensor with another
                number of elements than its reference, `conflict` if `rank` was below the number of reference
                gradients.
            TypeError: not a dict, or a tensor of another dtype or a sparse one.
        """
        sizes = [basis.shape[1] for basis in self.basis]
        ordered = order_gradients(gradients, self.names, sizes)
        return self.projection(method, kernel)(ordered, measure=True)


def read_geometry(read: Read) -> Geometry:
    """Read the geometry that `Subspace.tensors` returned, onto the CPU."""
    *numbers, ranks = [read(f"geometry.{field.name}") for field in fields(Geometry)]
    return Geometry(*numbers, tuple(ranks.tolist()))
