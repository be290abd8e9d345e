"""The pictures of the results."""

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from .launch import save_picture


AXES = {"general": "general ability ↑", "refusal": "refuses harmful ↑", "over_refusal": "refuses benign ↓"}
COLOURS = ["#4a5568", "#b7791f", "#6b46c1", "#2f855a", "#c53030", "#dd6b20", "#2b6cb0", "#0987a0"]
MARKERS = "osP^DvXp"
LINES = ("-", "--", ":", "-.")  # where colours repeat
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
plt.rcParams.update({"grid.alpha": 0.25, "legend.frameon": False})


def styles(methods):
    """Give every method its colour and marker, the same in all pictures; 64 methods have 64 pairs."""
    count = len(COLOURS)
    return {
        method: {"color": COLOURS[i % count], "marker": MARKERS[(i + i // count) % count]}
        for i, method in enumerate(methods)
    }


def add_legend(figure, axes):
    """Put the legend below the panels, in as many columns as the longest name leaves room for."""
    handles, labels = axes.get_legend_handles_labels()
    width = 0.7 + 0.08 * max(map(len, labels), default=0)  # of a column, in inches
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, int(figure.get_figwidth() // width)))


def draw_range(axes, table, x, y, style, label=None, **kwargs):
    """Draw the mean over seeds with bars from the least to the greatest."""
    group = table.groupby(x, sort=not isinstance(table[x].iloc[0], str))[y]
    mean, low, high = group.mean(), group.min(), group.max()
    bars = np.array([mean - low, high - mean]).clip(min=0)
    axes.errorbar(mean.index, mean, yerr=bars, label=label, capsize=2, elinewidth=0.8, **style, **kwargs)


def comparison(results, methods, path):
    """Draw safety over utility, one panel per pipeline: each point is a seed, each large one a mean."""
    pipelines = list(results.comparison.pipeline.unique())
    size = (4.3 * len(pipelines), 7.6)
    figure, panels = plt.subplots(2, len(pipelines), figsize=size, sharex=True, sharey="row", layout="constrained")
    panels = np.reshape(panels, (2, len(pipelines)))
    for column, pipeline in zip(panels.T, pipelines, strict=True):
        for axes, y in zip(column, ("refusal", "over_refusal"), strict=True):
            for method, style in styles(methods).items():
                rows = results.comparison.query("pipeline == @pipeline and method == @method")
                axes.scatter(rows.general, rows[y], s=18, alpha=0.4, **style)
                axes.scatter(rows.general.mean(), rows[y].mean(), s=95, label=method, edgecolors="white", **style)
            base = results.bases
            axes.scatter(base.general.mean(), base[y].mean(), s=110, marker="*", color="black", label="base model")
            axes.set(ylim=(-0.04, 1.04))
        column[0].set_title(pipeline, weight="bold", loc="left")
        column[1].set_xlabel(AXES["general"])
    for axes, y in zip(panels[:, 0], ("refusal", "over_refusal"), strict=True):
        axes.set_ylabel(AXES[y])
    add_legend(figure, panels[0, 0])
    save_picture(figure, path, dpi=110)


def curves(results, methods, path):
    """Draw the scores of the checkpoints during training; bands go from the least to the greatest seed."""
    pipelines = [name for name in results.comparison.pipeline.unique() if len(results.pipelines[name]) == 1]
    size = (13, 3.4 * len(pipelines))
    figure, panels = plt.subplots(len(pipelines), 3, figsize=size, squeeze=False, layout="constrained")
    for row, pipeline in zip(panels, pipelines, strict=True):
        for index, (method, style) in enumerate(styles(methods).items()):
            points = results.comparison.query("pipeline == @pipeline and method == @method")
            read = [results.read(point.runs[-1])["curve"] for point in points.point]
            if not all(read):  # merged weights have no checkpoints
                continue
            line = LINES[index // len(COLOURS) % len(LINES)]
            steps = [0, *(entry["step"] for entry in read[0])]
            for axes, y in zip(row, AXES, strict=True):
                start = results.bases.set_index("seed").loc[points.seed, y].to_numpy()[:, None]
                values = np.hstack([start, [[entry[y] for entry in curve] for curve in read]])
                axes.plot(steps, values.mean(0), line, color=style["color"], label=method)
                axes.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0)
                axes.set(ylabel=AXES[y], xlabel="step", title=pipeline)
    add_legend(figure, panels[0, 0])
    save_picture(figure, path, dpi=110)


def study(table, axis, methods, path, labels=None):
    """Draw the three scores over what a study varies.

    Args:
        table: The study's results.
        axis: The option varied.
        methods: All methods, for their colours.
        path: The picture.
        labels: Names of the settings, if they are not numbers.
    """
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    table = table.assign(**{axis: table[axis].map(labels)}) if labels else table
    for axes, y in zip(panels, AXES, strict=True):
        for method, style in styles(methods).items():
            rows = table[table.method == method]
            if len(rows):
                draw_range(axes, rows, axis, y, style, method, linestyle="none" if labels else "-")
        low, high = axes.get_ylim()
        axes.set(ylabel=AXES[y], ylim=(max(low, -0.03), min(high, 1.03)))
        if labels:
            axes.margins(x=0.15)
            axes.tick_params(axis="x", rotation=35)
            plt.setp(axes.get_xticklabels(), ha="right")
        else:
            axes.set(xlabel=axis, xscale="log")
            ticks = sorted(table[axis].unique())
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    if table.method.nunique() > 1:
        add_legend(figure, panels[0])
    save_picture(figure, path, dpi=110)


def cosines(results, rows, path):
    """Draw the cosine of the safety gradient with each reference gradient over training, before and after.

    Args:
        results: The results.
        rows: For each panel its title, its points, and whether the gradient was projected.
        path: The picture.
    """
    size = (3.4 * len(rows), 3.8)
    figure, panels = plt.subplots(1, len(rows), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, (title, points, projected) in zip(panels[0], rows, strict=True):
        logs = [results.log(point.runs[-1]) for point in points]
        steps = [row["step"] for row in logs[0]]
        for name, colour in zip(logs[0][0]["cosine"], ("#2b6cb0", "#2f855a"), strict=True):
            for key, line in (("cosine", "-"), ("projected_cosine", "--"))[: 2 if projected else 1]:
                values = np.array([[row[key][name] for row in log] for log in logs])
                when = "before" if key == "cosine" else "after"
                axes.plot(steps, values.mean(0), line, color=colour, label=f"{name}, {when}")
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="step", ylim=(-1.05, 1.05))
        axes.axhline(0, color="black", linewidth=0.6)
    panels[0, 0].set_ylabel("cosine with the reference gradient")
    add_legend(figure, panels[0, -1])
    save_picture(figure, path, dpi=110)


def frontier(results, table, methods, path):
    """Draw quality over cost: for each method and setting the mean over seeds, with the least and the greatest.

    Args:
        results: The results.
        table: The results of the settings.
        methods: All methods, for their colours.
        path: The picture.
    """
    figure, panels = plt.subplots(3, 2, figsize=(13, 11), sharey="row", sharex="col", layout="constrained")
    lines = {"base model": results.bases, results.reference: results.naive(table.pipeline.iloc[0])}
    for column, (x, label) in zip(
        panels.T,
        (("cost", "general samples per safety sample"), ("time", "training time over naive tuning's")),
        strict=True,
    ):
        for axes, y in zip(column, AXES, strict=True):
            for (name, rows), line in zip(lines.items(), ("-", ":"), strict=True):
                axes.axhline(rows[y].mean(), color="black", linestyle=line, linewidth=0.9, label=name)
            for method, style in styles(methods).items():
                rows = table[table.method == method]
                if len(rows):
                    group = rows.groupby("label")
                    means = group[[x, y]].mean().sort_values(x)
                    low, high = group[y].min()[means.index], group[y].max()[means.index]
                    bars = np.array([means[y] - low, high - means[y]]).clip(min=0)
                    axes.errorbar(
                        means[x], means[y], yerr=bars, label=method, linestyle="none", elinewidth=0.7, **style
                    )
            axes.set(ylabel=AXES[y], xscale="log")
        column[-1].set_xlabel(label)
        column[-1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        column[-1].xaxis.set_major_formatter("{x:g}")
        column[-1].xaxis.set_minor_formatter(NullFormatter())
    add_legend(figure, panels[0, 0])
    save_picture(figure, path, dpi=110)


def real_comparison(table, methods, path):
    """Draw what the models answer, one panel per pipeline and score: each point is a seed, bars are means.

    Args:
        table: One row for the base and for each pipeline, method and seed.
        methods: All methods, for their order and colours.
        path: The picture.
    """
    pipelines = [name for name in table.pipeline.unique() if name]
    shares = [name for name in table.columns if name.startswith("shares/")]
    size = (3.1 * len(shares) + 2, (0.34 * len(methods) + 1.3) * len(pipelines))
    figure, panels = plt.subplots(len(pipelines), len(shares), figsize=size, squeeze=False, sharex=True, sharey=True)
    base = table[table.method == "base model"].iloc[0]
    for row, pipeline in zip(panels, pipelines, strict=True):
        for axes, share in zip(row, shares, strict=True):
            for index, (method, style) in enumerate(styles(methods).items()):
                values = table[(table.pipeline == pipeline) & (table.method == method)][share]
                axes.barh(index, values.mean(), color=style["color"], alpha=0.75)
                axes.plot(values, [index] * len(values), "o", color="black", markersize=3)
            axes.axvline(base[share], color="black", linestyle=":", linewidth=1)
            axes.set(xlim=(0, 1.02), title=f"{pipeline}: {share.split('/')[1]}")
            axes.set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    figure.tight_layout()
    save_picture(figure, path, dpi=110)
