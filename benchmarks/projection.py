"""Time the projection of one optimizer step on gradients shaped like those of real runs.

Compares, in one process and on the same gradients, this project's kernels (Triton and torch) with what one would
write instead: torch's multi-tensor calls, torch.compile, and the published implementation of OGPSA. For each it
prints the time, the bytes that must be moved at least, the share of the measured copy bandwidth, and how many times
as long as ours it takes; the same goes to a JSON file and a plot.

    python -m benchmarks.projection                        # a GPU with 80 GB
    python -m benchmarks.projection --scale 0.002          # a laptop: every tensor shrunk to 0.2 %
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .devices import counters, default_device, environment
from .implementations import IMPLEMENTATIONS, obstacle
from .models import trainable_numels
from .rows import build_steps, print_result
from .timing import clear_memory, copy_bandwidth, measure


MODELS = (
    "Qwen2.5-7B full",
    "Llama-3.1-8B full",
    "Qwen2.5-7B LoRA r=8",
    "Llama-3.1-8B LoRA r=8",
    "Qwen2.5-7B LoRA r=64",
    "Llama-3.1-8B LoRA r=64",
)


def scaled_numels(training: str, scale: float) -> list[int]:
    """Return each trainable tensor's elements, shrunk to a share and rounded to a multiple of 8."""
    return [max(8, round(scale * numel / 8) * 8) for numel in trainable_numels(training)]


def random_tensors(numels: Sequence[int], rank: int, device: torch.device) -> tuple[list, list]:
    """Return bfloat16 gradients `[numel]` and rows `[rank, numel]` of a norm about one, in place of a basis."""
    make = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device=device)
    return [make(numel) for numel in numels], [make(rank, numel).div_(numel**0.5) for numel in numels]


def compare(
    model: str,
    rank: int,
    device: torch.device,
    bandwidth: float,
    *,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
    scale: float = 1.0,
    micro_batches: int = 4,
    repeats: int = 20,
) -> list[dict[str, Any]]:
    """Time implementations on one model at one rank.

    Args:
        model: the model and its tuning, as in `MODELS`.
        rank: directions of the basis.
        device: where gradients and basis lie.
        bandwidth: bytes a second of a copy, for the share of it.
        implementations: names from `IMPLEMENTATIONS`; what is ours first, for the ratios.
        scale: the share of each tensor's elements that is kept.
        micro_batches: of an optimizer step, for the published rule.
        repeats: how often each is timed.

    Returns:
        a row for each implementation; where `skipped` is None, with the seconds of a step and of its launching, its
        peak memory beside gradients and basis, the bytes it must move and the share of the bandwidth that they make.
    """
    numels = scaled_numels(model, scale)
    # Two reads of gradient and basis, one write of the gradient; clipping alone reads the gradient twice.
    size = sum(numels) * torch.bfloat16.itemsize
    least = (2 * (1 + rank) + 1) * size
    row = dict(model=model, rank=rank, scale=scale, elements=sum(numels), tensors=len(numels))
    # What torch keeps cached of the models before does not count as free.
    clear_memory(device)
    if (1 + rank) * size > 0.95 * counters(device).mem_get_info(device)[0]:
        return [dict(row, implementation=name, skipped="does not fit the memory") for name in implementations]

    gradients, basis = random_tensors(numels, rank, device)
    rows = [dict(row, implementation=name, skipped=obstacle(name, rank)) for name in implementations]
    rivals = [name for name in implementations if not name.startswith("ours")]
    steps, peaks = build_steps(
        rows, lambda name: IMPLEMENTATIONS[name](gradients, basis, micro_batches), device, rivals
    )
    times = measure(steps, device, repeats)
    for result in rows:
        name = result["implementation"]
        if name in times:
            seconds, launching = times[name]
            count = 3 * size if name == "clipping alone" else least
            result.update(seconds=seconds, launching=launching, peak_memory=peaks[name])
            result.update(bytes=count, bandwidth=count / seconds, share=count / seconds / bandwidth)
    best = next((r["seconds"] for r in rows if r["implementation"].startswith("ours") and "seconds" in r), None)
    for result in rows:
        if best is not None and "seconds" in result:
            result["ratio"] = result["seconds"] / best
    return rows


