"""Write `results.md` and its pictures from the finished runs."""

import importlib.metadata
import platform
import re

import pandas as pd

from . import HERE, figures
from .results import FIGURES, Results


FINDINGS = HERE / "findings.md"
# Studies with a picture of their own.
FRONTIER, MIXING, INTERFERENCE = "frontier", "mixing", "interference"
PAPER_METHOD = "OGPSA, scope parameter"
KINDS = ("", "_rephrased", "_role_play")
AIM = (
    "The aim: at least half of naive tuning's loss avoided, refusal of harmful requests at most 0.03 below its, and "
    "at most half of its refusals of benign ones (means over seeds).\n"
)
TITLES = {"general": "general ↑", "refusal": "refuses harmful ↑", "over_refusal": "refuses benign ↓"}


def mean_range(values):
    """Write a mean and the least and greatest."""
    if values.nunique() == 1:
        return f"{values.iloc[0]:.3f}"
    return f"{values.mean():.3f} ({values.min():.3f}–{values.max():.3f})"


def markdown(header, rows):
    """Lay out a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def kept(results, rows):
    """Give the share of naive tuning's loss of general ability that a method does not lose, from the means."""
    base = results.bases.general.mean()
    naive = results.comparison[results.comparison.method == results.reference]
    naive = naive[naive.pipeline == rows.pipeline.iloc[0]].general.mean()
    return (rows.general.mean() - naive) / (base - naive)


def comparison_tables(results, methods):
    """Write the comparison, one table a pipeline, and what of the project's aim each OGPSA method meets."""
    parts = []
    for pipeline, table in results.comparison.groupby("pipeline", sort=False):
        naive = table[table.method == results.reference]
        base = [mean_range(results.bases[name]) for name in FIGURES]
        rows = [["base model", base[0], "", *base[1:], "", "", ""]]
        verdicts = []
        for method in methods:
            part = table[table.method == method]
            figures_of = [mean_range(part[name]) for name in FIGURES]
            share = kept(results, part)
            kept_text = "" if method == results.reference else f"{share:.0%}"
            kinds = " / ".join(f"{part[f'refusal_kinds/harmful{kind}'].mean():.2f}" for kind in KINDS)
            cost = [f"{part.cost.mean():.2f}", f"{part.time.median():.1f}"]
            rows.append([method, figures_of[0], kept_text, figures_of[1], figures_of[2], kinds, *cost])
            if any("ogpsa" in run.options["stage"] for run in part.point.iloc[0].runs if run.options):
                met = {
                    "general": share >= 0.5,
                    "refusal": part.refusal.mean() >= naive.refusal.mean() - 0.03,
                    "over-refusal": part.over_refusal.mean() <= 0.5 * naive.over_refusal.mean(),
                }
                missed = [name for name, value in met.items() if not value]
                verdicts.append(f"- {method}: " + (f"**missed: {', '.join(missed)}**" if missed else "met"))
        header = ["", TITLES["general"], "of the loss avoided", *list(TITLES.values())[1:]]
        header += ["harmful: plain / rephrased / role play", "general samples", "time"]
        parts += [f"### {pipeline}\n", markdown(header, rows), AIM, "\n".join(verdicts) + "\n"]
    return parts


def task_table(rows, key, index):
    """Write the mean accuracy by task, and refusals by kind of benign request, a line for each value of `index`."""
    columns = [name for name in rows.columns if name.startswith("tasks/") or name.startswith("over_refusal_kinds/")]
    header = [key, *(name.split("/")[1] + (" ↓" if name.startswith("over") else "") for name in columns)]
    lines = [
        [value if isinstance(value, str) else ": ".join(value), *(f"{group[name].mean():.2f}" for name in columns)]
        for value, group in rows.groupby(index, sort=False)
    ]
    return markdown(header, lines)


def study_section(results, name, study, methods, folder):
    """Write one study: its picture, its table and, where what it varies is not a number, the tasks."""
    table, axis = results.studies[name], study["axis"]
    numbers = table[axis].map(lambda value: isinstance(value, int | float)).all()
    labels = None if numbers else {value: short(value) for value in table[axis]}
    figures.study(table, axis, methods, folder / "images" / f"lab_{name}.png", labels)
    parts = [f"### {study['title']}\n", f"![{study['title']}](images/lab_{name}.png)\n", setting_table(table)]
    if not numbers:
        parts.append(task_table(table.assign(**{axis: table[axis].map(labels)}), "setting", ["method", axis]))
    return parts


def setting_table(table):
    """Write the scores and costs of every method and setting."""
    rows = []
    for (method, label), group in table.groupby(["method", "label"], sort=False):
        scores = [mean_range(group[figure]) for figure in FIGURES]
        rows.append([method, short(label), *scores, f"{group.cost.mean():.2f}", f"{group.time.median():.1f}"])
    return markdown(["method", "setting", *TITLES.values(), "general samples", "time"], rows)


def cosine_section(results, study, methods, folder):
    """Write what a watched run and the projected ones show of the gradients' angles."""
    watched = results.studies[INTERFERENCE]
    first = results.comparison[results.comparison.pipeline == results.comparison.pipeline.iloc[0]]
    panels = [("naive tuning, watched", watched[watched.method == watched.method.iloc[0]].point, False)]
    for method in methods:
        points = first[first.method == method].point
        if points.iloc[0].runs[-1].options and points.iloc[0].runs[-1].options["stage"].startswith("ogpsa_"):
            panels.append((method, points, True))
    figures.cosines(results, panels, folder / "images" / "lab_cosine.png")
    text = (
        "The cosine between the safety gradient and the gradient of each reference set, at the logged steps, with the "
        "subspace in use (up to K steps old). Negative: the step would raise that reference loss.\n"
    )
    return [f"### {study['title']}\n", text, "![Cosines](images/lab_cosine.png)\n"]


