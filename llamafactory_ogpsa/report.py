"""What a run leaves to look at: `ogpsa_log.jsonl` and `training_ogpsa.png`."""

import json
import math
import os
from typing import Any


LOG_NAME = "ogpsa_log.jsonl"
PLOT_NAME = "training_ogpsa.png"


def read_log(path: str) -> list[dict[str, Any]]:
    """Read a log; a last line that was cut off while it was written is left out.

    Args:
        path: the file; a missing one counts as empty.

    Returns:
        its rows.

    Raises:
        ValueError: a line other than the last is not JSON; names the file and the line.
    """
    if not os.path.exists(path):
        return []

    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as err:
            raise ValueError(f"{path}, line {number}, is not JSON: {err}; mend the line, or move the file away")
    return rows


def begin_log(path: str, step: int, checkpoint: str | None = None) -> None:
    """Start the log of a run that begins, or goes on, at `step`: drop the rows that the run will write again.

    A refresh is logged with the step before it, a step after it; what a resumed run repeats is therefore every refresh
    from `step` on and every row beyond it. Written to a temporary name first.

    Args:
        path: the log.
        step: the optimizer steps taken.
        checkpoint: what the run goes on from; the rows before it come from the log beside it, where there is one.
    """
    beside = path if checkpoint is None else os.path.join(os.path.dirname(os.path.abspath(checkpoint)), LOG_NAME)
    rows = read_log(beside) if step > 0 and os.path.exists(beside) else []
    rows = [row for row in rows if row["step"] < step + (0 if row.get("refresh") else 1)]
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(temporary, path)


def append_row(path: str, row: dict[str, Any]) -> None:
    """Append one row, in one write."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def draw_removed(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw `removed` over the steps; a step whose gradient was not finite leaves a gap."""
    steps = [row for row in rows if not row.get("refresh")]
    removed = [math.nan if row["removed"] is None else 100 * row["removed"] for row in steps]
    axes.plot([row["step"] for row in steps], removed, color="#1f77b4", marker=".")
    axes.set(xlabel="step", ylabel="OGPSA: removed from the gradient (%)")
    axes.set_ylim(bottom=0)


def draw_reference_losses(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the loss on each general set at the refreshes; a resumed run may have other sets than the one before it."""
    refreshes = [row for row in rows if row.get("refresh")]
    for name in refreshes[-1]["reference_loss"] if refreshes else []:
        losses = [row["reference_loss"].get(name, math.nan) for row in refreshes]
        axes.plot([row["step"] for row in refreshes], losses, marker=".", label=name)
    axes.set(xlabel="step", ylabel="OGPSA: reference loss")
    if refreshes:
        axes.legend()


def plot_log(log_path: str, png_path: str) -> bool:
    """Draw `removed` and the reference losses over the steps.

    Args:
        log_path: an `ogpsa_log.jsonl`.
        png_path: the picture to write, under a temporary name first.

    Returns:
        False where the log holds nothing to draw, and no picture was written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_log(log_path)
    if not rows:
        return False

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_removed(left, rows)
    draw_reference_losses(right, rows)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    temporary = f"{png_path}.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, png_path)
    return True