HEADER = f"{'model':<24}{'rank':>5}  {'implementation':<16}{'ms':>12}{'MiB':>12}{'share':>8}{'ratio':>9}"
HEADER += f"{'launch us':>12}{'peak MiB':>12}"


def print_row(row: dict[str, Any]) -> None:
    """Print a row of `compare` under `HEADER`."""
    start = f"{row['model']:<24}{row['rank']:>5}  {row['implementation']:<16}"
    print_result(
        start,
        row,
        lambda: (
            f"{row['seconds'] * 1e3:>12.3f}{row['bytes'] / 2**20:>12.1f}{row['share']:>8.2f}"
            f"{row.get('ratio', float('nan')):>9.2f}{row['launching'] * 1e6:>12.0f}{row['peak_memory'] / 2**20:>12.1f}"
        ),
    )


def plot(rows: Sequence[dict[str, Any]], bandwidth: float, title: str, path: Path) -> None:
    """Draw the times of each model in its own panel, on a logarithmic scale, with the least time the bytes allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows if not row["skipped"]))
    ranks = sorted({row["rank"] for row in rows})
    columns = min(2, len(models))
    lines = -(-len(models) // columns)
    # One panel alone is wider, or title and legend would not fit.
    across = 11 if columns > 1 else 10
    figure, axes = plt.subplots(lines, columns, figsize=(across, 3.0 * lines + 0.9), squeeze=False)
    width = 0.85 / max(len(names), 1)
    for axis, model in zip(axes.flat, models):
        for i, name in enumerate(names):
            times = {
                r["rank"]: r["seconds"] * 1e3
                for r in rows
                if (r["model"], r["implementation"]) == (model, name) and not r["skipped"]
            }
            places = [ranks.index(rank) + (i - (len(names) - 1) / 2) * width for rank in times]
            axis.bar(places, times.values(), width, label=name, color=f"C{list(IMPLEMENTATIONS).index(name)}")
        for k, rank in enumerate(ranks):
            elements = next(r["elements"] for r in rows if r["model"] == model and r["rank"] == rank)
            least = (2 * (1 + rank) + 1) * elements * 2 / bandwidth * 1e3
            label = "least of a projection, by bytes and bandwidth" if k == 0 else None
            axis.hlines(least, k - 0.45, k + 0.45, colors="black", linestyles="dashed", label=label)
        axis.set(title=model, yscale="log", ylabel="ms per step", xticks=range(len(ranks)))
        axis.set_xticklabels([f"rank {rank}" for rank in ranks])
        axis.grid(axis="y", alpha=0.3)
    for axis in list(axes.flat)[len(models) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight() * 0.75, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    """Compare, print, and write the figures and their plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument(
        "--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS), metavar="NAME"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="shrink every tensor to this share of its elements")
    parser.add_argument("--micro-batches", type=int, default=4, help="per optimizer step, for the published rule")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/projection"))
    options = parser.parse_args()
    for name in ("scale", "micro_batches", "repeats"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be more than 0")

    torch.manual_seed(0)
    machine = environment(options.device)
    command = shlex.join(["python", "-m", "benchmarks.projection", *sys.argv[1:]])
    bandwidth = copy_bandwidth(options.device, options.repeats)
    print(command)
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(HEADER)
    rows = []
    for model in options.models:
        for rank in options.ranks:
            new = compare(
                model,
                rank,
                options.device,
                bandwidth,
                implementations=options.implementations,
                scale=options.scale,
                micro_batches=options.micro_batches,
                repeats=options.repeats,
            )
            for row in new:
                print_row(row)
            rows += new

    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = dict(command=command, environment=machine, copy_bandwidth=bandwidth, rows=rows)
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"Projection and clipping of one step's bfloat16 gradient, {machine['device']}, scale {options.scale:g}"
    plot(rows, bandwidth, title, options.output.with_suffix(".png"))
    print(f"written: {options.output.with_suffix('.json')} and {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
