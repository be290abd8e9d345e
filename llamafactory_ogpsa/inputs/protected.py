"""How scope `inputs` protects one tensor, and what one projection of it measured."""

from dataclasses import dataclass

import torch

from ..geometry import ratio
from ..projection import StepFigures


@dataclass(frozen=True)
class Protected:
    """How one trainable tensor is protected.

    Attributes:
        basis: for a weight matrix: float32 `[k, in]`, orthonormal rows; None without one.
        transposed: the matrix is `[in, out]`, as in transformers' Conv1D.
        width: for an embedding: the elements of a token's row.
        tokens: for an embedding `[tokens, width]`: bool `[tokens]`, the rows that reference samples use; all of their
            gradient is removed.
        frozen: for a vector: all of its gradient is removed.
        unreached: reference inputs do not reach it (LoRA's `B` if `A` keeps them out), so nothing is removed.
    """

    basis: torch.Tensor | None = None
    transposed: bool = False
    width: int = 0
    tokens: torch.Tensor | None = None
    frozen: bool = False
    unreached: bool = False

    @property
    def covered(self) -> bool:
        """True if the tensor is protected."""
        return self.basis is not None or self.tokens is not None or self.frozen or self.unreached


@dataclass(frozen=True)
class InputStats(StepFigures):
    """What one projection measured, on the gradient's device; a figure is worked out when it is read.

    Attributes:
        norm_tensor: `‖G̃‖` of all tensors before clipping, what `clip_grad_norm_` would return; float32, 0-dim.
        sums: float64 `[tensors, 2]`: for each tensor `‖G‖²`, and the part of it that lies in its span.
        residual_tensor: the largest `‖G̃ Vᵀ‖ / ‖G̃‖` of any tensor; None if it was not measured.
    """

    norm_tensor: torch.Tensor
    sums: torch.Tensor
    residual_tensor: torch.Tensor | None

    has_cosines = False

    @property
    def removed(self) -> float:
        """`‖G − G̃‖ / ‖G‖`, from 0 to 1; for `monitor` what `orthogonal` would have removed."""
        return ratio(self.sums[:, 1].sum().sqrt(), self.sums[:, 0].sum().sqrt()).item()