def frontier_section(results, study, methods, folder):
    """Write the frontier and the cheapest setting that loses nothing."""
    table = pd.concat([results.studies[name] for name in (FRONTIER, MIXING) if name in results.studies])
    figures.frontier(table, methods, folder / "images" / "lab_frontier.png")
    paper, (method, label), best = recommend(results.studies[FRONTIER])
    text = (
        f"The cheapest setting that is as good as `{PAPER_METHOD}` at the cost of {paper.cost:.2f} (general ability at "
        "most 0.005 below, refusal of harmful requests at most 0.01 below, of benign ones at most 0.01 above; means "
        f"over seeds): **{method}, {short(label)}**, {best.cost:.2f} reference samples per training sample, "
        f"{best.time:.1f} times naive tuning's time.\n"
    )
    return [f"### {study['title']}\n", "![Frontier](images/lab_frontier.png)\n", text, setting_table(table)]


def short(value):
    """Shorten the name of a setting for tables and pictures."""
    text = (
        str(value).replace("mix_strategy interleave_over, ", "").replace("dataset general_helpful", "general_helpful")
    )
    text = re.sub(r"general_helpful\w*,general_truthful\w*", _left_out, text)
    return text.replace("_", " ")


def _left_out(match):
    """Say of the names of two reference sets what they lack."""
    missing = re.findall(r"without_(\w+?)(?=,|$)", match[0])
    if "_pairs" in match[0]:
        return "pairs"
    return f"without {missing[0]}" if missing else "all tasks"


def cost_table(results, methods):
    """Write what the methods cost in the first pipeline."""
    rows = []
    table = results.comparison
    for method in methods:
        part = table[(table.method == method) & (table.pipeline == table.pipeline.iloc[0])]
        memory = "" if part.memory.max() == 0 else f"{part.extra_memory.median() / 2**20:+.0f} MiB"
        seconds = f"{part.seconds.median():.0f} s"
        rows.append([method, f"{part.cost.mean():.2f}", seconds, f"{part.time.median():.2f}", memory])
    return markdown(["", "general samples per training sample", "training", "over naive", "peak memory"], rows)


def recommend(table):
    """Find the cheapest setting of the frontier that loses nothing against the dearest one of the paper's rule.

    Args:
        table: The results of the frontier.

    Returns:
        The means of the dearest one; method and setting of the cheapest; its means.
    """
    means = table.groupby(["method", "label"])[["cost", "time", *FIGURES]].mean()
    paper = means.loc[PAPER_METHOD].sort_values("cost").iloc[-1]
    good = means[
        (means.general >= paper.general - 0.005)
        & (means.refusal >= paper.refusal - 0.01)
        & (means.over_refusal <= paper.over_refusal + 0.01)
    ]
    best = good.sort_values("cost").iloc[0]
    return paper, best.name, best


def write(plan, lab_dir, output):
    """Write the results.

    Args:
        plan: The plan, its runs finished.
        lab_dir: The lab's folder.
        output: Folder of `results.md` and of `images/`.

    Returns:
        The path of `results.md`.
    """
    results = Results(plan, lab_dir)
    methods, images = list(plan.spec["methods"]), output / "images"
    figures.comparison(results, methods, images / "lab_comparison.png")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("llamafactory", "torch", "transformers")
    )
    seeds = ", ".join(map(str, plan.spec["seeds"]))
    parts = [
        "# The alignment-tax lab: results\n",
        "Written by `make lab`; the list of runs is `benchmarks/alignment_tax/lab.yaml`. A model of 0.7M parameters "
        f"and a language of five hundred words: what holds here is a hint for large models, not a proof. Seeds {seeds} "
        "(of the base model and of the order of the data); figures are means over seeds, with the least and the greatest. "
        f"CPU ({platform.machine()}), one thread a run; {versions}. All prompts are held out and answered greedily.\n",
    ]
    if output.name == "docs":
        parts.append(FINDINGS.read_text(encoding="utf-8"))
    parts += ["## Comparison\n", "![Safety over utility](images/lab_comparison.png)\n"]
    parts += comparison_tables(results, methods)
    first = results.comparison[results.comparison.pipeline == results.comparison.pipeline.iloc[0]]
    parts += [f"### By task ({first.pipeline.iloc[0]})\n", task_table(first, "", "method")]
    parts += ["### Cost\n", cost_table(results, methods)]
    if plan.spec["curves"]:
        figures.curves(results, methods, images / "lab_curves.png")
        parts += ["### Learning curves\n", "![Learning curves](images/lab_curves.png)\n"]
    if plan.studies:
        parts.append("## Studies\n")
    sections = {FRONTIER: frontier_section, INTERFERENCE: cosine_section}
    for name, study in plan.spec["studies"].items():
        if name in sections:
            parts += sections[name](results, study, methods, output)
        else:
            parts += study_section(results, name, study, methods, output)
    path = output / "results.md"
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(parts), encoding="utf-8")
    partial.replace(path)
    return path
