r"""The bases of the reference inputs of every weight matrix, and the projection of gradients by them.

A weight matrix `W [out, in]` gets inputs `x`; its gradient is a sum of outer products, `G = Σ δ xᵀ`. With `V [k, in]`
an orthonormal basis of the leading directions of the inputs that reference samples bring to the matrix,

    G ← G − (G Vᵀ) V

removes from every row of the gradient what lies in their span. For an input `x = Vᵀ a` in that span,
`(W − η G̃) x = W x`: the matrix's outputs do not change at all, to any order, however many steps go along such
gradients. This is gradient projection memory (Saha et al., ICLR 2021, section 4) and the null space of Wang et al.
(CVPR 2021).

A vector (a norm's gain, a bias) multiplies or shifts single numbers: any change of it changes outputs for some
reference input, so its gradient is removed completely. Other tensors without a basis keep their gradient.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch

from ..checks import order_gradients
from ..engines.processes import ALONE, Processes
from ..geometry import leading_directions, ratio
from ..kernels.factory import make_rows_kernel
from ..kernels.policy import clipping_factor
from ..kernels.rows import TorchRows, squared_norm
from ..projection import RESIDUAL_FLOOR
from ..storage import Read, save_tensors
from .protected import InputStats, Protected
from .segments import Segment, find_cuts, split_piece


METHODS = ("orthogonal", "monitor")

# Directions of a matrix if no rank is given, and the most that may be asked for.
DEFAULT_RANK = 96
MOST_DIRECTIONS = 4096

# Elements of an embedding's gradient that are copied at a time.
_CHUNK = 1 << 24


def most_directions(width: int, rank: int) -> int:
    """Return the most directions of a matrix with inputs of `width` dimensions: at most half, so that it can learn."""
    return min(rank, max(1, width // 2))


class InputSubspace:
    """The bases of the reference inputs of a model's weight matrices, ready to be projected out of gradients."""

    geometry = None
    sharded = False  # every process has the whole of it, whatever its gradients

    def __init__(
        self,
        names: Sequence[str],
        protected: Sequence[Protected],
        sizes: Sequence[int],
        device: torch.device,
        offsets: Sequence[int] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Wrap finished bases; most callers want `Subspace.from_gradients` with scope `inputs`.

        Args:
            names: the names of the tensors.
            protected: how each is protected.
            sizes: the number of elements of each (of this process's piece).
            device: where the gradients are.
            offsets: the first element of each piece in the flattened tensor; None: pieces are whole.
            processes: those that gradients may be split over.
        """
        self.names = tuple(names)
        self.protected = list(protected)
        self.sizes = list(sizes)
        self.device = device
        self.processes = processes
        self._offsets = list(offsets) if offsets is not None else [0] * len(self.names)
        self._kernels: dict[str, TorchRows] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kernels": {}}

    @property
    def rank(self) -> int:
        """The largest number of directions of any matrix."""
        return max((item.basis.shape[0] for item in self.protected if item.basis is not None), default=0)

    @classmethod
    @torch.no_grad()
    def from_gradients(cls, gradients: Sequence[dict[str, torch.Tensor]], rank: int | None = None) -> "InputSubspace":
        """Take the inputs' directions from reference gradients, which `Subspace.from_gradients` has checked."""
        names, protected, sizes = [], [], []
        for name in gradients[0]:
            present = [gradient[name] for gradient in gradients if gradient[name] is not None]
            if not present:
                continue
            names.append(name)
            sizes.append(present[0].numel())
            device = present[0].device
            if not any(gradient.any() for gradient in present):
                protected.append(Protected())  # not covered
                continue
            if present[0].dim() < 2:
                protected.append(Protected(frozen=True))
                continue
            # A convolution's inputs are patches of all its channels; experts are matrices, one after another.
            width = present[0][0].numel() if present[0].dim() > 3 else present[0].shape[-1]
            rows = [tensor.double().reshape(-1, width) for tensor in present]
            rows = torch.cat([ratio(row, row.norm()) for row in rows])
            most = most_directions(width, DEFAULT_RANK) if rank is None else rank
            protected.append(Protected(leading_directions(rows, most)))
        return cls(names, protected, sizes, device)

    @torch.no_grad()
    def measure(self, changes: Iterable[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure a change of the weights, given tensor by tensor; see `Subspace.measure`.

        Returns:
            the norm of the part that lies in the spans, float64 `[1]`, and the squared norm of the change, 0-dim.
        """
        _, sums = self._measure(TorchRows(), changes, keep=False)
        return sums[:, 1].sum().sqrt()[None], sums[:, 0].sum()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all numbers of the subspace by name, contiguous, each under its kind: `basis.<name>` and so on."""
        tensors, stored = {}, set()
        for name, item in zip(self.names, self.protected, strict=True):
            if item.basis is not None:
                # Matrices with the same inputs share a basis, but tensors of a file cannot share memory.
                shared = item.basis.untyped_storage().data_ptr() in stored
                tensors[f"basis.{name}"] = item.basis.clone() if shared else item.basis.contiguous()
                stored.add(item.basis.untyped_storage().data_ptr())
            if item.tokens is not None:
                tensors[f"tokens.{name}"] = item.tokens.to(torch.uint8).contiguous()
            if item.unreached:
                tensors[f"unreached.{name}"] = torch.ones(1, dtype=torch.uint8)
        return tensors

    def save(self, path: str) -> None:
        """Write the subspace to a safetensors file, under a temporary name first; `Subspace.load` reads it."""
        kept = [
            {"name": name, "size": size, "transposed": item.transposed, "width": item.width, "frozen": item.frozen}
            for name, size, item in zip(self.names, self.sizes, self.protected, strict=True)
        ]
        save_tensors(path, self.tensors(), {"inputs": json.dumps(kept)})

    @classmethod
    def restore(cls, read: Read, kept: str, stored: set[str], device: torch.device | str) -> "InputSubspace":
        """Make a subspace from what `save` wrote, the text `kept` and the tensors `stored`; see `Subspace.load`."""
        items, protected = json.loads(kept), []
        for item in items:
            name, tokens = item["name"], None
            basis = read(f"basis.{name}").to(device) if f"basis.{name}" in stored else None
            if f"tokens.{name}" in stored:
                tokens = read(f"tokens.{name}").bool().to(device)
            flags = {key: item[key] for key in ("transposed", "width", "frozen")}
            protected.append(Protected(basis, tokens=tokens, unreached=f"unreached.{name}" in stored, **flags))
        sizes = [item["size"] for item in items]
        return cls([item["name"] for item in items], protected, sizes, torch.device(device))

    def find_covered(self) -> list[bool]:
        """Return for each tensor whether it is protected."""
        return [item.covered for item in self.protected]

    def projection(self, method: str = "orthogonal", kernel: str = "auto") -> Callable[..., InputStats]:
        """Return the projection of gradients given in the order of `names`.

        Args:
            method: `orthogonal` or `monitor`.
            kernel: `triton`, `torch`, or `auto` for triton if it runs here.

        Returns:
            `project(gradients, max_norm=None, measure=False) -> InputStats`; see `projection.make_projection`.

        Raises:
            ValueError: an unknown method or kernel, a kernel that cannot run here.
        """
        if method not in METHODS:
            raise ValueError(f"`method` is {method!r}; allowed with scope inputs: {', '.join(METHODS)}")
        if kernel not in self._kernels:
            self._kernels[kernel] = make_rows_kernel(kernel, self.device)
        chosen = self._kernels[kernel]

        @torch.no_grad()
        def project(given, max_norm: float | None = None, measure: bool = False) -> InputStats:
            gradients = [None if gradient is None else gradient.contiguous() for gradient in given]
            coefficients, sums = self._measure(chosen, enumerate(gradients))
            kept = sums[:, 0] - (0 if method == "monitor" else sums[:, 1])
            total = sums[:, 0].sum()
            norm = torch.where(total.isfinite(), kept.clamp(min=0).sum(), total).sqrt().float()
            scale = None if method == "monitor" else clipping_factor(norm, max_norm)
            if method != "monitor":
                self._apply(chosen, gradients, coefficients, norm.isfinite(), scale)
                for gradient, dense in zip(given, gradients, strict=True):
                    if dense is not gradient:
                        gradient.copy_(dense)
            residual = None
            if measure:
                _, left = self._measure(chosen, enumerate(gradients), keep=False)
                before = sums[:, 0].sqrt() * (1 if scale is None else scale)
                floor = torch.maximum(left[:, 0].sqrt(), RESIDUAL_FLOOR * before)
                # A frozen tensor is zero now, and so is its residual; `monitor` leaves it whole, with a residual of 1.
                residual = ratio(left[:, 1].sqrt(), floor).max()
            return InputStats(norm, sums, residual)

        return project

    @torch.no_grad()
    def project_(self, gradients: dict[str, torch.Tensor | None], method: str = "orthogonal", kernel: str = "auto"):
        """Project gradients in place and measure what was removed and what is left; see `Subspace.project_`.

        Raises:
            ValueError: an unknown method (`conflict` has no meaning here: every row of a matrix has constraints of its
                own) or kernel, a name of the subspace that is missing, a tensor with another number of elements.
            TypeError: not a dict, or a tensor of another dtype or a sparse one.
        """
        ordered = order_gradients(gradients, self.names, self.sizes)
        return self.projection(method, kernel)(ordered, measure=True)

    @cached_property
    def _layout(self) -> tuple[list[list[Segment]], torch.Tensor]:
        """Where the rows of every tensor lie, and the index of the tensor of each row that is cut.

        Processes with pieces of gradients agree on it at the first projection, and not before: while a basis is read
        from a checkpoint, one of them may have failed.
        """
        widths = [None if item.basis is None else item.basis.shape[1] for item in self.protected]
        cuts = find_cuts(widths, self._offsets, self.sizes, self.processes) if self.processes.sharded else {}
        segments = [
            [] if width is None else split_piece(index, width, offset, size, cuts)
            for index, (width, offset, size) in enumerate(zip(widths, self._offsets, self.sizes, strict=True))
        ]
        return segments, torch.tensor([index for index, _ in sorted(cuts, key=cuts.get)], dtype=torch.int64)

    def _parts(self, index: int, tensor: torch.Tensor) -> Iterator[tuple[int | None, torch.Tensor, torch.Tensor]]:
        """Yield the matrices `[rows, columns]` that a tensor (this process's piece of it) consists of.

        Each with its basis, and with the number of the row that it is a part of; None for whole rows.
        """
        item = self.protected[index]
        if item.transposed:
            yield None, tensor.view(item.basis.shape[1], -1).T, item.basis
            return
        flat = tensor.view(-1)
        for segment in self._layout[0][index]:
            part = flat[segment.start : segment.stop].view(segment.rows, -1)
            columns = slice(segment.column, segment.column + part.shape[1])
            yield segment.cut, part, item.basis if segment.cut is None else item.basis[:, columns].contiguous()

    def _measure(self, kernel: TorchRows, tensors: Iterable[tuple[int, torch.Tensor | None]], keep: bool = True):
        """Return the coefficients of each part of each tensor (none unless kept), and the sums of `InputStats`."""
        segments, cut_tensors = self._layout
        sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=self.device)
        cuts = torch.zeros(len(cut_tensors), self.rank, dtype=torch.float32, device=self.device)
        coefficients: list[list[torch.Tensor]] = [[] for _ in self.names]
        for index, gradient in tensors:
            if gradient is None or gradient.numel() == 0:
                continue
            item = self.protected[index]
            if item.basis is None:
                sums[index, 0] = squared_norm(gradient)
                if item.tokens is not None:
                    # Not by indexing: the host would wait for the result's size. In chunks, because each is copied.
                    chunks = zip(gradient.view(-1).split(_CHUNK), self._token_mask(index).split(_CHUNK), strict=True)
                    sums[index, 1] = sum(squared_norm(chunk.masked_fill(~seen, 0.0)) for chunk, seen in chunks)
                elif item.frozen:
                    sums[index, 1] = sums[index, 0]
                continue
            for cut, part, basis in self._parts(index, gradient):
                c, squares = kernel.coefficients(part, basis)
                if cut is None:
                    sums[index] += squares
                else:
                    # A row that several processes share: its coefficients are the sum of theirs.
                    sums[index, 0] += squares[0]
                    cuts[cut, : c.shape[1]] = c[0]
                if keep:
                    coefficients[index].append(c)
        if self.processes.sharded:
            total = self.processes.sum_pieces(torch.cat([sums.flatten(), cuts.double().flatten()]))
            sums, cuts = total[: sums.numel()].view_as(sums), total[sums.numel() :].view_as(cuts).float()
            for index, parts in enumerate(segments):
                for place, segment in enumerate(parts if coefficients[index] else ()):
                    if segment.cut is not None:
                        k = self.protected[index].basis.shape[0]
                        coefficients[index][place] = cuts[segment.cut : segment.cut + 1, :k]
            sums[:, 1].index_add_(0, cut_tensors.to(self.device), cuts.double().square().sum(1))
        return coefficients, sums

    def _token_mask(self, index: int) -> torch.Tensor:
        """Return which elements of (a piece of) an embedding belong to tokens that reference samples use; bool."""
        tokens, start, size = self.protected[index].tokens, self._offsets[index], self.sizes[index]
        width = self.protected[index].width
        first, last = start // width, -(-(start + size) // width)
        return tokens[first:last].repeat_interleave(width)[start - first * width :][:size]

    def _apply(self, kernel: TorchRows, gradients, coefficients, finite: torch.Tensor, scale) -> None:
        """Remove what was measured, unless the gradient is not finite, and clip."""
        if self.device.type == "cpu" and scale is None and not finite.item():
            return
        for index, (item, gradient) in enumerate(zip(self.protected, gradients, strict=True)):
            if gradient is None or gradient.numel() == 0:
                continue
            if item.basis is not None:
                for (_, part, basis), c in zip(self._parts(index, gradient), coefficients[index], strict=True):
                    kernel.apply_(part, torch.where(finite, c, 0.0), basis, scale)
                continue
            if item.frozen:
                gradient.masked_fill_(finite, 0.0)
            elif item.tokens is not None:
                gradient.view(-1).masked_fill_(self._token_mask(index) & finite, 0.0)
            if scale is not None:
                gradient.mul_(scale)
