"""From the declarative file to the list of runs, each with the options that `llamafactory-cli train` gets.

A run's folder is named by what it is and by a hash of everything it depends on: options, data, and the run it starts
from. So equal runs of several studies are one run, and a run whose definition changes is a new one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml


# What every run shares. Checkpoints are saved in all runs, though scored only in those of the comparison, so that runs
# are the same and take the same time whatever they are for. Runs are on the CPU, where the sums are the same every
# time. The section `common` of a file changes these.
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
    "save_strategy": "steps",
    "save_only_model": True,
    "logging_steps": 5,
    "use_cpu": True,
    "report_to": "none",
    "overwrite_output_dir": True,
}
SECTIONS = {"seeds", "stages", "pipelines", "reference", "methods", "studies"}
OPTIONAL = {"base", "model", "data", "common", "quick"}  # either a base to train, or a model that is given
# Options of the lab itself, which LLaMA-Factory does not get, begin like this.
OWN_OPTION = "lab_"
STUDY = {"title", "axis", "pipeline", "seeds", "methods", "settings"}


@dataclass(frozen=True)
class Run:
    """One training, or one merging of weights.

    Attributes:
        key: hash of all that decides the result.
        folder: where it is, relative to the lab's folder.
        seed: which base model it belongs to, and the order of its data.
        options: what `llamafactory-cli train` gets; None if weights are merged or given.
        parents: the runs it needs: the one whose model it starts from; for a merging, the base and the tuned model.
        share: for a merging: the tuned model's share.
        compared: whether the checkpoints during training are scored too.
    """

    key: str
    folder: str
    seed: int
    options: dict | None
    parents: tuple["Run", ...] = ()
    share: float | None = None
    compared: bool = False

    @property
    def given(self) -> bool:
        """Whether its weights are there from the start: those of a model that is not trained here."""
        return self.options is None and not self.parents

    @property
    def model(self) -> str:
        """Folder of its full weights, relative to the lab's folder."""
        if self.given:
            return "base"
        kind = None if self.options is None else self.options["finetuning_type"]
        whole = kind in ("full", "freeze") and not has_own_option(self)
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
        path: the file.
        spec: its content.
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
            data_key: Hash of the data and of the source of the untrained model.
            quick: Whether the file's `quick` section replaces others.

        Raises:
            ValueError: A section, key, method or pipeline is unknown or missing; names it and the known ones.
        """
        spec = read_spec(path)
        check_names("section", spec, SECTIONS | OPTIONAL)
        shorter = spec.pop("quick", {})
        if quick:
            spec = take_part(spec, shorter)
        check_given("section", spec, SECTIONS | ({"base"} if "model" not in spec else set()))
        check_names("method", [spec["reference"]], spec["methods"])
        self.path, self.spec = Path(path), spec
        self.reference = self.spec["reference"]
        self.data_key = data_key
        self.runs: dict[str, Run] = {}
        self.bases = {seed: self._base(seed) for seed in self.spec["seeds"]}
        self.comparison = [
            self._point(pipeline, method, {}, seed, compared=True)
            for pipeline in self.spec["pipelines"]
            for method in self.spec["methods"]
            for seed in self.spec["seeds"]
        ]
        self.studies = {name: self._study(study) for name, study in self.spec["studies"].items()}

    def _study(self, study):
        check_names("key of a study", study, STUDY)
        check_given("key of a study", study, STUDY - {"seeds"})
        seeds = study.get("seeds", self.spec["seeds"])
        check_names("seed", seeds, self.spec["seeds"])
        for setting in study["settings"]:
            check_names("option varied by a study", [study["axis"]], {*setting, "cost"})
        return [
            self._point(study["pipeline"], method, setting, seed)
            for method in study["methods"]
            for setting in study["settings"]
            for seed in seeds
        ]

    def _point(self, pipeline, method, setting, seed, compared=False):
        check_names("pipeline", [pipeline], self.spec["pipelines"])
        check_names("method", [method], self.spec["methods"])
        definition, base = self.spec["methods"][method], self.bases[seed]
        if "merge" in definition:
            check_names("option of a merging", setting, {"share"})
            tuned = self._point(pipeline, definition["merge"]["of"], {}, seed).runs
            share = (definition["merge"] | setting)["share"]
            merged = self._add(f"{pipeline} {method} {share:g}", seed, None, (base, tuned[-1]), share)
            return Point(pipeline, method, tuple(setting.items()), seed, (*tuned, merged))

        runs, parent = [], base
        check_given("stage of a method", definition, self.spec["pipelines"][pipeline])
        for stage in self.spec["pipelines"][pipeline]:
            options = self.spec["stages"][stage] | definition[stage] | setting
            parent = self._add(f"{stage} {method}", seed, options, (parent,), compared=compared)
            runs.append(parent)
        return Point(pipeline, method, tuple(setting.items()), seed, tuple(runs))

    def _base(self, seed):
        if "model" in self.spec:
            return self._add("base", self.spec["seeds"][0], None, ())
        return self._add("base", seed, dict(self.spec["base"]), ())

    def _add(self, name, seed, options, parents, share=None, compared=False):
        options = None if options is None else COMMON | self.spec.get("common", {}) | options | {"seed": seed}
        depends = [self.data_key, options, [parent.key for parent in parents], share]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:10]
        words = "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).lower().split())
        if key not in self.runs:
            folder = f"runs/{words}-seed{seed}-{key}"
            self.runs[key] = Run(key, folder, seed, options, tuple(parents), share, compared)
        return self.runs[key]


def read_spec(path):
    """Read a plan's file.

    Args:
        path: The file. A file with the key `of` is a part of the file that this key names, beside it.

    Returns:
        Its sections.
    """
    spec = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if "of" not in spec:
        return spec
    whole = read_spec(Path(path).with_name(spec.pop("of")))
    whole.pop("quick", None)
    return take_part(whole, spec)


def take_part(spec, part):
    """Give a plan with the methods that a part names, and the part's other sections in place of the plan's.

    Raises:
        ValueError: The plan lacks a method that the part names.
    """
    names = part.get("methods", list(spec["methods"]))
    check_names("method", names, spec["methods"])
    return spec | part | {"methods": {name: spec["methods"][name] for name in names}}


def has_own_option(run):
    """Return whether a training needs more than `llamafactory-cli train`."""
    return any(name.startswith(OWN_OPTION) for name in run.options)


def check_names(what, names, allowed):
    """Raise a ValueError that names the first unknown name and the known ones."""
    for name in names:
        if name not in allowed:
            raise ValueError(f"Unknown {what} {name!r}; there are {', '.join(map(repr, sorted(allowed)))}.")


def check_given(what, given, needed):
    """Raise a ValueError that names the first missing name and all that are needed."""
    for name in sorted(needed):
        if name not in given:
            raise ValueError(f"Missing {what} {name!r}; needed are {', '.join(map(repr, sorted(needed)))}.")


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
    options = {name: value for name, value in run.options.items() if not name.startswith(OWN_OPTION)}
    Path(path).write_text(yaml.safe_dump(places | options, sort_keys=False), encoding="utf-8")
