"""The two passes in Triton: three launches for any number of tensors."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton

from .basis import ResidentBasis
from .plan import GRADIENT_DTYPES, Gradients, Plan
from .triton_kernels import MAX_ROWS, apply_kernel, partial_sums_kernel, reduce_kernel


class Blocks(NamedTuple):
    """How work is cut on one architecture.

    Attributes:
        block: elements that a program has in flight at a time, a multiple of 8 for each of its threads.
        warps: warps per program.
        tile: elements that a program works through.
        small_tile: the same for a small model, so that it still has many programs.
        programs: programs of the last pass per processor, each of which goes through several tiles.
    """

    block: int
    warps: int
    tile: int
    small_tile: int
    programs: int


# 256 threads, each with 16 bytes of each row. On the CPU, where the interpreter runs, small enough for small tensors
# to have several tiles.
BLOCKS = {
    "cuda": Blocks(block=2048, warps=8, tile=65536, small_tile=16384, programs=16),
    "hip": Blocks(block=2048, warps=4, tile=65536, small_tile=16384, programs=16),
    "cpu": Blocks(block=256, warps=1, tile=512, small_tile=512, programs=1),
}
# A model with fewer elements gets the smaller tiles.
SMALL_NUMEL = 1 << 28
# Partial sums that a program of the reduction has in flight at a time, as float64.
REDUCE_NUMEL = 4096

_DTYPE_SIZES = torch.tensor([dtype.itemsize for dtype in GRADIENT_DTYPES])

# How a kernel is started: _launch runs it, _compile only compiles it.
Start = Callable[..., None]


class TritonPlan(Plan):
    """The plan whose passes are Triton kernels over tables of addresses.

    The basis's table is made here, the gradients' when their addresses change. Sums over a tile are float32, because
    each thread's sums are short; the tiles are added in float64.
    """

    def __init__(self, source: ResidentBasis, numels: Sequence[int], num_groups: int, rank: int) -> None:
        super().__init__(source, numels, num_groups, rank)
        blocks = BLOCKS[_backend(self.device)]
        pieces = source.pieces
        lengths = _integers([piece.length for piece in pieces])
        tile = blocks.tile if int(lengths.sum()) >= SMALL_NUMEL else blocks.small_tile
        tiles = (lengths + tile - 1) // tile
        first_tile = _starts(tiles)
        groups = _integers([piece.group for piece in pieces])
        addresses = _integers([piece.basis.data_ptr() for piece in pieces])
        dtypes = _integers([GRADIENT_DTYPES.index(piece.basis.dtype) for piece in pieces])
        kinds = _kinds(addresses, dtypes, lengths)

        # On the host: from these the gradients' table is made when their addresses change.
        self._piece_tensor = _integers([piece.tensor for piece in pieces])
        self._piece_start = _integers([piece.start for piece in pieces])
        self._piece_length = lengths
        self._signature = None
        self._gradients = None
        self._gradient_kinds = 0

        # On the device: constant tables, and what one kernel writes for the next.
        self._num_tiles = int(first_tile[-1])
        self._spans = {b: (int(first_tile[b.start]), int(first_tile[b.stop])) for b in source.buckets}
        self._pieces = torch.stack([addresses, kinds, lengths, groups, first_tile[:-1]]).to(self.device)
        self._tile_piece = torch.arange(len(pieces), dtype=torch.int32).repeat_interleave(tiles).to(self.device)
        group_tiles = torch.zeros(num_groups, dtype=torch.int64).index_add_(0, groups, tiles)
        self._group_tiles = _starts(group_tiles).to(self.device)
        self._partials = torch.empty(rank + 1, self._num_tiles, dtype=torch.float32, device=self.device)
        self._norms = torch.empty(2, num_groups, dtype=torch.float64, device=self.device)
        self._delta = torch.empty(num_groups, rank, dtype=torch.float32, device=self.device)
        self._one = torch.ones((), dtype=torch.float32, device=self.device)

        self._programs = blocks.programs * _processors(self.device)
        padded = triton.next_power_of_2(rank)
        self._reduce_options = dict(RANK=rank, PADDED=padded, BLOCK=_power(REDUCE_NUMEL // padded, 2048), num_warps=8)
        self._sums_options = dict(
            RANK=rank,
            ROWS=min(MAX_ROWS, padded),
            BASIS_KINDS=_kind_set(kinds),
            TILE=tile,
            BLOCK=blocks.block,
            num_warps=blocks.warps,
        )
        self._apply_options = dict(self._sums_options, PADDED=padded, GROUPS=_power(num_groups, 1024))

    @torch.no_grad()
    def coefficients(self, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.cuda.device_of(self._one):
            _copied = self._upload(gradients)
            for bucket in self._source.load():
                self._sum(_launch, *self._spans[bucket])

            return self._reduce(_launch, None)

    @torch.no_grad()
    def apply_(self, gradients: Gradients, delta: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        self._check_table("delta", delta, (self.num_groups, self.rank))
        if scale is not None:
            self._check_table("scale", scale, ())
        with torch.cuda.device_of(self._one):
            copied = self._upload(gradients)
            delta = delta.contiguous()
            for bucket in self._source.load():
                self._apply(_launch, *self._spans[bucket], delta, self._one if scale is None else scale)

        for gradient, copy in copied:
            gradient.copy_(copy)

    @torch.no_grad()
    def orthogonal_(
        self, gradients: Gradients, inverse_gram: torch.Tensor, max_norm: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._check_table("inverse_gram", inverse_gram, (self.num_groups, self.rank, self.rank))
        with torch.cuda.device_of(self._one):
            copied = self._upload(gradients)
            for bucket in self._source.load():
                self._sum(_launch, *self._spans[bucket])

            products, squared_norms = self._reduce(_launch, inverse_gram.contiguous())
            # Without tiles no program writes it.
            norm = (torch.empty_like if self._num_tiles else torch.zeros_like)(self._one)
            for bucket in self._source.load():
                self._apply(_launch, *self._spans[bucket], self._delta, norm=norm, max_norm=max_norm)

        for gradient, copy in copied:
            gradient.copy_(copy)

        return products, squared_norms, norm

    def warmup(self, dtypes: Sequence[torch.dtype]) -> None:
        indices = _integers([GRADIENT_DTYPES.index(dtype) for dtype in dtypes])[self._piece_tensor]
        aligned = torch.zeros_like(indices)
        # Only the type of this table matters: nothing is launched.
        self._gradients = self._pieces
        self._gradient_kinds = _kind_set(_kinds(aligned, indices, self._piece_length))
        self._signature = None
        with torch.cuda.device_of(self._one):
            self._sum(_compile, 0, self._num_tiles)
            self._reduce(_compile, None)
            self._reduce(_compile, self._delta)
            self._apply(_compile, 0, self._num_tiles, self._delta, self._one)
            self._apply(_compile, 0, self._num_tiles, self._delta, norm=self._one)

    def _upload(self, gradients: Gradients) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Bring the table of the gradients' addresses and kinds up to date.

        Returns:
            a pair (gradient, its contiguous copy) for each that is not contiguous; the table has the copy's address.
        """
        # This part runs in every step for every tensor, the rest only after a change.
        signature = (
            [0 if g is None else g.data_ptr() if g.is_contiguous() else None for g in gradients],
            [None if g is None else g.dtype for g in gradients],
        )
        if signature == self._signature and None not in signature[0]:
            return []

        dense, copied = self._dense(gradients)
        self._signature = signature
        present = _integers([g is not None for g in dense])[self._piece_tensor]
        dtypes = _integers([0 if g is None else GRADIENT_DTYPES.index(g.dtype) for g in dense])[self._piece_tensor]
        addresses = _integers([0 if g is None else g.data_ptr() for g in dense])[self._piece_tensor]
        addresses += present * self._piece_start * _DTYPE_SIZES[dtypes]
        kinds = _kinds(addresses, dtypes, self._piece_length)
        table = torch.stack([addresses, kinds])
        if self.device.type == "cuda":
            table = table.pin_memory()
        self._gradients = table.to(self.device, non_blocking=True)
        self._gradient_kinds = _kind_set(kinds[present.bool()])
        return copied

    def _sum(self, start: Start, first: int, last: int) -> None:
        start(
            partial_sums_kernel,
            last - first,
            self._gradients,
            self._pieces,
            self._tile_piece,
            self._partials,
            first,
            self._pieces.shape[1],
            self._num_tiles,
            GRADIENT_KINDS=self._gradient_kinds,
            **self._sums_options,
        )

    def _reduce(self, start: Start, inverse_gram: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        products = torch.empty_like(self._delta)
        squared_norms = self._delta.new_empty(self.num_groups)
        start(
            reduce_kernel,
            self.num_groups,
            self._partials,
            self._group_tiles,
            self._one if inverse_gram is None else inverse_gram,
            products,
            squared_norms,
            self._delta,
            self._norms,
            self._num_tiles,
            self.num_groups,
            SOLVE=inverse_gram is not None,
            **self._reduce_options,
        )
        return products, squared_norms

    def _apply(
        self,
        start: Start,
        first: int,
        last: int,
        delta: torch.Tensor,
        scale: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        max_norm: float | None = None,
    ) -> None:
        """Write tiles `first` to before `last`; without a scale the kernel computes it, and writes the norm."""
        start(
            apply_kernel,
            min(last - first, self._programs),
            self._gradients,
            self._pieces,
            self._tile_piece,
            delta,
            self._one if scale is None else scale,
            self._norms,
            self._one if norm is None else norm,
            -1.0 if max_norm is None else float(max_norm),
            first,
            last,
            self._pieces.shape[1],
            self.num_groups,
            DECIDE=scale is None,
            GRADIENT_KINDS=self._gradient_kinds,
            **self._apply_options,
        )


def _backend(device: torch.device) -> str:
    """Return the key of `BLOCKS` for a device: cuda, hip, or cpu where the interpreter runs."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type


def _launch(kernel: triton.KernelInterface, programs: int, *arguments, **options) -> None:
    # If all tensors of a plan are empty, it has no tiles.
    if programs > 0:
        kernel[(programs,)](*arguments, **options)


def _compile(kernel: triton.KernelInterface, programs: int, *arguments, **options) -> None:
    compiled = kernel.run(*arguments, grid=(1,), warmup=True, **options)
    # Reading `run` makes Triton build the launcher and load the code. The interpreter has no such attribute.
    getattr(compiled, "run", None)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _power(number: int, largest: int) -> int:
    """Return the least power of two that is not below a number, but at most `largest`."""
    return min(triton.next_power_of_2(max(number, 1)), largest)


def _integers(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """Return where each run starts when runs of these lengths are laid end to end, and where the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _kinds(addresses: torch.Tensor, dtypes: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the kernels' kinds. Eight elements are at least 16 bytes, so rows of multiples of eight stay aligned."""
    aligned = (addresses % 16 == 0) & (lengths % 8 == 0)
    return 2 * dtypes + (~aligned).long()


def _kind_set(kinds: torch.Tensor) -> int:
    return sum(1 << kind for kind in kinds.unique().tolist())
