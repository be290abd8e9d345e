"""The Triton kernels: partial sums, their reduction, and the write.

A program finds its work in tables, so that one launch serves any number of tensors:

- `pieces`, int64 `[5, num_pieces]`: the basis's address, its kind, the number of elements (which is also the distance
  between the basis's rows), the group and the first tile of each piece;
- `gradients`, int64 `[2, num_pieces]`: the gradient's address (0 for none) and its kind;
- `tile_piece`, int32 `[num_tiles]`: the piece each tile belongs to; a tile is `TILE` consecutive elements.

A kind is twice the dtype's index in `GRADIENT_DTYPES`, plus one where the elements cannot be read 16 bytes at a time.
`GRADIENT_KINDS` and `BASIS_KINDS` are the sets of kinds that occur, one bit each: code exists only for these, and
a program branches only where there are several.
"""

import triton
import triton.language as tl

from .plan import TINY_SQUARE


# Rows of the basis that are worked on at a time. More would not fit the registers: with a higher rank a tile of the
# gradient is read again, from the cache, for every eight rows.
MAX_ROWS = 8

_TINY = tl.constexpr(TINY_SQUARE)


@triton.jit
def _load(address, kind, rows, num_rows, stride, first, lanes, left, KINDS: tl.constexpr):
    """Read `[rows, lanes]` elements as float32, zeros beyond `num_rows` and `left`."""
    values = tl.zeros([rows.shape[0], lanes.shape[0]], tl.float32)
    for k in tl.static_range(6):
        if (KINDS >> k) & 1:
            if KINDS == 1 << k:
                values = _load_kind(address, rows, num_rows, stride, first, lanes, left, k)
            elif kind == k:
                values = _load_kind(address, rows, num_rows, stride, first, lanes, left, k)
    return values


@triton.jit
def _load_kind(address, rows, num_rows, stride, first, lanes, left, KIND: tl.constexpr):
    if KIND % 2 == 0:
        stride = stride // 8 * 8
    pointers, mask = _locate(address, first, lanes, left, KIND)
    mask = mask[None, :] & (rows < num_rows)[:, None]
    return tl.load(pointers[None, :] + rows[:, None] * stride, mask, other=0.0).to(tl.float32)


@triton.jit
def _store(values, address, kind, first, lanes, left, KINDS: tl.constexpr):
    """Write float32 `[1, lanes]` in the gradient's dtype, nothing from `left` on."""
    for k in tl.static_range(6):
        if (KINDS >> k) & 1:
            if KINDS == 1 << k:
                _store_kind(values, address, first, lanes, left, k)
            elif kind == k:
                _store_kind(values, address, first, lanes, left, k)


@triton.jit
def _store_kind(values, address, first, lanes, left, KIND: tl.constexpr):
    pointers, mask = _locate(address, first, lanes, left, KIND)
    tl.store(pointers[None, :], values.to(pointers.dtype.element_ty), mask[None, :])


@triton.jit
def _locate(address, first, lanes, left, KIND: tl.constexpr):
    # Rounding down changes nothing for this kind, and lets the compiler use wide accesses. A hint (tl.multiple_of) on
    # the address would hold in the other kinds' branches too; the pointer, which only this branch has, needs one
    # because the compiler loses the alignment in the cast.
    if KIND % 2 == 0:
        address = address // 16 * 16
        left = left // 8 * 8
    if KIND // 2 == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif KIND // 2 == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if KIND % 2 == 0:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + first + lanes, lanes < left


@triton.jit
def _tile(tile, gradients, pieces, tile_piece, num_pieces, TILE: tl.constexpr):
    """Look a tile up: gradient address and kind, basis address and kind, length, group and first element."""
    piece = tl.load(tile_piece + tile)
    gradient = tl.load(gradients + piece)
    gradient_kind = tl.load(gradients + num_pieces + piece)
    basis = tl.load(pieces + piece)
    basis_kind = tl.load(pieces + num_pieces + piece)
    length = tl.load(pieces + 2 * num_pieces + piece)
    group = tl.load(pieces + 3 * num_pieces + piece)
    start = (tile - tl.load(pieces + 4 * num_pieces + piece)) * TILE
    return gradient, gradient_kind, basis, basis_kind, length, group, start


