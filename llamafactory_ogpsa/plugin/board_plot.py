"""LlamaBoard's view of a run: the plot beside the log, and the progress bar while a refresh is running."""

import os
import re
import sys
from typing import TYPE_CHECKING, Any

import gradio as gr
from llamafactory.extras.constants import TRAINER_LOG
from llamafactory.extras.ploting import gen_loss_plot

from ..run.log import LOG_NAME, read_log
from ..run.plot import choose_panels
from .board_locales import alert


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Logged when a refresh begins; its row is written to ogpsa_log.jsonl when it has ended.
_REFRESH_BEGINS = re.compile(r"OGPSA refresh at step (\d+)")


def read_rows(output_path: str, name: str) -> list[dict[str, Any]]:
    """Read a log of a run; one that cannot be read counts as empty, so that LlamaBoard goes on following the run."""
    try:
        return read_log(os.path.join(output_path, name))
    except (OSError, ValueError) as err:
        print(f"llamafactory-ogpsa: {err}", file=sys.stderr)
        return []


def find_refresh(running_log: str, output_path: str) -> int | None:
    """Return the step of the refresh that is running; None if none is."""
    begun = _REFRESH_BEGINS.findall(running_log)
    if not begun:
        return None

    step = int(begun[-1])
    ended = any(row.get("refresh") and row["step"] == step for row in read_rows(output_path, LOG_NAME))
    return None if ended else step


def show_refresh(running_log: str, output_path: str, lang: str) -> "gr.Slider | None":
    """Return LlamaBoard's progress bar with a label for the refresh that is running; None if none is."""
    step = find_refresh(running_log, output_path)
    if step is None:
        return None

    rows = read_rows(output_path, TRAINER_LOG)
    label = alert("info_ogpsa_refresh", lang, step)
    if rows:
        label = f"{label} ({rows[-1].get('current_steps')}/{rows[-1].get('total_steps')})"
    return gr.Slider(label=label, value=rows[-1].get("percentage", 0) if rows else 0, visible=True)


def show_figure(output_path: str) -> "gr.Plot":
    """Show the figure of a run; if there is none, the plot stays as it is."""
    figure = make_figure(output_path)
    return gr.Plot() if figure is None else gr.Plot(figure)


def make_figure(output_path: str) -> "Figure | None":
    """Draw LlamaBoard's plot of the loss and, below it, the panels of the OGPSA log; None if that log is empty."""
    rows = read_rows(output_path, LOG_NAME)
    if not rows:
        return None

    try:
        return draw_figure(rows, read_rows(output_path, TRAINER_LOG))
    except Exception as err:  # LlamaBoard would stop following the run, and could not start another
        print(f"llamafactory-ogpsa: the plot cannot be drawn: {err}", file=sys.stderr)
        return None


def draw_figure(rows: list[dict[str, Any]], trainer_rows: list[dict[str, Any]]) -> "Figure":
    """Draw the rows of both logs; see `make_figure`."""
    figure = gen_loss_plot(trainer_rows)
    width, height = figure.get_size_inches()
    panels = choose_panels(rows)
    figure.set_size_inches(width, (1 + 0.75 * len(panels)) * height)
    # LlamaBoard lays the plot's label over the upper left corner.
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.95))
    grid = figure.add_gridspec(1 + len(panels), 1)
    figure.axes[0].set_subplotspec(grid[0])
    for place, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(grid[place]), rows)
    return figure
