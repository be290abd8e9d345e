"""Write `results-real.md` and its picture from the finished runs."""

import pandas as pd

from .. import figures
from ..launch import write_whole
from ..report import markdown, mean_range, shown
from ..results import costs_of, list_versions, read_result
from .ifeval import MAX_NEW_TOKENS


IFEVAL = "ifeval"


def collect(plan, lab_dir):
    """Read the results.

    Args:
        plan: The plan, its runs finished.
        lab_dir: The lab's folder.

    Returns:
        One row for the base and for each pipeline, method and seed, as a table: `shares/…`, `losses/…`, `cost` in
        general samples per safety sample, `seconds` of training, and `time` over the reference method's; and the
        answers to the same prompts by pipeline and method, of the first seed.
    """
    base = read_result(next(iter(plan.bases.values())), lab_dir)
    rows, answers = [{"pipeline": "", "method": "base model", "seed": 0, **flatten(base)}], {}
    for point in plan.comparison:
        results = [read_result(run, lab_dir) for run in point.runs]
        row = {"pipeline": point.pipeline, "method": point.method, "seed": point.seed, **flatten(results[-1])}
        rows.append(row | costs_of(point.runs, results))
        answers.setdefault((point.pipeline, point.method), results[-1]["scores"]["answers"])
    table = pd.DataFrame(rows)
    naive = table[table.method == plan.reference].set_index(["pipeline", "seed"]).seconds
    keys = zip(table.pipeline, table.seed, strict=True)
    table["time"] = [naive.get(key) for key in keys]
    table["time"] = table.seconds / table["time"]
    return table, {("", "base model"): base["scores"]["answers"], **answers}


def flatten(result):
    """Give the scores of a run as one row."""
    scores = result["scores"]
    row = {f"{kind}/{name}": value for kind in ("shares", "losses") for name, value in scores[kind].items()}
    return row | {IFEVAL: float("nan") if scores["ifeval"] is None else scores["ifeval"]}


def comparison(table, pipeline, methods):
    """Write one pipeline's table.

    Args:
        table: What `collect` returned.
        pipeline: The pipeline.
        methods: Its methods, in order.

    Returns:
        Markdown.
    """
    columns = [name for name in table.columns if name.startswith(("shares/", "losses/")) or name == IFEVAL]
    header = ["", *(title(name) for name in columns), "general samples per safety sample", "time over naive"]
    rows = []
    for method in ("base model", *methods):
        part = table[(table.method == method) & table.pipeline.isin(["", pipeline])]
        costs = ["", ""] if method == "base model" else [f"{part.cost.mean():.2f}", f"{part['time'].mean():.2f}"]
        rows.append([method, *(measured(part[name]) for name in columns), *costs])
    return markdown(header, rows)


def measured(values):
    """Write a mean and its range, or that a figure is missing."""
    return "not measured" if values.isna().any() else mean_range(values)


def title(column):
    """Name a column: refusals go up for harmful sets and down for the others, right answers up, losses down."""
    if column == IFEVAL:
        return "follows instructions (IFEval) ↑"
    kind, name = column.split("/")
    if kind == "losses":
        return f"loss, {name} ↓"
    if name == "questions":
        return "answers questions ↑"
    return f"refuses {name} {'↑' if 'harmful' in name else '↓'}"


def appendix(answers):
    """Write what every method answers to the same prompts; harmful ones are not quoted."""
    first = next(iter(answers.values()))
    parts = []
    for name, examples in first.items():
        if name.startswith("harmful"):
            continue
        for index, (prompt, _) in enumerate(examples):
            rows = [
                [f"{pipeline} {method}".strip(), cell(texts[name][index][1])]
                for (pipeline, method), texts in answers.items()
            ]
            parts += [f"**{name}**: {cell(prompt)}\n", markdown(["", "answer"], rows)]
    return parts


def cell(text):
    """Write a text so that it stays in its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def write(plan, lab_dir, output):
    """Write the results.

    Args:
        plan: The plan, its runs finished.
        lab_dir: The lab's folder.
        output: Folder of `results-real.md` and of `images/`.

    Returns:
        The path of `results-real.md`.
    """
    table, answers = collect(plan, lab_dir)
    methods = list(plan.spec["methods"])
    figures.real_comparison(table, methods, output / "images" / "lab_real.png")
    seeds = plan.spec["seeds"]
    several = f"Means over seeds {', '.join(map(str, seeds))}, with the least and the greatest in brackets"
    means = several if len(seeds) > 1 else f"Seed {seeds[0]}"
    parts = [
        "# The alignment-tax lab on a real model: results\n",
        f"Written by `python -m lab --real --plan {shown(plan.path)}` with the `--data` and `--raw` of its runs, see "
        f"docs/lab.md. Model: {plan.spec['model']['source']}. {means} (a seed "
        "is an order of the data). Held-out prompts, answered greedily; a refusal is one by published phrases in the "
        "first sentence. Losses are nats per answer token. IFEval is the share of its prompts all of whose instructions "
        f"the answer follows, strictly, with at most {MAX_NEW_TOKENS} tokens. Time is that of the training loop.\n",
        f"Made by {'; '.join(list_versions(read_result(run, lab_dir) for run in plan.runs.values()))}.\n",
        "![What the models answer](images/lab_real.png)\n",
    ]
    for pipeline in plan.spec["pipelines"]:
        parts += [f"## {pipeline}\n", comparison(table, pipeline, methods)]
    parts += [
        "## What they answer\n",
        f"The same prompts for all, seed {seeds[0]}. Harmful prompts are not quoted.\n",
        *appendix(answers),
    ]
    path = output / "results-real.md"
    write_whole(path, "\n".join(parts))
    return path
