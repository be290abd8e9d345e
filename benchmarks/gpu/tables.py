"""The tables that docs/ has of a GPU's figures: their columns, one line a case."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .parts import PARTS, Case, Figures
from .rows import Row, key


NOT_MEASURED = "not measured"


class Table(NamedTuple):
    """The heads of the columns that name a case, of those that it is measured by, and what fills them."""

    names: Sequence[str]
    heads: Sequence[str]
    name: Callable[[Case], Sequence[str]]
    cells: Callable[[Figures], Sequence[str]]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if abs(size) < 2**30 else f"{size / 2**30:.2f} GiB"


def _scaled(case: Case) -> str:
    return case["gradients"] + ("" if case["scale"] == 1 else f" × {case['scale']:g}")


def _projection(figures: Figures) -> list[str]:
    def time(name: str) -> str:
        row = figures.get(name)
        if row is None:
            return NOT_MEASURED
        return f"– ({row['skipped']})" if row["skipped"] else _milliseconds(row["seconds"])

    names = ("ours (triton)", "foreach", "torch.compile", "published rule", "clipping alone")
    ours = figures.get("ours (triton)", {})
    return [*map(time, names), f"{ours['share']:.2f}" if "share" in ours else NOT_MEASURED]


def _scopes(figures: Figures) -> list[str]:
    def time(name: str) -> str:
        row = figures[name]
        return f"– ({row['skipped']})" if row["skipped"] else _milliseconds(row["seconds"])

    ours = figures["inputs (triton)"]
    names = ("inputs (triton)", "inputs (torch)", "two products", "parameter (triton)", "global (triton)")
    return [
        *map(time, (*names, "clipping alone")),
        *(_milliseconds(ours[name]) for name in ("by_bytes", "by_products")),
    ]


def _launches(figures: Figures) -> list[str]:
    times = (_microseconds(figures[name]) for name in ("launching", "cpu", "kernels"))
    return [f"{figures['launches']:g}", *times]


def _memory(figures: Figures) -> list[str]:
    sizes = (_mebibytes(figures[name]) for name in ("basis", "formula", "making", "step"))
    return [*sizes, f"{100 * figures['step'] / figures['gradients']:.2f} %"]


def _training(figures: Figures) -> list[str]:
    return [
        _milliseconds(figures["stock_step"]),
        f"{figures['ogpsa_step'] / figures['stock_step']:.3f} ×",
        f"{figures['reference_sample'] / figures['training_sample']:.2f} ×",
        _milliseconds(figures["basis"]),
        _mebibytes(figures["stock_peak"]),
        _mebibytes(figures["ogpsa_peak"] - figures["stock_peak"]),
        _mebibytes(figures["basis_bytes"]),
    ]


def _streaming(figures: Figures) -> list[str]:
    times = (_milliseconds(figures[name]) for name in ("resident", "streamed", "copies", "kernels", "both"))
    shorter = min(figures["copies"], figures["kernels"])
    rate = figures["copied"] / figures["copies"] / 1e9 if figures["copies"] else 0.0
    return [*times, f"{figures['both'] / shorter:.2f}" if shorter else "–", f"{rate:.1f} GB/s"]


def _distributed(figures: Figures) -> list[str]:
    return [
        str(figures["processes"]),
        f"{figures['stock_step_ms']:.0f} ms",
        f"{figures['ogpsa_step_over_stock']:.2f} ×",
        f"{figures['stock_peak_MiB']:.0f} MiB",
        f"{figures['ogpsa_peak_over_stock_MiB']:.0f} MiB",
        f"{figures['basis_by_formula_MiB']:.0f} MiB",
    ]


ENGINES = {"fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
TABLES = {
    "tests": Table(
        ["tests"],
        ["passed", "skipped"],
        lambda case: [f"`pytest {case['tests']} -m gpu`"],
        lambda figures: [str(figures["passed"]), str(figures["skipped"])],
    ),
    "accuracy": Table(
        ["gradient", "basis", "in span"],
        [
            "`c`, relative",
            "`‖g‖²`, relative",
            "projected gradient, relative",
            "beyond one rounding",
            "residual, largest cosine",
        ],
        lambda case: [case["dtype"], case["basis_dtype"], f"{case['share']:g}"],
        lambda figures: [f"{figure:.1e}" for figure in figures.values()],
    ),
    "projection": Table(
        ["gradients", "rank"],
        [
            "ours (Triton)",
            "foreach",
            "torch.compile",
            "published rule",
            "clipping alone",
            "share of copy bandwidth, ours",
        ],
        lambda case: [_scaled(case), str(case["rank"])],
        _projection,
    ),
    "scopes": Table(
        ["gradients", "k"],
        [
            "`inputs`, ours (Triton)",
            "`inputs`, ours (torch)",
            "two products and clipping",
            "`parameter`, rank 2",
            "`global`, rank 2",
            "clipping alone",
            "`inputs` at least, by bytes",
            "`inputs` at least, by products",
        ],
        lambda case: [case["gradients"], str(case["rank"])],
        _scopes,
    ),
    "launches": Table(
        ["gradients", "implementation", "gradient addresses"],
        ["launches", "CPU, µs", "CPU under the profiler, µs", "kernels, µs"],
        lambda case: [case["gradients"], case["implementation"], case["addresses"]],
        _launches,
    ),
    "memory": Table(
        ["gradients", "dtype", "scope"],
        [
            "basis",
            "by the formula",
            "peak beside reference gradients while it is made",
            "peak of a step beside gradients and basis",
            "of the gradients",
        ],
        lambda case: [case["gradients"], case["dtype"], case["scope"]],
        _memory,
    ),
    "training": Table(
        ["training", "gradient checkpointing", "scope"],
        [
            "stock step, ms",
            "with OGPSA, over it",
            "reference sample over training sample",
            "making a basis, ms",
            "stock peak",
            "OGPSA's peak over it",
            "basis by the formula",
        ],
        lambda case: [case["training"], "on" if case["checkpointing"] else "off", case["scope"]],
        _training,
    ),
    "streaming": Table(
        ["gradients"],
        [
            "basis on the device, ms",
            "streamed, ms",
            "copies, ms",
            "kernels, ms",
            "both at once, ms",
            "share of the shorter that is hidden",
            "copied at",
        ],
        lambda case: [_scaled(case)],
        _streaming,
    ),
    "distributed": Table(
        ["engine"],
        [
            "processes",
            "stock step",
            "with OGPSA, over it",
            "stock peak",
            "OGPSA's peak over it",
            "basis in a process, by the formula",
        ],
        lambda case: [ENGINES[case["engine"]]],
        _distributed,
    ),
}


def table(part: str, rows: Sequence[Row]) -> str:
    """Return the table of a part in Markdown: a line for each of its cases, whether it has figures or not."""
    layout = TABLES[part]
    found = {key(part, row["case"]): row for row in rows if row["part"] == part}
    lines: dict[tuple[str, ...], tuple[Figures, str]] = {}
    for case in PARTS[part].cases:
        names, row = tuple(layout.name(case)), found.get(key(part, case), {})
        # Cases of one name fill one line.
        figures, obstacle = lines.get(names, ({}, NOT_MEASURED))
        if "figures" not in row:
            obstacle = _obstacle(row) or obstacle
        lines[names] = {**row.get("figures", {}), **figures}, obstacle
    markdown = [_line([*layout.names, *layout.heads]), "|" + "---|" * (len(layout.names) + len(layout.heads))]
    for names, (figures, obstacle) in lines.items():
        cells = layout.cells(figures) if figures else [obstacle] + [""] * (len(layout.heads) - 1)
        markdown.append(_line([*names, *cells]))
    return "\n".join(markdown)


def _obstacle(row: dict[str, Any]) -> str | None:
    """Return why a case has no figures, in one line; None where it was not tried."""
    if "skipped" in row:
        return f"{NOT_MEASURED}: {row['skipped']}"
    if "error" in row:
        return f"failed: {row['error'].splitlines()[0][:200]}".replace("|", "/")
    return None


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
