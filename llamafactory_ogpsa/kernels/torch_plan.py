"""The two passes in plain torch: the reference implementation, and the one for CPUs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .basis import Piece, ResidentBasis
from .plan import TINY_SQUARE, Gradients, Plan
from .policy import orthogonal_step


# Elements of the float32 work table. On a CPU it fits the cache, so that memory is read once; elsewhere it is so large
# that the time of launches does not matter.
WORK_NUMEL = {"cpu": 1 << 18}
WORK_NUMEL_ELSEWHERE = 1 << 24


class Chunk(NamedTuple):
    """The part of a piece that is worked on at a time.

    Attributes:
        piece: the piece.
        where: its elements in the flattened parameter tensor, None for all.
        basis: view `[rank, length]` of the basis.
        work: view float32 `[rank + 1, length]` of the work table.
        sums: view float32 `[rank + 1]` of the table of partial sums, the last entry for the squared norm.
    """

    piece: Piece
    where: slice | None
    basis: torch.Tensor
    work: torch.Tensor
    sums: torch.Tensor


class TorchPlan(Plan):
    """The plan whose passes are torch calls on one chunk after another.

    Products and the sums over a chunk are float32, by torch's cascading sum, and the chunks are added in float64
    (float32 on devices other than CPU and CUDA, which need not have float64): BLAS dot products of this length
    would be faster by a quarter but lose 2e-5 on gradients of one sign.
    """

    def __init__(self, source: ResidentBasis, numels: Sequence[int], num_groups: int, rank: int) -> None:
        super().__init__(source, numels, num_groups, rank)
        size = WORK_NUMEL.get(self.device.type, WORK_NUMEL_ELSEWHERE) // (rank + 1) // 16 * 16
        longest = max((piece.length for piece in source.pieces), default=0)
        work = torch.empty(rank + 1, min(size, longest), dtype=torch.float32, device=self.device)
        starts = [range(0, piece.length, size) for piece in source.pieces]
        self._partials = torch.zeros(sum(map(len, starts)), rank + 1, dtype=torch.float32, device=self.device)
        self._sum_dtype = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        group_chunks = torch.zeros(num_groups, dtype=torch.int64)
        self._chunks: list[list[Chunk]] = [[] for _ in source.pieces]
        rows = iter(self._partials)
        for piece, cuts, chunks in zip(source.pieces, starts, self._chunks, strict=True):
            group_chunks[piece.group] += len(cuts)
            whole = piece.length == numels[piece.tensor] and len(cuts) == 1
            for start in cuts:
                basis = piece.basis[:, start : start + size]
                first, length = piece.start + start, basis.shape[1]
                where = None if whole else slice(first, first + length)
                chunks.append(Chunk(piece, where, basis, work[:, :length], next(rows)))
        self._group_chunks = group_chunks.to(self.device)

    @torch.no_grad()
    def coefficients(self, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        return _split(self._sums(self._dense(gradients)[0]).float())

    @torch.no_grad()
    def apply_(self, gradients: Gradients, delta: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        self._check_table("delta", delta, (self.num_groups, self.rank))
        if scale is not None:
            self._check_table("scale", scale, ())
        dense, copied = self._dense(gradients)
        self._write(dense, delta, scale)
        for gradient, copy in copied:
            gradient.copy_(copy)

    @torch.no_grad()
    def orthogonal_(
        self, gradients: Gradients, inverse_gram: torch.Tensor, max_norm: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._check_table("inverse_gram", inverse_gram, (self.num_groups, self.rank, self.rank))
        dense, copied = self._dense(gradients)
        sums = self._sums(dense)
        delta, scale, norm = orthogonal_step(*_split(sums), inverse_gram, max_norm)
        self._write(dense, delta, scale)
        for gradient, copy in copied:
            gradient.copy_(copy)
        return *_split(sums.float()), norm

    def _parts(self, dense: Gradients) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Yield each chunk of a tensor with a gradient, and its part of it, while the chunk's basis may be read."""
        flat = [None if gradient is None else gradient.view(-1) for gradient in dense]
        for bucket in self._source.load():
            for i in bucket:
                for chunk in self._chunks[i]:
                    gradient = flat[chunk.piece.tensor]
                    if gradient is not None:
                        yield chunk, gradient if chunk.where is None else gradient[chunk.where]

    def _sums(self, dense: Gradients) -> torch.Tensor:
        """Return `[num_groups, rank + 1]`, the sums over each group's chunks."""
        self._partials.zero_()
        for chunk, gradient in self._parts(dense):
            products, last = chunk.work[:-1], chunk.work[-1]
            # Copied first: a product of two low-precision tensors would be rounded before it reached the float32
            # output, and one of mixed precision is slower than the copy.
            gradient = gradient if gradient.dtype == torch.float32 else last.copy_(gradient)
            basis = chunk.basis if chunk.basis.dtype == torch.float32 else products.copy_(chunk.basis)
            torch.mul(basis, gradient, out=products)
            torch.mul(gradient, gradient, out=last)
            torch.sum(chunk.work, 1, out=chunk.sums)
        sums = torch.segment_reduce(
            self._partials.to(self._sum_dtype), "sum", lengths=self._group_chunks, axis=0, initial=0.0, unsafe=True
        )
        sums[:, :-1].masked_fill_(sums[:, -1:] < TINY_SQUARE, 0.0)
        return sums

    def _write(self, dense: Gradients, delta: torch.Tensor, scale: torch.Tensor | None) -> None:
        untouched = [False] * self.num_groups
        if self.device.type == "cpu":
            # On other devices reading these values would make the host wait.
            scale = None if scale is not None and scale.item() == 1.0 else scale
            untouched = (delta == 0.0).all(-1).tolist() if scale is None else untouched

        rows = delta.unbind()
        for chunk, gradient in self._parts(dense):
            if untouched[chunk.piece.group]:
                continue

            basis, last = chunk.work[:-1], chunk.work[-1]
            basis = chunk.basis if chunk.basis.dtype == torch.float32 else basis.copy_(chunk.basis)
            result = gradient if gradient.dtype == torch.float32 else last.copy_(gradient)
            result.addmv_(basis.t(), rows[chunk.piece.group])
            if scale is not None:
                result.mul_(scale)
            if result is not gradient:
                gradient.copy_(result)


def _split(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sums[:, :-1].contiguous(), sums[:, -1].contiguous()
