"""Make one run: train or merge, score what it generates, and leave `result.json` when all is done."""

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import os
import resource
import shutil
import sys
import traceback
from pathlib import Path

import torch

import llamafactory_ogpsa
from llamafactory_ogpsa.run.log import LOG_NAME, read_log

from . import ROOT
from .launch import write_whole
from .plan import write_yaml
from .results import FIGURES


# The lab's files that decide a result; the others choose what is run and lay it out.
DECISIVE = ("train.py", "base_model.py", "generate.py", "score.py", "tiny/score.py", "real/lab.py", "real/ifeval.py")
# What a run leaves beside its scores if nothing was trained.
NOTHING_TRAINED = {"seconds": 0.0, "memory": 0, "train_samples": 0, "reference_samples": 0, "curve": []}


def make_run(run, lab_dir, score, threads=None):
    """Make a run in a process of its own, from the folder that holds the repository.

    Its output goes to `run.log`. `result.json` is written last: a folder without it is not finished.

    Args:
        run: The run; its parents have been made.
        lab_dir: The lab's folder, relative to the repository's.
        score: Function of a model's folder and the data folder that returns the scores.
        threads: Threads to compute with; None for as many as PyTorch takes.

    Raises:
        RuntimeError: The run failed, or another process is making it; says where its output is.
    """
    os.chdir(ROOT)
    folder = Path(lab_dir) / run.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{folder} is being made by another process, perhaps of a lab that was killed."
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        log = os.open(folder / "run.log", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            _make(run, lab_dir, folder, score, threads)
        except BaseException as err:
            traceback.print_exc()
            sys.stderr.flush()
            raise RuntimeError(f"{folder} failed ({type(err).__name__}: {err}); its output is in {folder}/run.log")


def _make(run, lab_dir, folder, score, threads):
    if threads:
        torch.set_num_threads(threads)
    if run.given:
        result = dict(NOTHING_TRAINED)
    elif run.options is None:
        result = _merge(run, lab_dir, folder)
    else:
        result = _train(run, lab_dir, folder, score)
    result |= {"seed": run.seed, "options": run.options, "share": run.share, "made_by": made_by()}
    result["scores"] = score(Path(lab_dir) / run.model, Path(lab_dir) / "data")
    write_whole(folder / "result.json", json.dumps(result, indent=1))


def made_by():
    """Name the versions that decide a result; for this project, a hash of its sources."""
    versions = {name: importlib.metadata.version(name) for name in ("llamafactory", "torch", "transformers")}
    digest = hashlib.sha256()
    package = Path(llamafactory_ogpsa.__file__).parent
    for path in (*sorted(package.rglob("*.py")), *(ROOT / "lab" / name for name in DECISIVE)):
        digest.update(path.read_bytes())
    return versions | {"sources": digest.hexdigest()[:10]}


def _train(run, lab_dir, folder, score):
    """Train by LLaMA-Factory and score the checkpoints."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp
    from transformers import AutoTokenizer

    write_yaml(run, lab_dir, folder / "train.yaml")
    sys.argv = ["llamafactory-cli", str(folder / "train.yaml")]
    with osf(run.options) as wrapped:
        run_exp(read_args())
    # In KiB on Linux; it includes the modules of the process that this one was forked from.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    adapted = wrapped[0] if wrapped else None
    if run.options["finetuning_type"] == "lora":
        from peft import AutoPeftModelForCausalLM

        adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "train")
    if adapted is not None:
        adapted.merge_and_unload().save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(folder / "train").save_pretrained(folder / "model")

    data_dir, names = Path(lab_dir) / "data", run.options["dataset"].split(",")
    curve = []
    for checkpoint in sorted((folder / "train").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        if run.compared:
            scores = score(checkpoint, data_dir)
            curve.append({"step": int(checkpoint.name.split("-")[1]), **{name: scores[name] for name in FIGURES}})
        shutil.rmtree(checkpoint)

    trained = json.loads((folder / "train" / "train_results.json").read_text())
    steps = json.loads((folder / "train" / "trainer_state.json").read_text())["global_step"]
    return {
        "seconds": trained["train_runtime"],
        "memory": memory,
        "train_samples": steps * run.options["per_device_train_batch_size"],
        "reference_samples": count_reference_samples(run.options, folder / "train" / LOG_NAME, data_dir),
        "dataset_sizes": [_size(data_dir, name) for name in names],
        "curve": curve,
    }


@contextlib.contextmanager
def osf(options):
    """Train by PEFT's orthogonal subspace fine-tuning (OSF) if the options ask for it; LLaMA-Factory does not know it.

    The model that the workflow loads is wrapped before its trainer gets it; all else is LLaMA-Factory's.

    Args:
        options: The run's options; `lab_osf_rank` is the share of each weight's singular directions that is kept.

    Yields:
        A list that holds the wrapped model when the workflow has loaded it; empty if OSF is not asked for.
    """
    wrapped = []
    if "lab_osf_rank" not in options:
        yield wrapped
        return
    from peft import OSFConfig, get_peft_model

    workflow = importlib.import_module(f"llamafactory.train.{options['stage']}.workflow")
    load = workflow.load_model

    def load_and_wrap(*args, **kwargs):
        config = OSFConfig(effective_rank=options["lab_osf_rank"], target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped.append(get_peft_model(load(*args, **kwargs), config))
        return wrapped[0]

    workflow.load_model = load_and_wrap
    try:
        yield wrapped
    finally:
        workflow.load_model = load


def _size(data_dir, name):
    """Count the records of a data set."""
    return len(json.loads((data_dir / f"{name}.json").read_text()))


def count_reference_samples(options, log, data_dir):
    """Count the samples of all reference passes of a run, by the refreshes that it logged.

    Args:
        options: The run's options.
        log: Its `ogpsa_log.jsonl`.
        data_dir: Folder of the data sets.
    """
    refreshes = sum(row.get("refresh", False) for row in read_log(log))
    if not refreshes:
        return 0
    per_set = options.get("ogpsa_refresh_samples") or options["ogpsa_num_samples"]
    return refreshes * sum(min(per_set, _size(data_dir, name)) for name in options["ogpsa_dataset"].split(","))


def _merge(run, lab_dir, folder):
    """Interpolate the weights of the base and of a tuned model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = (AutoModelForCausalLM.from_pretrained(Path(lab_dir) / parent.model) for parent in run.parents)
    other = tuned.state_dict()
    weights = {name: torch.lerp(weight, other[name], run.share) for name, weight in base.state_dict().items()}
    base.load_state_dict(weights)
    base.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(Path(lab_dir) / run.parents[0].model).save_pretrained(folder / "model")
    return dict(NOTHING_TRAINED)
