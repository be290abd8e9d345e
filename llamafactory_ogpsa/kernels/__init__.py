"""The tensor work of gradient projection: two passes over a gradient and its basis, and a policy between them.

For a gradient `g` and a basis `B` with `rank` rows, the work is

1. `p = B g` and `‖g‖²` in one read of `g` and `B`;
2. `g ← s·(g + Bᵀ δ)` in one more read of both and one write of `g`,

where `δ` is a few numbers that a policy chooses from `p` and `s` is the clipping factor. `make_plan` prepares both for
a whole model, with Triton or with plain torch; the two give the same results up to rounding.

A launch that reads small tensors once for both passes was left out: clipping, and leaving every gradient as it is when
any value is not finite, need a sum over the whole model before the first write.
"""

from .factory import MAX_RANK, make_plan, triton_obstacle
from .plan import Plan


__all__ = ["MAX_RANK", "Plan", "make_plan", "triton_obstacle"]
