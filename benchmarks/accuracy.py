"""Compare the projection of one large gradient with the same in float64.

Prints for each pair of dtypes, and for a gradient of which a tenth or next to nothing lies in the span (the hardest
case for the coefficients), the relative errors of the coefficients, of the squared norm and of the projected gradient;
the largest error of an element beyond the one rounding to its dtype, relative to the largest element; and the residual,
the largest |cos| between the projected gradient and a basis direction.

    python benchmarks/accuracy.py                          # on a GPU the Triton kernels, else torch
    python benchmarks/accuracy.py --kernel torch --device cpu
"""

import argparse

import torch

from llamafactory_ogpsa.kernels import make_plan


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAIRS = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]


def spacing(values, dtype):
    """Return the distance between neighbouring numbers of a dtype at these float64 values."""
    exponents = torch.frexp(values)[1].clamp(min=-120)
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), exponents - 1)


def measure(gradient, basis, kernel):
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
    return {
        "c": (measured_c[0].double() - c).norm() / c.norm(),
        "‖g‖²": (measured_sq[0].double() - sq).abs() / sq,
        "gradient": error.norm() / projected.norm(),
        "beyond": beyond.max() / exact.abs().max(),
        "residual": cosines.abs().max(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=10_000_000)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--kernel", default="auto", choices=["auto", "triton", "torch"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    print(f"{'gradient':<10}{'basis':<10}{'in span':>8}", end="")
    for row, (dtype, basis_dtype) in enumerate(PAIRS):
        for share in (0.1, 0.0):
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn(options.numel, options.rank, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(directions)[0].T.to(options.device, DTYPES[basis_dtype]).contiguous()
            gradient = torch.randn(options.numel, generator=generator, dtype=torch.float64).to(options.device)
            gradient += share * gradient.norm() * basis[0].double()
            figures = measure(gradient.to(DTYPES[dtype]), basis, options.kernel)
            if row == 0 and share:
                print("".join(f"{name:>10}" for name in figures))
            print(f"{dtype:<10}{basis_dtype:<10}{share:>8.1f}", end="")
            print("".join(f"{figure.item():>10.1e}" for figure in figures.values()), flush=True)


if __name__ == "__main__":
    main()
