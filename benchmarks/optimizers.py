"""What optimizers make of a projected gradient: the log's figures of the update, with OGPSA and without.

    python -m benchmarks.optimizers           # the table of docs/optimizers.md
    python -m benchmarks.optimizers --cost    # what measuring an update costs at a logged step

A Qwen2 of 0.8 million parameters is trained on `data/tiny/general_base.json`, then for a few steps on
`data/tiny/safety_sft.json` with each optimizer: once with `ogpsa_method: monitor`, whose weights are those of a stock run,
and once with `orthogonal`. Figures are means over the steps but the first.
"""

import argparse
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from llamafactory_ogpsa.run.log import LOG_NAME, read_log

from .devices import environment
from .timing import measure, peak_memory
from .workload import make_model


DATA = Path(__file__).resolve().parents[1] / "data" / "tiny"
REFERENCES = ("general_helpful", "general_truthful")
# Each with a rate at which the training loss falls steadily.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"optim": "sgd", "learning_rate": 0.1},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-4},
    "AdamW, decay 0.1": {"optim": "adamw_torch", "learning_rate": 1e-4, "weight_decay": 0.1},
    "RMSprop": {"optim": "rmsprop", "learning_rate": 1e-4},
    "Adafactor": {"optim": "adafactor", "learning_rate": 1e-4},
    "Muon": {"use_muon": True, "learning_rate": 1e-4},
}
# `parameter` refreshes as the tiny example does, `inputs` once, before the first step.
SCOPES: dict[str, dict[str, Any]] = {
    "parameter": {"ogpsa_scope": "parameter", "ogpsa_update_interval": 5},
    "inputs": {"ogpsa_scope": "inputs", "ogpsa_update_interval": 1000, "ogpsa_rank": 32},
}


def train(args: dict[str, Any], folder: Path, **changes: Any) -> Path:
    """Run LLaMA-Factory once in this process; return the output folder."""
    from llamafactory.train.tuner import run_exp

    output = Path(tempfile.mkdtemp(dir=folder))
    run_exp({**args, **changes, "output_dir": str(output)})
    return output


def make_base(folder: Path) -> dict[str, Any]:
    """Train the model that all runs start from; return the arguments of a stock run but for optimizer and length."""
    info = json.loads((DATA / "dataset_info.json").read_text())
    words: set[str] = set()
    for name in ("general_base", "safety_sft", *REFERENCES):
        for record in json.loads((DATA / info[name]["file_name"]).read_text()):
            words.update(re.findall(r"\w+|[^\w\s]+", record["instruction"] + " " + record["output"]))
    torch.manual_seed(0)
    make_model(folder / "model", sorted(words), hidden=128, layers=3)
    args = {
        "model_name_or_path": str(folder / "model"),
        "template": "chatml",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(DATA),
        "cutoff_len": 64,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
        "seed": 42,
    }
    base = train(args, folder, dataset="general_base", learning_rate=1.5e-3, max_steps=200, logging_steps=50)
    return {**args, "model_name_or_path": str(base), "dataset": "safety_sft"}


def read_figures(output: Path) -> dict[str, float]:
    """Return the mean share, and the mean cosine with each reference set, of a run's updates but the first."""
    rows = read_log(output / LOG_NAME)
    rows = [row for row in rows if not row.get("refresh")][1:]
    figures = {"share": statistics.fmean(row["update_share"] for row in rows)}
    if "update_cosine" in rows[0]:
        for name in REFERENCES:
            figures[name] = statistics.fmean(row["update_cosine"][name] for row in rows)
    return figures


def compare(steps: int) -> None:
    """Train with each optimizer and scope, and print the table."""
    columns = ["`update_share`", *(f"`update_cosine`, {name}" for name in REFERENCES)]
    print("| optimizer | scope | " + " | ".join(f"{name}: stock → OGPSA" for name in columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory(prefix="ogpsa-optimizers-") as name:
        folder = Path(name)
        args = make_base(folder)
        args |= {"stage": "ogpsa_sft", "ogpsa_dataset": ",".join(REFERENCES), "ogpsa_num_samples": 100}
        args |= {"ogpsa_batch_size": 50, "max_steps": steps}
        for optimizer, options in OPTIMIZERS.items():
            for scope, settings in SCOPES.items():
                stock, ours = (
                    read_figures(train(args, folder, **options, **settings, ogpsa_method=method))
                    for method in ("monitor", "orthogonal")
                )
                keys = ("share", *REFERENCES)
                cells = [f"{stock[key]:.3f} → {ours[key]:.3f}" if key in stock else "–" for key in keys]
                print(f"| {optimizer} | {scope} | " + " | ".join(cells) + " |", flush=True)


def print_cost() -> None:
    """Print the time and memory that measuring an update takes, by a copy of the weights and from Adam's state."""
    from llamafactory_ogpsa import Subspace
    from llamafactory_ogpsa.engines import ReplicatedEngine
    from llamafactory_ogpsa.run import update

    torch.manual_seed(0)
    device = torch.device("cpu")
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    engine = ReplicatedEngine(model)
    random = lambda: {name: torch.randn_like(param) for name, param in model.named_parameters()}
    subspace = Subspace.from_gradients([random(), random()])
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    limit = update.MOST_COPIED

    def measured(most_copied: int) -> None:
        update.MOST_COPIED = most_copied
        reader = update.make_change_reader(engine, optimizer)
        optimizer.step()
        update.update_figures(subspace, reader(), list(REFERENCES))

    steps = {
        "optimizer step": optimizer.step,
        "the same, measured by a copy": lambda: measured(limit),
        "the same, measured from Adam's state": lambda: measured(0),
    }
    for step in steps.values():
        step()
    # On the CPU this counts the process's resident memory, so what an earlier step left is not counted again.
    peaks = {name: peak_memory(step, device) for name, step in steps.items()}
    print(f"{engine.num_parameters:,} trainable float32 elements, two directions a tensor")
    print("| | ms | peak MiB beside what is there |\n|---|---|---|")
    for name, time in measure(steps, device, 5).items():
        print(f"| {name} | {1e3 * time.seconds:.0f} | {peaks[name] / 2**20:.0f} |")


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", action="store_true", help="what measuring an update costs, instead of the table")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a run")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in environment(torch.device("cpu")).items() if value is not None))
    print_cost() if options.cost else compare(options.steps)


if __name__ == "__main__":
    main()
