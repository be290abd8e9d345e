"""What the runs left, as tables."""

import json
from pathlib import Path

import pandas as pd

from llamafactory_ogpsa.run.log import LOG_NAME, read_log


FIGURES = ("general", "refusal", "over_refusal")


def read_result(run, lab_dir):
    """Read what a run left."""
    return json.loads((Path(lab_dir) / run.folder / "result.json").read_text(encoding="utf-8"))


class Results:
    """The results of a plan whose runs are finished.

    Attributes:
        reference: the method that the others are measured against.
        pipelines: the stages of each pipeline.
        made_by: the versions that made the runs.
        bases: the figures of the base models, one row per seed.
        comparison: one row for each pipeline, method and seed.
        studies: for each study, one row for each method, setting and seed.
    """

    def __init__(self, plan, lab_dir):
        """Read the results of a plan from the lab's folder."""
        self.lab_dir = Path(lab_dir)
        self.reference, self.pipelines = plan.reference, plan.spec["pipelines"]
        self.made_by = list_versions(self.read(run) for run in plan.runs.values())
        self.bases = pd.DataFrame([{"seed": seed, **self._scores(run)} for seed, run in plan.bases.items()])
        self.comparison = self._table(plan.comparison)
        self.studies = {name: self._table(points) for name, points in plan.studies.items()}
        naive = self.comparison[self.comparison.method == self.reference].set_index(["pipeline", "seed"])
        for table in (self.comparison, *self.studies.values()):
            of_naive = naive.loc[list(zip(table.pipeline, table.seed, strict=True))]
            table["time"] = table.seconds / of_naive.seconds.to_numpy()
            table["extra_memory"] = table.memory - of_naive.memory.to_numpy()

    def naive(self, pipeline):
        """Give the rows of the reference method in a pipeline."""
        table = self.comparison
        return table[(table.method == self.reference) & (table.pipeline == pipeline)]

    def read(self, run):
        """Read what a run left."""
        return read_result(run, self.lab_dir)

    def log(self, run):
        """Read the rows of the logged steps of an OGPSA run."""
        rows = read_log(self.lab_dir / run.folder / "train" / LOG_NAME)
        return [row for row in rows if not row.get("refresh")]

    def _scores(self, run):
        scores = self.read(run)["scores"]
        row = {name: scores[name] for name in FIGURES}
        for kind in ("tasks", "refusal_kinds", "over_refusal_kinds"):
            row |= {f"{kind}/{task}": value for task, value in scores[kind].items()}
        return row

    def _table(self, points):
        rows = []
        for point in points:
            results = [self.read(run) for run in point.runs]
            row = {"pipeline": point.pipeline, "method": point.method, "seed": point.seed, **dict(point.setting)}
            row["label"] = ", ".join(f"{name.removeprefix('ogpsa_')} {value}" for name, value in point.setting)
            row |= costs_of(point.runs, results)
            row["memory"] = max(result["memory"] for result in results)
            rows.append(row | self._scores(point.runs[-1]) | {"point": point})
        return pd.DataFrame(rows)


def list_versions(results):
    """List the versions that made the given results, each once."""
    return sorted({", ".join(f"{name} {version}" for name, version in rec["made_by"].items()) for rec in results})


def costs_of(runs, results):
    """Compute what the runs of a pipeline cost: general samples per safety sample, and seconds of training.

    Args:
        runs: The runs.
        results: What they left, in the same order.

    Returns:
        Dictionary with `cost` and `seconds`.
    """
    counts = [count_samples(run.options, result) for run, result in zip(runs, results, strict=True)]
    safety, general = (sum(column) for column in zip(*counts, strict=True))
    return {"cost": general / safety, "seconds": sum(result["seconds"] for result in results)}


def count_samples(options, result):
    """Count the safety samples that a run trained on, and the general samples that it went through.

    General samples are those of the reference passes and those mixed into the training.

    Args:
        options: The run's options, None for merged weights.
        result: What the run left.

    Returns:
        The two numbers.
    """
    if options is None:
        return 0, 0
    if "interleave_probs" in options:
        shares = [float(share) for share in options["interleave_probs"].split(",")]
    else:
        shares = result["dataset_sizes"]
    safety = result["train_samples"] * shares[0] / sum(shares)
    return safety, result["train_samples"] - safety + result["reference_samples"]
