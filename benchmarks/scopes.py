"""Time one step's projection and clipping under each scope, on gradients shaped like those of real runs.

Compares, in one process and on the same gradients: scope `inputs` by this project's kernels, the same as two matrix
products a matrix, `g - (g Vᵀ) V`, before `clip_grad_norm_`, scopes `parameter` and `global` with two directions, and
clipping alone. Beside them stand two limits: the bytes that scope `inputs` must move, at the bandwidth of a copy, and
its products, at the speed of a large float32 product.

    python -m benchmarks.scopes                                                         # a GPU with 80 GB
    python -m benchmarks.scopes --models "SmolLM2-135M full" --dtype float32 --repeats 5    # a laptop
"""

import argparse
import statistics
from typing import Any

import torch

from llamafactory_ogpsa.inputs import DEFAULT_RANK, InputSubspace, Protected
from llamafactory_ogpsa.kernels.rows import exact_products

from .devices import counters, default_device, environment
from .implementations import MAX_NORM, clip_alone, ours
from .memory import directions, inputs_bytes
from .models import trainable_shapes
from .rows import build_steps, print_result
from .timing import Step, clear_memory, copy_bandwidth, measure


RANK = 2
# Seconds for each implementation: on a CPU a step of a whole model takes ten.
LONGEST = 90.0
IMPLEMENTATIONS = (
    "inputs (triton)",
    "inputs (torch)",
    "two products",
    "parameter (triton)",
    "parameter (torch)",
    "global (triton)",
    "global (torch)",
    "clipping alone",
)


def random_bases(shapes: list[tuple[int, ...]], rank: int, device: torch.device) -> list[torch.Tensor | None]:
    """Return for each matrix an orthonormal float32 `[k, in]`, None for a vector; equal widths share one."""
    made: dict[int, torch.Tensor] = {}
    for shape in shapes:
        if len(shape) == 2 and shape[1] not in made:
            random = torch.randn(shape[1], directions(shape, rank), device=device)
            made[shape[1]] = torch.linalg.qr(random)[0].T.contiguous()
    return [made[shape[1]] if len(shape) == 2 else None for shape in shapes]


def subspace_of(
    shapes: list[tuple[int, ...]], bases: list[torch.Tensor | None], device: torch.device
) -> InputSubspace:
    """Wrap bases as a run does: vectors are frozen."""
    names = [str(index) for index in range(len(shapes))]
    protected = [Protected(frozen=True) if basis is None else Protected(basis) for basis in bases]
    return InputSubspace(names, protected, [torch.Size(shape).numel() for shape in shapes], device)


def two_products(gradients: list[torch.Tensor], bases: list[torch.Tensor | None]) -> Step:
    """Build the step as one would write it: in the gradient's dtype, with no thought for values that are not finite."""
    bases = [None if basis is None else basis.to(g.dtype) for g, basis in zip(gradients, bases)]
    clip = clip_alone(gradients)

    def step() -> None:
        for g, basis in zip(gradients, bases):
            if basis is None:
                g.zero_()
            else:
                g.sub_((g @ basis.T) @ basis)
        clip()

    return step


def build(
    name: str, gradients: list[torch.Tensor], bases: list[torch.Tensor | None], references: list[torch.Tensor]
) -> Step:
    """Build an implementation's step, which changes the gradients.

    Args:
        name: one of `IMPLEMENTATIONS`.
        gradients: the gradients.
        bases: of scope `inputs`, from `random_bases`.
        references: of the other scopes, `[RANK, numel]` of each gradient.

    Raises:
        ValueError: a kernel that cannot run here.
    """
    if name == "clipping alone":
        return clip_alone(gradients)
    if name == "two products":
        return two_products(gradients, bases)
    scope, _, kernel = name.rstrip(")").partition(" (")
    if scope != "inputs":
        groups = [0] * len(gradients) if scope == "global" else None
        return ours([g.view(-1) for g in gradients], references, kernel, groups)
    shapes = [tuple(g.shape) for g in gradients]
    project = subspace_of(shapes, bases, gradients[0].device).projection(kernel=kernel)
    return lambda: project(gradients, max_norm=MAX_NORM)


