"""What OGPSA costs under DDP, ZeRO and FSDP2: step time and peak memory over a stock run's, in float32.

    python -m benchmarks.distributed [--processes 2] [--engines ddp,zero2,...] [--hidden 512]

For each engine, stock and OGPSA runs of LLaMA-Factory alternate in the same processes and are compared by the median
of their steps without refresh. Memory is that of the first process, of one run in processes of its own: on GPUs
PyTorch's peak of allocated memory, elsewhere the peak resident memory, with a malloc that gives freed memory back at
once. Beside it stands the basis's size by the formula of docs/distributed.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .devices import counters, default_device
from .memory import basis_bytes
from .workload import DATASET, StepTimer, make_workload


ROOT = Path(__file__).resolve().parents[1]

# The ZeRO stage of each engine, and whether its optimizer is offloaded to the CPU; None where DeepSpeed has no part.
ENGINES = {
    "ddp": None,
    "fsdp2": None,
    "zero1": (1, False),
    "zero2": (2, False),
    "zero2_offload": (2, True),
    "zero3": (3, False),
    "zero3_offload": (3, True),
}

# What `accelerate launch` makes of a configuration file for FSDP2.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def deepspeed_config(stage: int, offload: bool) -> dict:
    """Return a DeepSpeed configuration of a ZeRO stage."""
    zero = {"stage": stage, "overlap_comm": torch.cuda.is_available(), "reduce_bucket_size": 5000000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def work(folder: Path, engine: str, names: str, steps: int, repeats: int) -> None:
    """Run stock, OGPSA or both alternately in this process, and leave the figures of process 0 in the folder."""
    # A checkout need not be installed.
    from llamafactory_ogpsa.autoload import register

    register()
    from llamafactory.train.tuner import run_exp

    args = json.loads((folder / "args.json").read_text()) | {"max_steps": steps}
    if ENGINES[engine] is not None:
        args["deepspeed"] = deepspeed_config(*ENGINES[engine])
    elif not torch.cuda.is_available():
        args |= {"use_cpu": True, "ddp_backend": "gloo"}
    ogpsa = {"stage": "ogpsa_sft", "ogpsa_dataset": DATASET, "ogpsa_num_samples": 16}
    ogpsa |= {"ogpsa_update_interval": 10 * steps}

    # LLaMA-Factory leaves the process group at a run's end; the next run here goes on in the same one.
    torch.distributed.destroy_process_group = lambda *args, **kwargs: None
    seconds = {name: [] for name in names.split(",")}
    for repeat in range(repeats):
        for name in seconds:
            timer = StepTimer()
            output_dir = str(folder / f"{engine}_{names}_{name}_{repeat}")
            run_exp({**args, **(ogpsa if name == "ogpsa" else {}), "output_dir": output_dir}, callbacks=[timer])
            seconds[name] += timer.seconds[3:]
    if int(os.environ["RANK"]) == 0:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        result = {"seconds": medians, "peak": counters(default_device()).max_memory_allocated()}
        (folder / f"{engine}_{names}.json").write_text(json.dumps(result))


def launch(folder: Path, engine: str, names: str, processes: int, steps: int, repeats: int) -> dict:
    """Run `work` in processes of their own and return its figures.

    Raises:
        RuntimeError: a process failed; with the end of what it printed.
    """
    environment = dict(os.environ)
    # accelerate offers FSDP on accelerators only; what the tests have for this lets it on a CPU.
    fsdp_on_cpu = [] if torch.cuda.is_available() else [str(ROOT / "tests" / "distributed" / "fsdp_on_cpu")]
    paths = [*fsdp_on_cpu, str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if engine == "fsdp2":
        environment |= FSDP2
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        if "," not in names:
            # A run for its memory: glibc gives freed tensors back at once, so that the peak is of what was in use.
            environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += ["-m", "benchmarks.distributed", "--steps", str(steps), "--repeats", str(repeats)]
    command += ["--worker", str(folder), engine, names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(process.stderr[-6000:])
    return json.loads((folder / f"{engine}_{names}.json").read_text())


def measure(engine: str, *, processes: int, hidden: int, steps: int, repeats: int) -> dict:
    """Compare OGPSA with a stock run under one engine of `ENGINES`; return the figures by name.

    Raises:
        RuntimeError: a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="ogpsa-distributed-") as name:
        folder = Path(name)
        args, parameters = make_workload(folder, hidden)
        (folder / "args.json").write_text(json.dumps(args))
        both = launch(folder, engine, "stock,ogpsa", processes, steps, repeats)
        # Memory in processes of their own: what one run leaves behind would count in the next.
        stock, ogpsa = (launch(folder, engine, name, processes, steps, 1) for name in ("stock", "ogpsa"))
    basis = basis_bytes(parameters, torch.float32.itemsize, shards=1 if engine == "ddp" else processes, directions=1)
    return {
        "engine": engine,
        "processes": processes,
        "parameters": parameters,
        "stock_step_ms": round(1e3 * both["seconds"]["stock"], 1),
        "ogpsa_step_over_stock": round(both["seconds"]["ogpsa"] / both["seconds"]["stock"], 3),
        "stock_peak_MiB": round(stock["peak"] / 2**20, 1),
        "ogpsa_peak_over_stock_MiB": round((ogpsa["peak"] - stock["peak"]) / 2**20, 1),
        "basis_by_formula_MiB": round(basis / 2**20, 1),
    }


def main() -> None:
    """Measure each engine and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "ENGINE", "NAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, engine, names = options.worker
        work(Path(folder), engine, names, options.steps, options.repeats)
        return
    for engine in options.engines.split(","):
        figures = measure(
            engine,
            processes=options.processes,
            hidden=options.hidden,
            steps=options.steps,
            repeats=options.repeats,
        )
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
