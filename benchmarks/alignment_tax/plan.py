"""From the declarative file to the list of runs, each with the options that `llamafactory-cli train` gets.

A run's folder is named by what it is and by a hash of everything it depends on: options, data, and the run it starts
from. Equal runs of several studies are therefore one, and a run whose definition changes is another.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml


# What every run shares, and what the lab fills in.
COMMON = {
    "do_train": True,
    "template": "chatml",
    "cutoff_len": 64,
    "overwrite_cache": True,
    "dataloader_num_workers": 0,
    "disable_gradient_checkpointing": True,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "save_strategy": "no",
    "report_to": "none",
    "overwrite_output_dir": True,
}
SECTIONS = {"seeds", "base", "stages", "pipelines", "reference", "methods", "curves", "studies", "quick"}


@dataclass(frozen=True)
class Run:
    """One training, or one merging of weights.

    Attributes:
        folder: where it is, relative to the lab's folder.
        seed: which base model it belongs to, and the order of its data.
        options: what `llamafactory-cli train` gets; None where weights are merged.
        parents: the runs it needs: the one whose model it starts from; of a merging, the base and the tuned model.
        share: of a merging: the tuned model's share.
    """

    folder: str
    seed: int
    options: dict | None
    parents: tuple["Run", ...] = ()
    share: float | None = None

    @property
    def model(self) -> str:
        """Folder of its full weights, relative to the lab's folder."""
        whole = self.options is not None and self.options["finetuning_type"] == "full"
        return f"{self.folder}/{'train' if whole else 'model'}"


@dataclass(frozen=True)
class Point:
    """What a table or a plot shows: the last run of a pipeline, for one method, setting and seed."""

    pipeline: str
    method: str
    setting: tuple[tuple[str, object], ...]
    seed: int
    runs: tuple[Run, ...]


class Plan:
    """The runs of the lab and what they are for.

    Attributes:
        spec: the file's content.
        reference: the method that the others are measured against.
        runs: all runs by key, parents before what needs them.
        bases: the base model of each seed.
        comparison: every method in every pipeline.
        studies: the points of each study by its name.
    """

    def __init__(self, path, data_key, quick=False):
        """Read the file.

        Args:
            path: The declarative file.
            data_key: Hash of the data and of the untrained model.
            quick: Whether the file's `quick` section replaces others.

        Raises:
            ValueError: A section, method or pipeline is not known; names it and those there are.
        """
        spec = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        check_names("section", spec, SECTIONS)
        shorter = spec.pop("quick", {})
        if quick:
            names = shorter.pop("methods")
            check_names("method", names, spec["methods"])
            spec |= shorter | {"methods": {name: spec["methods"][name] for name in names}}
        self.spec = {"curves": {}, "studies": {}} | spec
        self.reference = self.spec["reference"]
        self.data_key = data_key
        self.runs: dict[str, Run] = {}
        self.bases = {seed: self._base(seed) for seed in self.spec["seeds"]}
        self.comparison = [
            self._point(pipeline, method, {}, seed)
            for pipeline in self.spec["pipelines"]
            for method in self.spec["methods"]
            for seed in self.spec["seeds"]
        ]
        self.studies = {name: self._study(study) for name, study in self.spec.get("studies", {}).items()}

    def _study(self, study):
        check_names("key of a study", study, {"title", "axis", "pipeline", "methods", "settings"})
        return [
            self._point(study["pipeline"], method, setting, seed)
            for method in study["methods"]
            for setting in study["settings"]
            for seed in self.spec["seeds"]
        ]

    def _point(self, pipeline, method, setting, seed):
        check_names("pipeline", [pipeline], self.spec["pipelines"])
        check_names("method", [method], self.spec["methods"])
        definition, base = self.spec["methods"][method], self.bases[seed]
        if "merge" in definition:
            tuned = self._point(pipeline, definition["merge"]["of"], {}, seed).runs
            share = (definition["merge"] | setting)["share"]
            merged = self._add(f"{pipeline} {method} {share:g}", seed, None, (base, tuned[-1]), share)
            return Point(pipeline, method, tuple(setting.items()), seed, (*tuned, merged))

        runs, parent = [], base
        for stage in self.spec["pipelines"][pipeline]:
            stock = self.spec["stages"][stage] | definition[stage]
            options = stock | setting
            if options == stock and stage in self.spec["curves"]:  # a study's setting may be the comparison's
                options |= {
                    "save_strategy": "steps",
                    "save_steps": self.spec["curves"][stage],
                    "save_only_model": True,
                }
            parent = self._add(f"{stage} {method}", seed, options, (parent,))
            runs.append(parent)
        return Point(pipeline, method, tuple(setting.items()), seed, tuple(runs))

    def _base(self, seed):
        return self._add("base", seed, dict(self.spec["base"]), ())

    def _add(self, name, seed, options, parents, share=None):
        options = None if options is None else COMMON | {"logging_steps": 5} | options | {"seed": seed}
        depends = [self.data_key, options, [parent.folder for parent in parents], share]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:10]
        words = "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).lower().split())
        if key not in self.runs:
            self.runs[key] = Run(f"runs/{words}-seed{seed}-{key}", seed, options, tuple(parents), share)
        return self.runs[key]


def check_names(what, names, allowed):
    """Raise a ValueError that names the first unknown name and those there are."""
    for name in names:
        if name not in allowed:
            raise ValueError(f"Unknown {what} {name!r}; there are {', '.join(map(repr, sorted(allowed)))}.")


def write_yaml(run, lab_dir, path):
    """Write the file that `llamafactory-cli train` gets for a run.

    Args:
        run: The run; its parents have been made.
        lab_dir: The lab's folder, as seen from where the training is started.
        path: The file to write.
    """
    model = f"init-seed{run.seed}" if not run.parents else run.parents[0].model
    places = {
        "model_name_or_path": f"{lab_dir}/{model}",
        "dataset_dir": f"{lab_dir}/data",
        "output_dir": f"{lab_dir}/{run.folder}/train",
    }
    Path(path).write_text(yaml.safe_dump(places | run.options, sort_keys=False), encoding="utf-8")


def reference_samples(options):
    """Count the samples of all reference passes of a run.

    Args:
        options: The run's options.

    Returns:
        Reference samples, 0 for a run without OGPSA.
    """
    if not options["stage"].startswith("ogpsa_"):
        return 0
    per_set = options.get("ogpsa_refresh_samples") or options["ogpsa_num_samples"]
    refreshes = -(-options["max_steps"] // options["ogpsa_update_interval"])
    return refreshes * per_set * len(options["ogpsa_dataset"].split(","))
