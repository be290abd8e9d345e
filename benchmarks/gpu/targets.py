"""What docs/performance.md says should hold on a GPU, and whether it does."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..projection import MODELS
from .rows import Row
from .tables import NOT_MEASURED


FULL, LORA = MODELS[:2], MODELS[2:4]


class Target(NamedTuple):
    """A promise: what is measured, the limit, whether it is the least or the most, and how figures are written."""

    text: str
    figures: dict[str, float]
    limit: float
    least: bool
    form: str
    # What is known without a GPU.
    note: str = ""


def targets(rows: Sequence[Row]) -> list[Target]:
    """Return the promises with what was measured of them, by the name of what it was measured on."""
    projections = _projections(rows)

    def collect(
        models: Iterable[str], rank: int, figure: Callable[[dict[str, Any]], float], name: str = "ours (triton)"
    ) -> dict[str, float]:
        """Return a figure of an implementation's row for each model that it was timed on beside ours."""
        found = {model: projections.get((model, rank, name), {}) for model in models}
        return {model: figure(row) for model, row in found.items() if "ratio" in row}

    # The ratio is an implementation's time over ours in the same process.
    faster, share = (lambda row: row["ratio"]), (lambda row: row["share"])
    slower = lambda row: 1 / row["ratio"]
    # What the share leaves of the time: the bytes take the rest at the bandwidth of a copy.
    beside = lambda row: 1e6 * row["seconds"] * (1 - row["share"])
    extra = lambda row: 100 * row["peak_memory"] / (row["elements"] * torch.bfloat16.itemsize)
    return [
        Target("full, rank 2: at least 0.85 of the copy bandwidth", collect(FULL, 2, share), 0.85, True, "{:.2f}"),
        Target(
            "the same: at least 1.5 times as fast as foreach", collect(FULL, 2, faster, "foreach"), 1.5, True, "{:.2f}"
        ),
        Target("1.1 times torch.compile", collect(FULL, 2, faster, "torch.compile"), 1.1, True, "{:.2f}"),
        Target("20 times the published rule", collect(FULL, 2, faster, "published rule"), 20, True, "{:.0f}"),
        Target(
            "LoRA r=8: at most 3 launches a step",
            _launches(rows, "launches", 1),
            3,
            False,
            "{:g}",
            "3, counted with the interpreter",
        ),
        Target(
            "LoRA r=8: at most 100 µs a step beside the time of the bytes",
            collect(LORA, 2, beside),
            100,
            False,
            "{:.0f} µs",
        ),
        Target(
            "LoRA r=8: at most 50 µs of CPU time to launch",
            _launches(rows, "launching", 1e6),
            50,
            False,
            "{:.0f} µs",
            "see below",
        ),
        Target(
            "full, rank 1: at most 1.8 times the time of `clip_grad_norm_` alone (the bytes say 5 to 3)",
            collect(FULL, 1, slower, "clipping alone"),
            1.8,
            False,
            "{:.2f}",
        ),
        Target(
            "full, rank 2: peak memory beside gradients and basis at most 1 % of the gradients",
            collect(FULL, 2, extra),
            1,
            False,
            "{:.2f} %",
            "0.01 % by count",
        ),
        Target(
            "float32 gradients: within 1e-6 of float64, residual included",
            _accuracy(rows, "float32", ("c", "‖g‖²", "gradient", "residual")),
            1e-6,
            False,
            "{:.1e}",
        ),
        Target(
            "bfloat16 gradients: within one rounding of float64, and 1e-6 of the largest element",
            _accuracy(rows, "bfloat16", ("beyond",)),
            1e-6,
            False,
            "{:.1e}",
        ),
        Target("bfloat16 gradients: residual 2e-3", _accuracy(rows, "bfloat16", ("residual",)), 2e-3, False, "{:.1e}"),
    ]


def table(rows: Sequence[Row]) -> str:
    """Return the promises in Markdown, each with what was measured and whether it holds."""
    lines = ["| what should hold | measured | |", "|---|---|---|"]
    for target in targets(rows):
        if not target.figures:
            lines.append(f"| {target.text} | {'; '.join(filter(None, [NOT_MEASURED, target.note]))} | |")
            continue
        worst = (min if target.least else max)(target.figures.values())
        holds = worst >= target.limit if target.least else worst <= target.limit
        measured = "; ".join(f"{name}: {target.form.format(figure)}" for name, figure in target.figures.items())
        lines.append(f"| {target.text} | {measured} | {'holds' if holds else 'missed'} |")
    return "\n".join(lines)


def _projections(rows: Sequence[Row]) -> dict[tuple[str, int, str], dict]:
    """Return the times at full size, by model, rank and implementation."""
    found: dict[tuple[str, int, str], dict] = {}
    for row in rows:
        case = row["case"]
        if row["part"] == "projection" and case["scale"] == 1:
            for name, result in row.get("figures", {}).items():
                if not result["skipped"]:
                    found.setdefault((case["gradients"], case["rank"], name), result)
    return found


def _launches(rows: Sequence[Row], figure: str, unit: float) -> dict[str, float]:
    return {
        f"{row['case']['addresses']} addresses": unit * row["figures"][figure]
        for row in rows
        if row["part"] == "launches"
        and "figures" in row
        and (row["case"]["gradients"], row["case"]["implementation"]) == (LORA[0], "ours (triton)")
    }


def _accuracy(rows: Sequence[Row], dtype: str, names: Sequence[str]) -> dict[str, float]:
    """Return the largest error of each of these kinds over the cases of a gradient dtype."""
    found = [row for row in rows if row["part"] == "accuracy" and row["case"]["dtype"] == dtype]
    cases = [row["figures"] for row in found if "figures" in row]
    return {name: max(figures[name] for figures in cases) for name in names if cases}
