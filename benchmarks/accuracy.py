"""Compare the projection of one large gradient with the same in float64.

Prints for each pair of dtypes, and for a gradient of which a tenth or next to nothing lies in the span (the hardest
case for the coefficients), the relative errors of the coefficients, of the squared norm and of the projected gradient;
the largest error of an element beyond the one rounding to its dtype, relative to the largest element; and the residual,
the largest |cos| between the projected gradient and a basis direction.

    python -m benchmarks.accuracy                          # on a GPU the Triton kernels, else torch
    python -m benchmarks.accuracy --kernel torch --device cpu
"""

import argparse

import torch

from llamafactory_ogpsa.kernels import make_plan

from .devices import default_device


# Gradient dtype, basis dtype, and the share of the gradient's norm that lies in the span.
CASES = [
    (*dtypes, share)
    for dtypes in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
    for share in (0.1, 0.0)
]


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between neighbouring numbers of a dtype at these float64 values."""
    exponents = torch.frexp(values)[1].clamp(min=-120)
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), exponents - 1)


def errors(gradient: torch.Tensor, basis: torch.Tensor, kernel: str) -> dict[str, float]:
    """Project a gradient and return its errors against float64.

    Args:
        gradient: `[numel]`, of any dtype that the kernels take; changed.
        basis: float32 or bfloat16 `[rank, numel]`, nearly orthonormal.
        kernel: `auto`, `triton` or `torch`.

    Returns:
        the figures by name.
    """
    exact, rows = gradient.double(), basis.double()
    inverse_gram = torch.linalg.inv(rows @ rows.T)
    c, sq = rows @ exact, exact.square().sum()
    projected = exact - (inverse_gram @ c) @ rows
    plan = make_plan([basis], [0], 1, kernel=kernel)
    plan.warmup([gradient.dtype])
    measured_c, measured_sq, _ = plan.orthogonal_([gradient], inverse_gram.float()[None])
    error = gradient.double() - projected
    beyond = (error.abs() - spacing(projected, gradient.dtype) / 2).clamp(min=0)
    cosines = rows @ gradient.double() / (rows.norm(dim=1) * gradient.double().norm())
    figures = {
        "c": (measured_c[0].double() - c).norm() / c.norm(),
        "‖g‖²": (measured_sq[0].double() - sq).abs() / sq,
        "gradient": error.norm() / projected.norm(),
        "beyond": beyond.max() / exact.abs().max(),
        "residual": cosines.abs().max(),
    }
    return {name: figure.item() for name, figure in figures.items()}


def measure(
    dtype: str,
    basis_dtype: str,
    share: float,
    *,
    numel: int,
    device: torch.device,
    rank: int = 2,
    kernel: str = "auto",
) -> dict[str, float]:
    """Project a random gradient of `numel` elements and return its errors, as `errors` does; see `CASES`."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(numel, rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(directions)[0].T.to(device, getattr(torch, basis_dtype)).contiguous()
    gradient = torch.randn(numel, generator=generator, dtype=torch.float64).to(device)
    gradient += share * gradient.norm() * basis[0].double()
    return errors(gradient.to(getattr(torch, dtype)), basis, kernel)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=10_000_000)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--kernel", default="auto", choices=["auto", "triton", "torch"])
    parser.add_argument("--device", type=torch.device, default=default_device())
    options = parser.parse_args()

    print(f"{'gradient':<10}{'basis':<10}{'in span':>8}", end="")
    for row, case in enumerate(CASES):
        figures = measure(*case, numel=options.numel, device=options.device, rank=options.rank, kernel=options.kernel)
        if row == 0:
            print("".join(f"{name:>10}" for name in figures))
        print("{:<10}{:<10}{:>8.1f}".format(*case), end="")
        print("".join(f"{figure:>10.1e}" for figure in figures.values()), flush=True)


if __name__ == "__main__":
    main()
