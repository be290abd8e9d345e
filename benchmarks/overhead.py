"""What OGPSA costs beside the projection itself: `import torch`, a step without refresh, a reference sample.

    python -m benchmarks.overhead

Runs on a Qwen2 of a million parameters, on the CPU or GPU that LLaMA-Factory finds. Stock and OGPSA runs alternate in
one process and are compared by the median of their step times; the reference set is the training set itself, so that
a reference sample and a training sample have the same length.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from llamafactory_ogpsa.run.log import LOG_NAME, read_log

from .workload import DATASET, StepTimer, make_workload


SAMPLES = 200
BATCH = 16

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

    args, _ = make_workload(Path(tempfile.mkdtemp(prefix="ogpsa-overhead-")), hidden=128, layers=3)
    args |= {"max_steps": options.steps, "per_device_train_batch_size": BATCH, "disable_gradient_checkpointing": True}
    ogpsa = {"stage": "ogpsa_sft", "ogpsa_dataset": DATASET, "ogpsa_num_samples": SAMPLES}

    stock_steps, ogpsa_steps, per_reference_sample = [], [], []
    for _ in range(options.repeats):
        stock_steps += run(args)[0][5:]
        # One refresh, before the first step: the steps that are compared have none.
        ogpsa_steps += run(args, **ogpsa, ogpsa_update_interval=10 * options.steps)[0][5:]
        _, output = run(args, **ogpsa, ogpsa_update_interval=1, max_steps=5)
        rows = read_log(output / LOG_NAME)
        per_reference_sample += [row["seconds"] / SAMPLES for row in rows if row.get("refresh")][1:]

    stock_step = statistics.median(stock_steps)
    result = {
        "import_torch_added_ms": round(1e3 * measure_import(10), 3),
        "stock_step_ms": round(1e3 * stock_step, 3),
        "ogpsa_step_over_stock": round(statistics.median(ogpsa_steps) / stock_step, 4),
        "reference_sample_over_training_sample": round(
            statistics.median(per_reference_sample) / (stock_step / BATCH), 4
        ),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cuda {torch.cuda.is_available()}",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