def product_speed(device: torch.device, repeats: int) -> float:
    """Return the multiplications and additions a second of large products as accurate as float32 ones."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    matmul = torch.backends.cuda.matmul
    # On NVIDIA's tensor cores three TF32 products make one.
    three = device.type == "cuda" and not torch.version.hip and hasattr(matmul, "fp32_precision")

    def step() -> None:
        with exact_products():
            if three:
                matmul.fp32_precision = "tf32"
            left @ right

    seconds = measure({"product": step}, device, repeats, statistics.median)["product"].seconds
    return 2 * size**3 / seconds / (3 if three else 1)


def compare(
    model: str,
    rank: int,
    device: torch.device,
    *,
    bandwidth: float,
    speed: float,
    dtype: torch.dtype = torch.bfloat16,
    implementations: tuple[str, ...] = IMPLEMENTATIONS,
    repeats: int = 20,
) -> list[dict[str, Any]]:
    """Time implementations on one model's gradients.

    Args:
        model: the model and its tuning, such as "Qwen2.5-7B full". LoRA's `B` is taken as a matrix like any other,
            though a run whose adapters start at zero projects `A` alone.
        rank: directions of a matrix's inputs.
        device: where all of it lies.
        bandwidth: bytes a second of a copy.
        speed: see `product_speed`.
        dtype: of the gradients, and of the bases of the other scopes.
        implementations: names from `IMPLEMENTATIONS`; the ratios are to the first that runs.
        repeats: how often each is timed; medians are taken.

    Returns:
        a row for each implementation; where `skipped` is None with `seconds`, `ratio`, `launching` and `peak_memory`
        (bytes beside gradients and bases); in every row `by_bytes` and `by_products`, the seconds that scope `inputs`
        takes at the least.
    """
    shapes = trainable_shapes(model)
    numels = [torch.Size(shape).numel() for shape in shapes]
    products = sum(4 * directions(shape, rank) * numel for shape, numel in zip(shapes, numels))
    row = dict(
        model=model,
        rank=rank,
        dtype=str(dtype).removeprefix("torch."),
        elements=sum(numels),
        tensors=len(shapes),
        # Gradients are read twice and written once, bases read twice.
        by_bytes=(3 * sum(numels) * dtype.itemsize + 2 * inputs_bytes(shapes, rank)) / bandwidth,
        by_products=products / speed,
    )
    clear_memory(device)
    if (1 + RANK) * sum(numels) * dtype.itemsize > 0.95 * counters(device).mem_get_info(device)[0]:
        return [dict(row, implementation=name, skipped="does not fit the memory") for name in implementations]

    gradients = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    bases = random_bases(shapes, rank, device)
    references = [torch.randn(RANK, numel, dtype=dtype, device=device).div_(numel**0.5) for numel in numels]
    rows = [dict(row, implementation=name, skipped=None) for name in implementations]
    steps, peaks = build_steps(rows, lambda name: build(name, gradients, bases, references), device)
    times = measure(steps, device, repeats, statistics.median, LONGEST)
    first = next((times[name].seconds for name in implementations if name in times), None)
    for result in rows:
        name = result["implementation"]
        if name in times:
            seconds, launching = times[name]
            result.update(seconds=seconds, ratio=seconds / first, launching=launching, peak_memory=peaks[name])
    return rows


HEADER = f"{'model':<24}{'k':>5}  {'implementation':<20}{'ms':>12}{'ratio':>9}{'launch us':>12}{'peak MiB':>12}"


def print_row(row: dict[str, Any]) -> None:
    """Print a row of `compare` under `HEADER`."""
    start = f"{row['model']:<24}{row['rank']:>5}  {row['implementation']:<20}"
    print_result(
        start,
        row,
        lambda: (
            f"{row['seconds'] * 1e3:>12.3f}{row['ratio']:>9.3f}{row['launching'] * 1e6:>12.0f}"
            f"{row['peak_memory'] / 2**20:>12.1f}"
        ),
    )


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Qwen2.5-7B full", "Qwen2.5-7B LoRA r=8"], metavar="MODEL")
    parser.add_argument("--rank", type=int, default=DEFAULT_RANK, help="directions of a matrix's inputs")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=default_device())
    options = parser.parse_args()

    torch.manual_seed(0)
    bandwidth, speed = copy_bandwidth(options.device, 9), product_speed(options.device, 9)
    print(", ".join(f"{key} {value}" for key, value in environment(options.device).items() if value is not None))
    print(f"copy {bandwidth / 1e9:.1f} GB/s, float32 products {speed / 1e9:.1f} GFLOP/s")
    print(HEADER)
    for model in options.models:
        rows = compare(
            model,
            options.rank,
            options.device,
            bandwidth=bandwidth,
            speed=speed,
            dtype=getattr(torch, options.dtype),
            repeats=options.repeats,
        )
        for row in rows:
            print_row(row)
        least = ", ".join(
            f"{1e3 * rows[0][name]:.1f} ms {name.replace('_', ' ')}" for name in ("by_bytes", "by_products")
        )
        print(f"{'':<31}scope inputs takes at least {least}", flush=True)


if __name__ == "__main__":
    main()
