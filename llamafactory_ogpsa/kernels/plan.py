"""What every implementation offers, and the checks that they share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from .basis import ResidentBasis


Gradients = Sequence[torch.Tensor | None]

# Squares of smaller numbers vanish in float32: if the squared norm of a group is below this, its products count as
# zero, so that nothing is removed that the figures could not show.
TINY_SQUARE = 2.0**-100

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plan(ABC):
    """The two passes over one set of parameter tensors, prepared for one basis.

    Built by `make_plan`; good until the basis is replaced. Everywhere, `gradients` holds one entry per basis tensor,
    in the same order: a float32, bfloat16 or float16 tensor with as many elements on the plan's device, of any shape,
    strides and alignment; dtypes may be mixed. An entry is None if a parameter has no gradient in this step; that
    counts as zero. A gradient that is not contiguous is copied, worked on, and copied back; no other is copied.
    Results are bitwise the same in every run on the same machine.

    `source` is the basis in pieces, `numels` the number of elements of each parameter tensor.
    """

    def __init__(self, source: ResidentBasis, numels: Sequence[int], num_groups: int, rank: int) -> None:
        self.device = source.device
        self.num_groups = num_groups
        self.rank = rank
        self._source = source
        self._numels = list(numels)

    @abstractmethod
    def coefficients(self, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure the gradient along the basis, in one read of both.

        `p_k = Σ B_i g_i` and `‖g‖²_k = Σ ‖g_i‖²` over the tensors `i` of group `k`. The products `p` are with the
        basis as stored, whose rows are orthonormal up to the rounding of its dtype.

        Returns:
            the products, float32 `[num_groups, rank]`, and the squared norms, float32 `[num_groups]`, both on the
            plan's device. A group without gradients has zeros, and `p_k` is zero if `‖g‖²_k` is below `TINY_SQUARE`.

        Raises:
            ValueError: the gradients' number, sizes or device differ from the plan's.
            TypeError: a gradient's dtype is none of float32, bfloat16 and float16.
        """

    @abstractmethod
    def apply_(self, gradients: Gradients, delta: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Change the gradients in place: `g_i ← s·(g_i + B_iᵀ δ_k)`, computed in float32 and rounded at the write.

        If `δ_k` is zero and `s` is one or absent, non-finite values stay as they are too.

        Args:
            gradients: the gradients to change.
            delta: `δ`, float32 `[num_groups, rank]` on the plan's device.
            scale: `s`, float32, 0-dim, on the plan's device, or None for one.

        Raises:
            ValueError, TypeError: see `coefficients`; also if `delta` has another shape.
        """

    @abstractmethod
    def orthogonal_(
        self, gradients: Gradients, inverse_gram: torch.Tensor, max_norm: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Measure, remove what lies in the span of the basis, and clip, in one call and in place.

        The same as `coefficients`, `policy.orthogonal_step` and `apply_`, up to the rounding between them. If the
        gradient is not finite, nothing is removed and `s` follows from its norm, as without projection; without
        `max_norm` it is then left as it is (torch on an accelerator adds zeros to it, which turns -0 into 0 and may
        give a NaN other bits). A parameter without gradient counts in the norm as a gradient of zeros would.

        Args:
            gradients: the gradients to change.
            inverse_gram: float32 `[num_groups, rank, rank]` on the plan's device; close to the identity, with rows and
                columns of zeros for directions that a group lacks.
            max_norm: the largest norm to leave, or None not to clip.

        Returns:
            the products and squared norms before the change, as from `coefficients`, and the norm after it, before
            clipping, float32, 0-dim: finite exactly if the sum of the squared norms is.

        Raises:
            ValueError, TypeError: see `coefficients`; also if `inverse_gram` has another shape.
        """

    def warmup(self, dtypes: Sequence[torch.dtype]) -> None:
        """Compile in advance what gradients of these dtypes (one per parameter tensor) will need, if anything."""

    def _check_table(self, name: str, table: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(table.shape) != shape or table.dtype != torch.float32 or table.device != self.device:
            raise ValueError(
                f"{name} must be float32 {list(shape)} on {self.device}, "
                f"not {table.dtype} {list(table.shape)} on {table.device}."
            )

    def _dense(
        self, gradients: Gradients
    ) -> tuple[list[torch.Tensor | None], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Check the gradients and copy those that are not contiguous.

        Returns:
            the gradients, each contiguous, and a pair (gradient, its contiguous copy) for each that was copied.
        """
        if len(gradients) != len(self._numels):
            raise ValueError(f"{len(gradients)} gradients do not go with a basis of {len(self._numels)} tensors.")

        dense = list(gradients)
        copied = []
        for i, (gradient, numel) in enumerate(zip(dense, self._numels, strict=True)):
            if gradient is None:
                continue

            if gradient.dtype not in GRADIENT_DTYPES:
                raise TypeError(f"gradients must be float32, bfloat16 or float16, not {gradient.dtype}.")

            if gradient.numel() != numel or gradient.device != self.device:
                raise ValueError(
                    f"gradient {i} has {gradient.numel()} elements on {gradient.device}, "
                    f"its basis tensor {numel} on {self.device}."
                )

            if not gradient.is_contiguous():
                dense[i] = gradient.contiguous()
                copied.append((gradient, dense[i]))

        return dense, copied
