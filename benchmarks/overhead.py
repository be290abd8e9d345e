"""What OGPSA costs beside the projection itself: `import torch`, a step without refresh, a reference sample.

    python benchmarks/overhead.py

Runs on the tiny model of the demo, on the CPU or GPU that LLaMA-Factory finds. Stock and OGPSA runs alternate in one
process and are compared by the median of their step times; the reference sets are the training set itself, so that a
reference sample and a training sample have the same length.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback


ROOT = Path(__file__).resolve().parents[1]

_IMPORT = """
import importlib.metadata, time
import torch
entry_points = importlib.metadata.entry_points(group="torch.backends")
start = time.perf_counter()
for entry_point in entry_points:
    if entry_point.name == "llamafactory_ogpsa":
        entry_point.load()()
print(time.perf_counter() - start)
"""


class StepTimer(TrainerCallback):
    """Times optimizer steps. A refresh belongs to the step it precedes; the caller leaves that one out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.start)


def measure_import(repeats: int) -> float:
    """Return the median seconds that loading and calling the entry point adds to `import torch`."""
    times = []
    for _ in range(repeats):
        process = subprocess.run(
            [sys.executable, "-c", _IMPORT],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        times.append(float(process.stdout))
    return statistics.median(times)


def run(args: dict, **changes) -> tuple[list[float], Path]:
    """Train once; return the seconds of its steps and its output folder."""
    from llamafactory.train.tuner import run_exp

    output = Path(tempfile.mkdtemp(prefix="ogpsa-overhead-"))
    timer = StepTimer()
    run_exp({**args, **changes, "output_dir": str(output)}, callbacks=[timer])
    return timer.seconds, output


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    model = tempfile.mkdtemp(prefix="ogpsa-tiny-")
    subprocess.run([sys.executable, "-m", "lab.tiny.model", model], cwd=ROOT, check=True, capture_output=True)
    args = yaml.safe_load((ROOT / "examples" / "yaml" / "tiny_naive_sft.yaml").read_text())
    args |= {"model_name_or_path": model, "dataset_dir": str(ROOT / "data" / "tiny"), "max_steps": options.steps}
    args |= {"logging_steps": 10, "plot_loss": False, "save_strategy": "no"}
    ogpsa = {"stage": "ogpsa_sft", "ogpsa_dataset": args["dataset"], "ogpsa_num_samples": 200}

    stock_steps, ogpsa_steps, per_reference_sample = [], [], []
    for _ in range(options.repeats):
        stock_steps += run(args)[0][5:]
        # One refresh, before the first step: the steps that are compared have none.
        ogpsa_steps += run(args, **ogpsa, ogpsa_update_interval=10 * options.steps)[0][5:]
        _, output = run(args, **ogpsa, ogpsa_update_interval=1, max_steps=5)
        rows = [json.loads(line) for line in (output / "ogpsa_log.jsonl").read_text().splitlines()]
        per_reference_sample += [row["seconds"] / 200 for row in rows if row.get("refresh")][1:]

    stock_step = statistics.median(stock_steps)
    batch = args["per_device_train_batch_size"] * args.get("gradient_accumulation_steps", 1)
    result = {
        "import_torch_added_ms": round(1e3 * measure_import(10), 3),
        "stock_step_ms": round(1e3 * stock_step, 3),
        "ogpsa_step_over_stock": round(statistics.median(ogpsa_steps) / stock_step, 4),
        "reference_sample_over_training_sample": round(
            statistics.median(per_reference_sample) / (stock_step / batch), 4
        ),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cuda {torch.cuda.is_available()}",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
