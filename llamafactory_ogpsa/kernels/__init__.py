"""The tensor work of gradient projection: two passes over a gradient and its basis.

For a gradient ``g`` and a basis ``B`` with ``rank`` rows, the work is

1. ``c = B g`` and ``‖g‖²`` in one read of ``g`` and ``B``;
2. ``g ← s·(g + Bᵀ Δ)`` in one more read of both and one write of ``g``,

where ``Δ`` is a few numbers chosen from ``c`` and ``s`` is the clipping factor. :func:`make_plan` prepares both for a
whole model, with Triton or with plain torch; the two give the same results to rounding.

A single launch that reads tensors small enough for one program once for both passes was considered and left out:
clipping, and leaving every gradient as it is when any value is not finite, need a sum over the whole model before the
first write. Such a launch would have to be followed by another read and write of the gradient, which at rank 2 makes
6 units of bytes (a unit being the gradient's size) against the two passes' 7, and a second set of kernels.
"""

from .factory import MAX_RANK, make_plan, triton_obstacle
from .plan import TINY_SQUARE, Plan


__all__ = ["MAX_RANK", "TINY_SQUARE", "Plan", "make_plan", "triton_obstacle"]
