"""Show the alignment tax and OGPSA's answer to it, on a laptop, with stock `llamafactory-cli train` only.

Trains a tiny base model (kept for the next time), tunes it for safety by SFT and then DPO, naively and with OGPSA,
scores what the saved checkpoints generate on held-out prompts, prints the table, and leaves in `outputs/demo_tiny/`
the picture `demo.png`, the figures `results.json` and the log of every run.

    python -m lab.tiny.demo
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from llamafactory_ogpsa.run.log import LOG_NAME, read_log

from .. import ROOT
from ..launch import console, save_picture, train, write_whole
from ..score import loss_per_token
from . import data, model
from .score import score_checkpoint, score_tables


YAML_DIR = ROOT / "examples" / "yaml"
TINY_DIR = ROOT / "outputs" / "tiny"
DEMO_DIR = ROOT / "outputs" / "demo_tiny"
KEY_FILE = TINY_DIR / "base" / "demo_key.txt"
RUNS = {
    "naive SFT": "naive_sft",
    "naive SFT → DPO": "naive_dpo",
    "OGPSA SFT": "ogpsa_sft",
    "OGPSA SFT → DPO": "ogpsa_dpo",
}
REFERENCE_SETS = ("general_helpful", "general_truthful")
# More threads hardly help such a small model, and a fixed number gives the same sums everywhere; more than one GPU
# would change the batch.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}


def base_key():
    """Hash everything that the base model depends on."""
    digest = hashlib.sha256()
    files = [*sorted(data.DATA_DIR.glob("*.json")), YAML_DIR / "tiny_base.yaml", Path(model.__file__)]
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def train_yaml(title, name):
    """Train by one of the tiny YAMLs; see `launch.train`."""
    return train(title, f"examples/yaml/tiny_{name}.yaml", DEMO_DIR / f"tiny_{name}.log", ENVIRONMENT)


def train_base():
    """Train the base model, unless the saved one was made from the same data, YAML and script.

    Returns:
        Seconds it took, 0 if it was there already.
    """
    key = base_key()
    if KEY_FILE.is_file() and KEY_FILE.read_text(encoding="utf-8") == key:
        console.print("base model: already trained from these data, kept in outputs/tiny/base")
        return 0.0
    KEY_FILE.unlink(missing_ok=True)
    model.main([str(TINY_DIR / "init")])
    seconds = train_yaml("base", "base")
    write_whole(KEY_FILE, key)  # last: a base without its key was not finished and is trained again
    return seconds


def reference_loss(folder, dataset):
    """Compute a checkpoint's mean loss per answer token on the first 200 records of a set, as OGPSA logs it."""
    records = json.loads((ROOT / "data" / "tiny" / f"{dataset}.json").read_text())
    return loss_per_token(folder, records[:200])


def read_ogpsa_log(name):
    """Read what an OGPSA run logged.

    Args:
        name: Folder of the run.

    Returns:
        Rows of the steps and rows of the refreshes.
    """
    rows = read_log(TINY_DIR / name / LOG_NAME)
    return [row for row in rows if not row.get("refresh")], [row for row in rows if row.get("refresh")]


def draw(results, path):
    """Draw the scores, what was removed from the safety gradient, and the reference losses.

    Args:
        results: What `main` collected.
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    blue, green, orange, grey = "#2b6cb0", "#2f855a", "#dd6b20", "#4a5568"
    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(15.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])

    bars = (("general", "general ability ↑", blue), ("refusal", "refuses harmful ↑", green))
    bars = (*bars, ("over_refusal", "refuses benign ↓", orange))
    names = list(results["scores"])
    for shift, (key, label, color) in zip((-0.27, 0.0, 0.27), bars, strict=True):
        heights = [100 * results["scores"][name][key] for name in names]
        positions = [index + shift for index in range(len(names))]
        left.bar(positions, heights, width=0.25, color=color, label=label)
        for x, height in zip(positions, heights, strict=True):
            left.text(x, height + 1.5, f"{height:.0f}" if height in (0, 100) else f"{height:.1f}", ha="center", size=9)
    left.set_xticks(range(len(names)), [name.replace(" → ", "\n→ ") for name in names])
    left.set(ylim=(0, 109), ylabel="% of held-out prompts")
    left.set_title("What the saved checkpoints answer", loc="left", size=11, weight="bold", pad=28)
    legend = left.legend(ncols=3, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.99), columnspacing=1.2)
    legend.set_in_layout(False)  # it lies in the title's padding and must not narrow the bars

    for name, label, color in (("ogpsa_sft", "SFT", blue), ("ogpsa_dpo", "DPO", grey)):
        steps, _ = read_ogpsa_log(name)
        removed = [100 * row["removed"] for row in steps]
        middle.plot([row["step"] for row in steps], removed, color=color, label=label, linewidth=2)
    middle.set(ylim=(0, 100), xlabel="step", ylabel="% of the gradient's norm")
    middle.set_title("Removed from the safety gradient", loc="left", size=11, weight="bold", pad=28)
    middle.legend(frameon=False, loc="lower right")

    _, refreshes = read_ogpsa_log("ogpsa_sft")
    for name, color in zip(REFERENCE_SETS, (blue, green), strict=True):
        losses = [row["reference_loss"][name] for row in refreshes]
        right.plot([row["step"] for row in refreshes], losses, color=color, linewidth=2, label=name)
        end = results["naive_reference_loss"][name]
        right.plot(refreshes[-1]["step"], end, marker="X", markersize=9, color=color, linestyle="none", clip_on=False)
    right.plot([], [], marker="X", markersize=8, color=grey, linestyle="none", label="where naive SFT ends")
    right.set(yscale="log", xlabel="step", ylabel="loss per answer token")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_title("Reference losses, OGPSA SFT", loc="left", size=11, weight="bold", pad=28)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(0.0, 0.62))
    save_picture(figure, path, dpi=150)


def main():
    """Run the demonstration."""
    start = time.time()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    DEMO_DIR.mkdir(parents=True, exist_ok=True)
    if data.main(["--check"]):
        sys.exit("data/tiny/ is not what `python -m lab.tiny.data` writes; run it to restore the data sets")

    seconds = {"base": train_base()}
    for title, name in RUNS.items():
        seconds[title] = train_yaml(title, name)

    console.print("scoring what the saved checkpoints generate on held-out prompts")
    torch.set_num_threads(1)  # as in training: the same sums everywhere
    folders = {"base": TINY_DIR / "base", **{title: TINY_DIR / name for title, name in RUNS.items()}}
    results = {
        "scores": {title: score_checkpoint(folder) for title, folder in folders.items()},
        "naive_reference_loss": {name: reference_loss(TINY_DIR / "naive_sft", name) for name in REFERENCE_SETS},
        "train_seconds": {title: round(value, 1) for title, value in seconds.items()},
    }
    draw(results, DEMO_DIR / "demo.png")
    results["seconds"] = round(time.time() - start, 1)
    write_whole(DEMO_DIR / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    console.print(*score_tables(results["scores"]))
    console.print(f"{results['seconds']:.0f} s in all; picture and figures: outputs/demo_tiny/demo.png, results.json")


if __name__ == "__main__":
    main()
