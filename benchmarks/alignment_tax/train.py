"""Make one run: train or merge, score what it generates, and leave `result.json` when all is done."""

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from score import score_checkpoint

from . import ROOT
from .plan import reference_samples, write_yaml


def make_run(run, lab_dir):
    """Make a run in a process of its own, from the folder that holds the repository.

    Its output goes to `run.log`. `result.json` is written last: a folder without it is not finished.

    Args:
        run: The run; its parents have been made.
        lab_dir: The lab's folder, relative to the repository's.

    Raises:
        RuntimeError: The run failed; says where its output is.
    """
    os.chdir(ROOT)
    folder = Path(lab_dir) / run.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = os.open(folder / "run.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        result = _train(run, lab_dir, folder) if run.options is not None else _merge(run, lab_dir, folder)
    except BaseException as err:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        raise RuntimeError(f"{run.folder} failed ({type(err).__name__}: {err}); its output is in {folder}/run.log")

    result |= {"seed": run.seed, "options": run.options, "share": run.share}
    result["scores"] = score_checkpoint(Path(lab_dir) / run.model, Path(lab_dir) / "data")
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(folder / "result.json")


def _train(run, lab_dir, folder):
    """Train by LLaMA-Factory and score the checkpoints on the way."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    write_yaml(run, lab_dir, folder / "train.yaml")
    sys.argv = ["llamafactory-cli", str(folder / "train.yaml")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run_exp(read_args())
    seconds = time.perf_counter() - start
    # In KiB on Linux; the modules of the process that this one was forked from are in both.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    if run.options["finetuning_type"] == "lora":
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        merged = AutoPeftModelForCausalLM.from_pretrained(folder / "train").merge_and_unload()
        merged.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(folder / "train").save_pretrained(folder / "model")

    curve = []
    for checkpoint in sorted((folder / "train").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        if (checkpoint / "config.json").is_file():
            scores = score_checkpoint(checkpoint, Path(lab_dir) / "data")
            figures = {name: scores[name] for name in ("general", "refusal", "over_refusal")}
            curve.append({"step": int(checkpoint.name.split("-")[1]), **figures})
        shutil.rmtree(checkpoint)
    data_dir, names = Path(lab_dir) / "data", run.options["dataset"].split(",")
    steps = json.loads((folder / "train" / "trainer_state.json").read_text())["global_step"]
    return {
        "seconds": seconds,
        "memory": memory,
        "memory_before": before * 1024,
        "train_samples": steps * run.options["per_device_train_batch_size"],
        "reference_samples": reference_samples(run.options),
        "dataset_sizes": [len(json.loads((data_dir / f"{name}.json").read_text())) for name in names],
        "curve": curve,
    }


def _merge(run, lab_dir, folder):
    """Interpolate the weights of the base and of a tuned model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = (AutoModelForCausalLM.from_pretrained(Path(lab_dir) / parent.model) for parent in run.parents)
    other = tuned.state_dict()
    base.load_state_dict(
        {name: torch.lerp(weight, other[name], run.share) for name, weight in base.state_dict().items()}
    )
    base.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(Path(lab_dir) / run.parents[0].model).save_pretrained(folder / "model")
    return {"seconds": 0.0, "memory": 0, "train_samples": 0, "reference_samples": 0, "curve": []}
