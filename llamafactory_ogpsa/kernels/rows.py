"""The two passes of scope `inputs`, over one matrix at a time.

For a gradient `G [rows, in]` and a basis `V [k, in]` with orthonormal rows, `C = G Vᵀ` and `G ← s (G − C V)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


# At most so many squares of a vector's numbers are summed in float32.
_LONGEST_ROW = 1024


class TorchRows:
    """The passes as two matrix products. Results are bitwise the same in every run on the same machine."""

    def coefficients(self, gradient: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure a gradient along a basis.

        Args:
            gradient: float32, bfloat16 or float16 `[rows, in]`.
            basis: float32 `[k, in]`, contiguous, on the same device.

        Returns:
            `C`, float32 `[rows, k]`, and `(‖G‖², ‖C‖²)`, float64 `[2]`.
        """
        gradient = gradient.float()
        with exact_products():
            coefficients = gradient @ basis.T
        return coefficients, torch.stack([squared_norm(gradient), squared_norm(coefficients)])

    def apply_(
        self, gradient: torch.Tensor, coefficients: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor | None
    ) -> None:
        """Change a gradient in place: `G ← s (G − C V)`, computed in float32 and rounded at the write.

        Args:
            gradient: as above.
            coefficients: float32 `[rows, k]`; zeros leave finite values as they are.
            basis: as above.
            scale: float32, 0-dim, or None for one.
        """
        result = gradient if gradient.dtype == torch.float32 else gradient.float()
        with exact_products():
            result.addmm_(coefficients, basis, alpha=-1)
        if scale is not None:
            result.mul_(scale)
        if result is not gradient:
            gradient.copy_(result)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, even if a run allows TF32 for its own products."""
    matmul = torch.backends.cuda.matmul
    # If a run uses the newer setting, torch raises when the older one is read.
    setting, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        yield
    finally:
        setattr(matmul, setting, before)


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return the squared norm, float64, 0-dim; sums within a row are float32, rows are added in float64.

    A vector counts as rows of `_LONGEST_ROW`: on the CPU, torch's float32 norm of 10⁸ numbers is wrong by some percent
    (https://github.com/pytorch/pytorch/issues/68326).
    """
    if tensor.dim() > 1 and tensor.numel() > 0:
        parts = [tensor.reshape(-1, tensor.shape[-1])]
    else:
        flat = tensor.reshape(-1)
        whole = flat.numel() // _LONGEST_ROW * _LONGEST_ROW
        parts = [flat[:whole].view(-1, _LONGEST_ROW), flat[None, whole:]]
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts]
    return torch.cat(norms).double().square().sum()
