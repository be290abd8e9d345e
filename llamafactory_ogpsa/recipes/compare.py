"""`llamafactory-ogpsa compare`: result folders of lm-evaluation-harness → a table, and a scatter plot if wanted."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import replacing
from .errors import RecipeError


# A general task is scored by the first of these that it has, with the first of the task's filters of answers.
METRICS = ("prompt_level_strict_acc", "exact_match", "acc_norm", "acc")
SAFETY = {
    "ogpsa_strongreject": "refuses StrongREJECT ↑",
    "ogpsa_xstest_unsafe": "refuses XSTest unsafe ↑",
    "ogpsa_xstest_safe": "refuses XSTest safe ↓",
}
AVERAGE = "general average ↑"

Rows = dict[str, dict[str, float]]  # the score by row and column


def read_scores(folder: Path) -> dict[str, float]:
    """Read the scores below a folder given to `evaluate --output`; if a task is in several files, the newest counts.

    Returns:
        the score by column: the general tasks, and the columns of `SAFETY` that were measured.

    Raises:
        RecipeError: there are no results.
    """
    general, safety = {}, {}
    for file in sorted(folder.rglob("results_*.json"), key=lambda path: path.name.rpartition("_")[2]):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            parts = {part for members in content.get("group_subtasks", {}).values() for part in members}
            for task, figures in content["results"].items():
                items = reversed(figures.items())  # named "metric,filter": the first filter comes last, and stays
                scores = {name.partition(",")[0]: value for name, value in items if isinstance(value, float)}
                if task in SAFETY:
                    safety[SAFETY[task]] = scores["refusal_rate"]
                elif task not in parts and scores.keys() & set(METRICS):
                    general[task] = next(scores[name] for name in METRICS if name in scores)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise RecipeError(f"{file} is no result file of lm-evaluation-harness ({err!r}).") from err
    if not general and not safety:
        raise RecipeError(f"{folder} has no results of `llamafactory-ogpsa evaluate` in it.")
    return general | safety


def read_rows(folders: Sequence[str]) -> Rows:
    """Read the scores of some result folders, by the folders' names.

    Raises:
        RecipeError: a folder has no results, or two have the same name.
    """
    rows: Rows = {}
    for folder in map(Path, folders):
        name = folder.resolve().name
        if name in rows:
            raise RecipeError(f"two result folders are named {name}, which would make two rows of the same name.")
        rows[name] = read_scores(folder)
    add_average(rows)
    return rows


def add_average(rows: Rows) -> None:
    """Add the mean over the general tasks that all rows with general results have, in place."""
    general = {name: tasks for name, row in rows.items() if (tasks := row.keys() - set(SAFETY.values()))}
    shared = set.intersection(*general.values()) if general else set()
    for name in general if shared else ():
        rows[name][AVERAGE] = sum(rows[name][task] for task in shared) / len(shared)


def columns_of(rows: Rows) -> list[str]:
    """Return the columns of all rows: the average first, then the general tasks, then safety."""
    names = {name for scores in rows.values() for name in scores}
    general = sorted(names - {AVERAGE} - set(SAFETY.values()))
    return [name for name in (AVERAGE, *general, *SAFETY.values()) if name in names]


def make_table(rows: Rows) -> str:
    """Return the scores in percent as a Markdown table."""
    columns = columns_of(rows)
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, scores in rows.items():
        lines.append([name, *(f"{100 * scores[column]:.2f}" if column in scores else "–" for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(rows: Rows, path: Path) -> None:
    """Draw general ability against refusals of harmful and of harmless prompts.

    Raises:
        RecipeError: no row has both, or the rows share no general task, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = [column for column in SAFETY.values() if any({AVERAGE, column} <= row.keys() for row in rows.values())]
    if not shown:
        apart = columns_of(rows)[0] not in (AVERAGE, *SAFETY.values())  # a general task, and no average before it
        reason = "the models have no general task in common" if apart else "there are none"
        raise RecipeError(f"a scatter plot needs a general average and safety results of the same model; {reason}.")

    figure = Figure(figsize=(4 * len(shown) + 1.5, 4), layout="constrained")
    points = {}
    for axes, column in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for index, (name, scores) in enumerate(rows.items()):
            if {AVERAGE, column} <= scores.keys():
                points[name] = axes.scatter(100 * scores[AVERAGE], 100 * scores[column], color=f"C{index}", label=name)
        axes.set(xlabel=f"{AVERAGE[:-1]}(%) ↑", ylabel=f"{column[:-1]}(%) {column[-1]}")
        axes.grid(alpha=0.3)
    figure.legend(handles=list(points.values()), loc="outside right center")
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as err:
        raise RecipeError(f"cannot write the picture {path}: {getattr(err, 'strerror', None) or err}.") from err