@triton.jit(do_not_specialize=["first", "num_pieces", "num_tiles"])
def partial_sums_kernel(
    gradients,
    pieces,
    tile_piece,
    partials,
    first,
    num_pieces,
    num_tiles,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    GRADIENT_KINDS: tl.constexpr,
    BASIS_KINDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a tile's sums of `B g` and `g²` to a column of `partials`, float32 `[RANK + 1, num_tiles]`."""
    tile = (first + tl.program_id(0)).to(tl.int64)
    gradient, gradient_kind, basis, basis_kind, length, _, start = _tile(
        tile, gradients, pieces, tile_piece, num_pieces, TILE
    )
    # A missing gradient adds zeros: its tiles are not read.
    size = tl.where(gradient == 0, 0, tl.minimum(length - start, TILE)).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    no_row = tl.arange(0, 1)
    squares = tl.zeros([1, BLOCK // 4], tl.float32)
    for top in tl.static_range(0, RANK, ROWS):
        rows = top + tl.arange(0, ROWS)
        dots = tl.zeros([ROWS, BLOCK // 4], tl.float32)
        i = tl.full([], 0, tl.int32)
        while i < size:
            left = length - start - i
            g = _load(gradient, gradient_kind, no_row, 1, 0, start + i, lanes, left, GRADIENT_KINDS)
            b = _load(basis, basis_kind, rows, RANK, length, start + i, lanes, left, BASIS_KINDS)
            # Four neighbours, which one thread holds, are added at once: a quarter of the registers, shorter chains.
            dots += tl.sum(tl.reshape(b * g, [ROWS, BLOCK // 4, 4]), 2)
            if top == 0:
                squares += tl.sum(tl.reshape(g * g, [1, BLOCK // 4, 4]), 2)
            i += BLOCK
        tl.store(partials + rows.to(tl.int64) * num_tiles + tile, tl.sum(dots, 1), rows < RANK)
    tl.store(partials + (no_row + RANK).to(tl.int64) * num_tiles + tile, tl.sum(squares, 1))


@triton.jit(do_not_specialize=["num_tiles", "num_groups"])
def reduce_kernel(
    partials,
    group_tiles,
    inverse_gram,
    products_out,
    squared_norms_out,
    delta_out,
    norms,
    num_tiles,
    num_groups,
    SOLVE: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a group's tiles, `group_tiles[group]` to the next, in float64; choose its δ by the policy `orthogonal`.

    Writes `products_out` float32 `[num_groups, RANK]` and `squared_norms_out` float32 `[num_groups]`; with SOLVE also
    `delta_out` float32 `[num_groups, RANK]`, `-A p`, and `norms` float64 `[2, num_groups]`, the squared norm before
    and after the projection. In torch this is `policy.orthogonal_step`.
    """
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(group_tiles + group)
    end = tl.load(group_tiles + group + 1)
    rows = tl.arange(0, PADDED)
    columns = tl.arange(0, BLOCK)
    dots = tl.zeros([PADDED, BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    at = begin + columns
    while begin < end:
        mask = (rows < RANK)[:, None] & (at < end)[None, :]
        table = partials + at
        dots += tl.load(table[None, :] + rows.to(tl.int64)[:, None] * num_tiles, mask, other=0.0).to(tl.float64)
        squares += tl.load(table + RANK * num_tiles.to(tl.int64), at < end, other=0.0).to(tl.float64)
        begin += BLOCK
        at += BLOCK
    squared_norm = tl.sum(squares, 0)
    products = tl.where(squared_norm < _TINY, 0.0, tl.sum(dots, 1))
    tl.store(products_out + group * RANK + rows, products.to(tl.float32), rows < RANK)
    tl.store(squared_norms_out + group, squared_norm.to(tl.float32))
    if SOLVE:
        entries = group * RANK * RANK + rows[:, None] * RANK + rows[None, :]
        inside = (rows < RANK)[:, None] & (rows < RANK)[None, :]
        a = tl.load(inverse_gram + entries, inside, other=0.0).to(tl.float64)
        removed = tl.sum(a * products[None, :], 1)
        tl.store(delta_out + group * RANK + rows, (-removed).to(tl.float32), rows < RANK)
        kept = squared_norm - tl.sum(products * removed, 0)
        tl.store(norms + group, squared_norm)
        tl.store(norms + num_groups + group, tl.where(kept < 0.0, 0.0, kept))


@triton.jit
def _decide(norms, max_norm, num_groups, BLOCK: tl.constexpr):
    """Return the clipping factor, whether the gradients are finite, and the norm. A negative max_norm: no clipping."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    kept = tl.zeros([BLOCK], tl.float64)
    i = tl.full([], 0, tl.int32)
    while i < num_groups:
        mask = i + columns < num_groups
        total += tl.load(norms + i + columns, mask, other=0.0)
        kept += tl.load(norms + num_groups + i + columns, mask, other=0.0)
        i += BLOCK
    # In float32, so that the caller sees the same sum.
    total = tl.sum(total, 0).to(tl.float32)
    kept = tl.sum(kept, 0)
    finite = tl.abs(total) < float("inf")
    # Made a tensor for the interpreter: that of Triton 3.2 has no `|` of a bool and a tensor.
    max_norm = tl.full([], max_norm, tl.float32)
    norm = tl.sqrt(tl.where(finite, kept, total.to(tl.float64)))
    factor = max_norm / (norm + 1e-6)
    # NaN stays NaN, as in torch.
    factor = tl.where((max_norm < 0.0) | (factor > 1.0), 1.0, factor)
    return factor.to(tl.float32), finite, norm.to(tl.float32)


@triton.jit(do_not_specialize=["first", "last", "num_pieces", "num_groups"])
def apply_kernel(
    gradients,
    pieces,
    tile_piece,
    delta,
    scale,
    norms,
    norm_out,
    max_norm,
    first,
    last,
    num_pieces,
    num_groups,
    DECIDE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    GRADIENT_KINDS: tl.constexpr,
    BASIS_KINDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write `s·(g + Bᵀ δ)` to the tiles from `first` to before `last`.

    With DECIDE every program computes `s`, from the same table in the same order, and the first one writes the norm of
    what is left to `norm_out`, float32; else all read `scale`.
    """
    if DECIDE:
        s, finite, norm = _decide(norms, max_norm, num_groups, GROUPS)
        if tl.program_id(0) == 0:
            tl.store(norm_out, norm)
    else:
        s = tl.load(scale)
    all_rows = tl.arange(0, PADDED)
    lanes = tl.arange(0, BLOCK)
    no_row = tl.arange(0, 1)
    # From the end backwards: that is what the pass before this one left in the cache.
    tile = last.to(tl.int64) - 1 - tl.program_id(0)
    while tile >= first:
        gradient, gradient_kind, basis, basis_kind, length, group, start = _tile(
            tile, gradients, pieces, tile_piece, num_pieces, TILE
        )
        d = tl.load(delta + group * RANK + all_rows, all_rows < RANK, other=0.0)
        if DECIDE:
            d = tl.where(finite, d, 0.0)
        # Without a write, values that do not change keep their bits, also NaN.
        changes = (gradient != 0) & ((s != 1.0) | (tl.max((d != 0.0).to(tl.int32), 0) > 0))
        size = tl.where(changes, tl.minimum(length - start, TILE), 0).to(tl.int32)
        i = tl.full([], 0, tl.int32)
        while i < size:
            left = length - start - i
            g = _load(gradient, gradient_kind, no_row, 1, 0, start + i, lanes, left, GRADIENT_KINDS)
            for top in tl.static_range(0, RANK, ROWS):
                rows = top + tl.arange(0, ROWS)
                b = _load(basis, basis_kind, rows, RANK, length, start + i, lanes, left, BASIS_KINDS)
                part = tl.load(delta + group * RANK + rows, rows < RANK, other=0.0)
                if DECIDE:
                    part = tl.where(finite, part, 0.0)
                g += tl.sum(b * part[:, None], 0)[None, :]
            _store(s * g, gradient, gradient_kind, start + i, lanes, left, GRADIENT_KINDS)
            i += BLOCK
        tile -= tl.num_programs(0)


# With TRITON_INTERPRET=1 in the environment the decorator returns another type, which takes tensors on the CPU.
INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)
