"""The two passes of scope `inputs` in Triton: one launch per matrix and pass, with the norms in the same read."""

import torch
import triton
import triton.language as tl

from .rows import TorchRows


# Directions that fit a program's registers; more go to torch's matrix products.
MAX_DIRECTIONS = 128
# Rows of a program, and columns and (in the second pass) directions that it has in flight: with these sizes no
# register spills on sm_90.
_ROWS = 32
_COLUMNS = 32
_CHUNK = 32


@triton.jit(do_not_specialize=["rows"])
def rows_coefficients_kernel(
    gradient,
    basis,
    coefficients,
    sums,
    rows,
    columns,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write `C` of `ROWS` rows, and the sums of squares of `G` and `C` to `sums`, float32 `[2, programs]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    direction = tl.arange(0, PADDED)
    lanes = tl.arange(0, COLUMNS)
    inside = row < rows
    c = tl.zeros([ROWS, PADDED], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = tl.full([], 0, tl.int32)
    while start < columns:
        column = start + lanes
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        g = tl.load(gradient + at, inside[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)
        at = direction.to(tl.int64)[None, :] * columns + column[:, None]
        v = tl.load(basis + at, (direction < K)[None, :] & (column < columns)[:, None], other=0.0)
        c += tl.dot(g, v, input_precision=PRECISION)
        squares += g * g
        start += COLUMNS
    at = row.to(tl.int64)[:, None] * K + direction[None, :]
    tl.store(coefficients + at, c, inside[:, None] & (direction < K)[None, :])
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(squares, 1), 0))
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(c * c, 1), 0))


@triton.jit(do_not_specialize=["rows"])
def rows_apply_kernel(
    gradient,
    basis,
    coefficients,
    scale,
    rows,
    columns,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Replace `ROWS` rows of `G` by `s (G − C V)`."""
    s = tl.load(scale)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    direction = tl.arange(0, PADDED)
    lanes = tl.arange(0, COLUMNS)
    inside = row < rows
    at_coefficients = row.to(tl.int64)[:, None] * K + direction[None, :]
    c = tl.load(coefficients + at_coefficients, inside[:, None] & (direction < K)[None, :], other=0.0)
    # Without a write, values that do not change keep their bits, also NaN.
    changes = (s != 1.0) | (tl.max(tl.max((c != 0.0).to(tl.int32), 1), 0) > 0)
    start = tl.where(changes, 0, columns)
    while start < columns:
        column = start + lanes
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        mask = inside[:, None] & (column < columns)[None, :]
        g = tl.load(gradient + at, mask, other=0.0).to(tl.float32)
        inner = tl.zeros([ROWS, COLUMNS], tl.float32)
        # All of C at once, in the parts that the tensor cores take, would not fit the registers.
        for first in range(0, K, CHUNK):
            some = first + tl.arange(0, CHUNK)
            at_some = row.to(tl.int64)[:, None] * K + some[None, :]
            c_some = tl.load(coefficients + at_some, inside[:, None] & (some < K)[None, :], other=0.0)
            at_basis = some.to(tl.int64)[:, None] * columns + column[None, :]
            v = tl.load(basis + at_basis, (some < K)[:, None] & (column < columns)[None, :], other=0.0)
            inner += tl.dot(c_some, v, input_precision=PRECISION)
        g = s * (g - inner)
        tl.store(gradient + at, g.to(gradient.dtype.element_ty), mask)
        start += COLUMNS


class TritonRows(TorchRows):
    """The passes as kernels that read the gradient once each; the basis, which is small, comes from the cache.

    With more than `MAX_DIRECTIONS` directions they are torch's matrix products.
    """

    def coefficients(self, gradient: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if basis.shape[0] > MAX_DIRECTIONS:
            return super().coefficients(gradient, basis)

        dense = gradient.contiguous()
        rows, columns = dense.shape
        programs = triton.cdiv(rows, _ROWS)
        coefficients = torch.empty(rows, basis.shape[0], dtype=torch.float32, device=dense.device)
        sums = torch.empty(2, programs, dtype=torch.float32, device=dense.device)
        with torch.cuda.device_of(dense):
            rows_coefficients_kernel[(programs,)](dense, basis, coefficients, sums, rows, columns, **_options(basis))
        return coefficients, sums.double().sum(1)

    def apply_(
        self, gradient: torch.Tensor, coefficients: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor | None
    ) -> None:
        if basis.shape[0] > MAX_DIRECTIONS:
            super().apply_(gradient, coefficients, basis, scale)
            return

        dense = gradient.contiguous()
        rows, columns = dense.shape
        one = torch.ones((), dtype=torch.float32, device=dense.device) if scale is None else scale
        with torch.cuda.device_of(dense):
            rows_apply_kernel[(triton.cdiv(rows, _ROWS),)](
                dense,
                basis,
                coefficients.contiguous(),
                one,
                rows,
                columns,
                CHUNK=min(_CHUNK, _padded(basis)),
                **_options(basis),
            )
        if dense is not gradient:
            gradient.copy_(dense)


def _options(basis: torch.Tensor) -> dict:
    # Three TF32 products make a float32 one on tensor cores; other backends and the interpreter multiply in float32.
    precise = "tf32x3" if basis.device.type == "cuda" and not torch.version.hip else "ieee"
    sizes = dict(K=basis.shape[0], PADDED=_padded(basis), ROWS=_ROWS, COLUMNS=_COLUMNS)
    return dict(sizes, PRECISION=precise, num_warps=8 if _padded(basis) > 64 else 4)


def _padded(basis: torch.Tensor) -> int:
    return max(16, triton.next_power_of_2(basis.shape[0]))
