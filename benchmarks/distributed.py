"""What OGPSA costs under DDP, ZeRO and FSDP2: step time and peak memory over a stock run's, in float32.

    python benchmarks/distributed.py [--processes 2] [--engines ddp,zero2,...] [--hidden 512]

For each engine, stock and OGPSA runs of LLaMA-Factory alternate in the same processes and are compared by the median
of their steps without refresh. Memory is that of the first process, of one run in processes of its own: on GPUs
PyTorch's peak of allocated memory, elsewhere the peak resident memory, with a malloc that gives freed memory back at
once. Beside it stands the basis's size by the formula
of docs/distributed.md.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from overhead import StepTimer


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


def make_workload(folder: Path, hidden: int) -> dict:
    """Make a model of `hidden` width and a dataset of random words; return the arguments of a stock run."""
    sys.path.insert(0, str(ROOT))
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lab.tiny.model import build_tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(2000)]
    sentence = lambda: " ".join(rng.choices(words, k=24))
    records = [{"instruction": sentence(), "input": "", "output": sentence()} for _ in range(64)]
    (folder / "words.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"words": {"file_name": "words.json"}}))
    tokenizer = build_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {
        "model_name_or_path": str(folder / "model"),
        "template": "qwen",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "dataset": "words",
        "cutoff_len": 128,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-5,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def reset_peak() -> None:
    """Forget the peak memory so far."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak memory since `reset_peak`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def work(folder: Path, engine: str, names: str, steps: int, repeats: int) -> None:
    """Run stock, OGPSA or both alternately in this process, and leave the figures of process 0 in the folder."""
    from llamafactory.train.tuner import run_exp

    from llamafactory_ogpsa.callback import OgpsaCallback

    args = json.loads((folder / "args.json").read_text()) | {"max_steps": steps}
    if ENGINES[engine] is not None:
        args["deepspeed"] = deepspeed_config(*ENGINES[engine])
    elif not torch.cuda.is_available():
        args |= {"use_cpu": True, "ddp_backend": "gloo"}
    ogpsa = {"stage": "ogpsa_sft", "ogpsa_dataset": "words", "ogpsa_num_samples": 16}
    ogpsa |= {"ogpsa_update_interval": 10 * steps}

    basis = {}
    refresh = OgpsaCallback.refresh

    def measured_refresh(self, state):
        refresh(self, state)
        basis["bytes"] = sum(b.numel() * b.itemsize for b in self.subspace.basis)
        basis["formula"] = self.parts * len(self.sets) * self.engine.num_parameters * self.basis_dtype.itemsize
        basis["formula"] //= self.engine.world_size if self.engine.shards else 1

    OgpsaCallback.refresh = measured_refresh
    # LLaMA-Factory leaves the process group at a run's end; the next run here goes on in the same one.
    torch.distributed.destroy_process_group = lambda *args, **kwargs: None
    seconds = {name: [] for name in names.split(",")}
    reset_peak()
    for repeat in range(repeats):
        for name in seconds:
            timer = StepTimer()
            output_dir = str(folder / f"{engine}_{names}_{name}_{repeat}")
            run_exp({**args, **(ogpsa if name == "ogpsa" else {}), "output_dir": output_dir}, callbacks=[timer])
            seconds[name] += timer.seconds[3:]
    if int(os.environ["RANK"]) == 0:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        result = {"seconds": medians, "peak": peak_bytes(), "basis": basis}
        (folder / f"{engine}_{names}.json").write_text(json.dumps(result))


def launch(folder: Path, engine: str, names: str, processes: int, steps: int, repeats: int) -> dict:
    """Run `work` in processes of their own and return its figures."""
    environment = dict(os.environ)
    if engine == "fsdp2":
        environment |= FSDP2
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        if "," not in names:
            # A run for its memory: glibc gives freed tensors back at once, so that the peak is of what was in use.
            environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
        # accelerate offers FSDP on accelerators only; what the tests have for this lets it on a CPU.
        paths = [str(ROOT / "tests" / "distributed" / "fsdp_on_cpu"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += [__file__, "--steps", str(steps), "--repeats", str(repeats), "--worker", str(folder), engine, names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(process.stderr[-6000:])
    return json.loads((folder / f"{engine}_{names}.json").read_text())


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

    folder = Path(tempfile.mkdtemp(prefix="ogpsa-distributed-"))
    (folder / "args.json").write_text(json.dumps(make_workload(folder, options.hidden)))
    for engine in options.engines.split(","):
        both = launch(folder, engine, "stock,ogpsa", options.processes, options.steps, options.repeats)
        # Memory in processes of their own: what one run leaves behind would count in the next.
        stock, ogpsa = (
            launch(folder, engine, name, options.processes, options.steps, 1) for name in ("stock", "ogpsa")
        )
        result = {
            "engine": engine,
            "processes": options.processes,
            "stock_step_ms": round(1e3 * both["seconds"]["stock"], 1),
            "ogpsa_step_over_stock": round(both["seconds"]["ogpsa"] / both["seconds"]["stock"], 3),
            "stock_peak_MiB": round(stock["peak"] / 2**20, 1),
            "ogpsa_peak_over_stock_MiB": round((ogpsa["peak"] - stock["peak"]) / 2**20, 1),
            "basis_MiB": round(ogpsa["basis"]["bytes"] / 2**20, 1),
            "basis_by_formula_MiB": round(ogpsa["basis"]["formula"] / 2**20, 1),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
