"""The picture of a run, `training_ogpsa.png`, and the panels that the web UI shows of it."""

import math
from collections.abc import Callable
from typing import Any

from ..files import replacing
from .log import read_log


# Draws one panel, given the axes and the rows of the log.
Panel = Callable[[Any, list[dict[str, Any]]], None]


def draw_removed(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw `removed` over the steps; a step whose gradient was not finite leaves a gap."""
    steps = [row for row in rows if not row.get("refresh")]
    removed = [math.nan if row["removed"] is None else 100 * row["removed"] for row in steps]
    axes.plot([row["step"] for row in steps], removed, color="#1f77b4", marker=".")
    axes.set(xlabel="step", ylabel="OGPSA: removed from the gradient (%)")
    axes.set_ylim(bottom=0)


def draw_update(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw what the weight changes of the logged steps do to the reference losses, to first order."""
    steps = [row for row in rows if row.get("update_loss_change")]
    _draw_sets(axes, steps, "update_loss_change", "OGPSA: reference loss change of a step")
    axes.axhline(0, color="black", linewidth=0.8)


def draw_update_share(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the share of the logged steps' weight changes that lies in the protected subspace."""
    steps = [row for row in rows if row.get("update_share") is not None]
    axes.plot([row["step"] for row in steps], [100 * row["update_share"] for row in steps], marker=".")
    axes.set(xlabel="step", ylabel="OGPSA: weight change in the subspace (%)")
    axes.set_ylim(bottom=0)


def draw_reference_losses(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the loss on each general set at the refreshes."""
    refreshes = [row for row in rows if row.get("refresh")]
    _draw_sets(axes, refreshes, "reference_loss", "OGPSA: reference loss")


def _draw_sets(axes: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """Draw a line for each general set of the last row; a resumed run may have other sets than the one before it."""
    for name in rows[-1][key] if rows else ():
        values = [row[key].get(name, math.nan) for row in rows]
        axes.plot([row["step"] for row in rows], values, marker=".", label=name)
    axes.set(xlabel="step", ylabel=label)
    if rows:
        axes.legend()


def choose_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Return the panels of a log: what was removed, what the steps did if it was measured, the reference losses."""
    panels = [draw_removed]
    if any(row.get("update_loss_change") for row in rows):
        panels.append(draw_update)
    elif any(row.get("update_share") is not None for row in rows):
        panels.append(draw_update_share)
    return [*panels, draw_reference_losses]


def plot_log(log_path: str, png_path: str) -> bool:
    """Draw the panels of an `ogpsa_log.jsonl`; return False, and write no picture, if the log is empty."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_log(log_path)
    if not rows:
        return False

    panels = choose_panels(rows)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axes, rows)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    with replacing(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True
