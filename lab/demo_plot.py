"""The picture of the demo: what the models answer, and what happened while they were trained."""

import json

from llamafactory_ogpsa.run.log import LOG_NAME, read_log

from .launch import save_picture
from .score import TITLES


COLOURS = {"harmful": "#2f855a", "benign": "#dd6b20", "ordinary": "#c53030", "questions": "#2b6cb0"}
RUN_COLOURS = ("#4a5568", "#b7791f", "#2b6cb0")


def read_losses(folder):
    """Read the training loss of a run.

    Args:
        folder: Folder of the run.

    Returns:
        The logged steps and their losses.
    """
    lines = (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return [row["current_steps"] for row in rows], [row["loss"] for row in rows]


def draw(scores, folders, path):
    """Draw the scores, the safety loss, and what was removed from the safety gradient.

    Args:
        scores: Scores by model and set.
        folders: Folders of the runs by model; those with an OGPSA log are drawn in the last panel.
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(15.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])

    names = list(scores)
    for index, (key, colour) in enumerate(COLOURS.items()):
        heights = [100 * scores[name][key] for name in names]
        positions = [x + (index - 1.5) * 0.2 for x in range(len(names))]
        left.bar(positions, heights, width=0.18, color=colour, label=TITLES[key])
        for x, height in zip(positions, heights, strict=True):
            left.text(x, height + 1.5, f"{height:.0f}", ha="center", size=9)
    left.set_xticks(range(len(names)), names)
    left.set(ylim=(0, 109), ylabel="% of held-out prompts")
    left.set_title("What the models answer", loc="left", size=11, weight="bold", pad=28)
    legend = left.legend(
        ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.99), columnspacing=0.9, fontsize=9.5
    )
    legend.set_in_layout(False)  # it lies in the title's padding and must not narrow the bars

    for (title, folder), colour in zip(folders.items(), RUN_COLOURS, strict=True):
        middle.plot(*read_losses(folder), color=colour, label=title, linewidth=2)
        if (folder / LOG_NAME).is_file():
            rows = [row for row in read_log(folder / LOG_NAME) if not row.get("refresh")]
            removed = [100 * row["removed"] for row in rows]
            right.plot([row["step"] for row in rows], removed, color=colour, label=title, linewidth=2)
    middle.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    middle.set_title("Loss on the safety data", loc="left", size=11, weight="bold", pad=28)
    right.set(xlabel="step", ylabel="% of the gradient's norm", ylim=(0, 100))
    right.set_title("Removed from the safety gradient", loc="left", size=11, weight="bold", pad=28)
    for axes in (middle, right):
        axes.legend(frameon=False)
    save_picture(figure, path, dpi=150)
