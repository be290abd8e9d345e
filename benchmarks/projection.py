"""Time the projection of one optimizer step on gradients shaped like those of real runs.

Compares, in one process and on the same gradients, this project's kernels (Triton and torch) with what one would
write instead: torch's multi-tensor calls, torch.compile, and the published implementation of OGPSA. For each it
prints the time, the bytes that must be moved at least, the share of the measured copy bandwidth, and how many times
as long as ours it takes; the same goes to a JSON file and a plot.

    python benchmarks/projection.py                        # a GPU with 80 GB
    python benchmarks/projection.py --scale 0.002          # a laptop: every tensor shrunk to 0.2 %
"""

import argparse
import gc
import importlib
import importlib.util
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from llamafactory_ogpsa.kernels import make_plan


MAX_NORM = 1.0
# The published rule holds two references at most.
PUBLISHED_RANK = 2


def decoder_shapes(layers, hidden, intermediate, key_value, vocabulary, qkv_bias):
    """List the parameter shapes of a Llama-like model with untied embeddings."""
    attention = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    bias = [(hidden,), (key_value,), (key_value,)] if qkv_bias else []
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    layer = attention + bias + mlp + [(hidden,), (hidden,)]
    return [(vocabulary, hidden)] + layer * layers + [(hidden,), (vocabulary, hidden)]


def lora_shapes(shapes, lora_rank):
    """List the shapes of LoRA factors on all linear layers: every matrix but the first and the last."""
    linear = [shape for shape in shapes[1:-1] if len(shape) == 2]
    return [factor for out, into in linear for factor in ((lora_rank, into), (out, lora_rank))]


QWEN = decoder_shapes(28, 3584, 18944, 512, 152064, qkv_bias=True)
LLAMA = decoder_shapes(32, 4096, 14336, 1024, 128256, qkv_bias=False)
MODELS = {
    "Qwen2.5-7B full": QWEN,
    "Llama-3.1-8B full": LLAMA,
    "Qwen2.5-7B LoRA r=8": lora_shapes(QWEN, 8),
    "Llama-3.1-8B LoRA r=8": lora_shapes(LLAMA, 8),
    "Qwen2.5-7B LoRA r=64": lora_shapes(QWEN, 64),
    "Llama-3.1-8B LoRA r=64": lora_shapes(LLAMA, 64),
}


def ours(gradients, basis, kernel):
    """Build the step with this project's kernels."""
    rank = basis[0].shape[0]
    plan = make_plan(basis, list(range(len(basis))), len(basis), kernel=kernel)
    plan.warmup([g.dtype for g in gradients])
    inverse_gram = torch.eye(rank, device=basis[0].device).repeat(len(basis), 1, 1)
    return lambda: plan.orthogonal_(gradients, inverse_gram, MAX_NORM)


def foreach(gradients, basis, *_):
    """Build the step with torch's multi-tensor calls, and matrix-vector products where there is none.

    Like ours it takes the clipping norm from the coefficients, which saves a pass over the projected gradient.
    """

    def step():
        norms = torch._foreach_norm(gradients)
        coefficients = [torch.mv(b, g) for b, g in zip(basis, gradients)]
        removed = torch.stack(torch._foreach_norm(coefficients)).float()
        norm = (torch.stack(norms).float().square().sum() - removed.square().sum()).clamp(min=0).sqrt()
        for g, b, c in zip(gradients, basis, coefficients):
            g.addmv_(b.t(), c, alpha=-1)
        torch._foreach_mul_(gradients, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))

    return step


def compiled(gradients, basis, *_):
    """Build the step from two functions of a tensor under torch.compile, which fuses each to one read."""

    @torch.compile(dynamic=True)
    def measured(g, b):
        return (b.float() * g.float()).sum(1), g.float().square().sum()

    @torch.compile(dynamic=True)
    def write(g, b, c, scale):
        g.copy_(scale * (g.float() - (c[:, None] * b.float()).sum(0)))

    def step():
        sums = [measured(g, b) for g, b in zip(gradients, basis)]
        removed = torch.stack([c for c, _ in sums]).square().sum()
        norm = (torch.stack([sq for _, sq in sums]).sum() - removed).clamp(min=0).sqrt()
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        for g, b, (c, _) in zip(gradients, basis, sums):
            write(g, b, c, scale)

    return step


def published(gradients, basis, micro_batches):
    """Build the published rule: references on the host, copied and orthogonalised for every micro-batch and tensor."""
    references = [b.cpu().unbind() for b in basis]
    clip = clip_alone(gradients)

    def step():
        for _ in range(micro_batches):
            for g, host in zip(gradients, references):
                directions = []
                for r in host:
                    u = r.to(g.device, copy=True)
                    for v in directions:
                        u = u - torch.dot(u, v) * v
                    directions.append(u / (u.norm() + 1e-8))
                for u in directions:
                    g.sub_(torch.dot(g, u) * u)
        clip()

    return step


def clip_alone(gradients, *_):
    """Build what a run without projection does: clip_grad_norm_."""
    parameters = [torch.nn.Parameter(gradient, requires_grad=False) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)


IMPLEMENTATIONS = {
    "ours (triton)": lambda g, b, _: ours(g, b, "triton"),
    "ours (torch)": lambda g, b, _: ours(g, b, "torch"),
    "foreach": foreach,
    "torch.compile": compiled,
    "published rule": published,
    "clipping alone": clip_alone,
}


def obstacle(name, rank, device):
    """Return why an implementation is not timed here, or None."""
    if name == "ours (triton)" and (device.type != "cuda" or importlib.util.find_spec("triton") is None):
        return "needs a GPU"
    if name == "published rule" and rank > PUBLISHED_RANK:
        return f"holds {PUBLISHED_RANK} references at most"
    return None


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(step, device, flush):
    """Return the seconds of one step and of its launching."""
    flush.zero_()
    synchronize(device)
    start = time.perf_counter()
    if device.type != "cuda":
        step()
        return time.perf_counter() - start, None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    start = time.perf_counter()
    step()
    launching = time.perf_counter() - start
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3, launching


def measure(steps, device, repeats):
    """Time steps in turn, so that whatever else the machine does falls on all of them.

    Args:
        steps: functions by name.
        device: where they run.
        repeats: how often each is timed, after two calls that are not; the published rule three times at most.

    Returns:
        Seconds of a step and of its launching, by name: the median on a GPU; on a CPU, which is rarely alone with the
        benchmark, the least, and None for launching.
    """
    # Larger than any cache, so that a step starts with none of its data there.
    flush = torch.empty((256 << 20) if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times = {name: [] for name in steps}
    for i in range(-2, repeats):
        for name, step in steps.items():
            # The published rule takes so long that a few times tell enough, with no calls ahead of them.
            if name == "published rule" and not 0 <= i < 3:
                continue
            pair = once(step, device, flush)
            if i >= 0:
                times[name].append(pair)
    typical = statistics.median if device.type == "cuda" else min
    result = {}
    for name, pairs in times.items():
        seconds, launching = zip(*pairs)
        result[name] = typical(seconds), None if launching[0] is None else typical(launching)
    return result


def copy_bandwidth(device, repeats):
    """Return the bytes a second of a large copy on the device, counting both those read and those written."""
    source = torch.randint(
        0, 255, ((2 << 30) if device.type == "cuda" else (256 << 20),), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    seconds, _ = measure({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 2 * source.numel() / seconds


def peak_memory(step, device):
    """Return the bytes that a step takes beyond what lies there before it, or None where that is not counted."""
    if device.type != "cuda":
        return None
    step()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def run(model, rank, options, bandwidth):
    """Time all implementations on one model at one rank and return their rows."""
    numels = [max(8, round(options.scale * torch.Size(shape).numel() / 8) * 8) for shape in MODELS[model]]
    device, dtype = options.device, torch.bfloat16
    # Two reads of gradient and basis, one write of the gradient; clipping alone reads the gradient twice.
    size = sum(numels) * dtype.itemsize
    least = (2 * (1 + rank) + 1) * size
    row = dict(model=model, rank=rank, elements=sum(numels), tensors=len(numels))
    # What torch keeps cached of the models before does not count as free.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "cuda" and (1 + rank) * size > 0.9 * torch.cuda.mem_get_info(device)[0]:
        return [dict(row, implementation=name, skipped="does not fit the memory") for name in options.implementations]

    gradients = [torch.randn(n, dtype=dtype, device=device) for n in numels]
    basis = [torch.randn(rank, n, dtype=dtype, device=device).div_(n**0.5) for n in numels]
    rows = [dict(row, implementation=name, skipped=obstacle(name, rank, device)) for name in options.implementations]
    steps, peaks = {}, {}
    for result in rows:
        name = result["implementation"]
        if result["skipped"] is None:
            try:
                steps[name] = IMPLEMENTATIONS[name](gradients, basis, options.micro_batches)
                peaks[name] = peak_memory(steps[name], device)
            except torch.OutOfMemoryError:
                steps.pop(name, None)
                result["skipped"] = "does not fit the memory"
    times = measure(steps, device, options.repeats)
    for result in rows:
        name = result["implementation"]
        if name in times:
            seconds, launching = times[name]
            count = 3 * size if name == "clipping alone" else least
            result.update(seconds=seconds, launching=launching, peak_memory=peaks[name])
            result.update(bytes=count, bandwidth=count / seconds, share=count / seconds / bandwidth)
    best = next((r["seconds"] for r in rows if r["implementation"].startswith("ours") and "seconds" in r), None)
    for result in rows:
        if best is not None and "seconds" in result:
            result["ratio"] = result["seconds"] / best
    return rows


def print_row(row):
    start = f"{row['model']:<24}{row['rank']:>5}  {row['implementation']:<16}"
    if row["skipped"]:
        print(f"{start}{row['skipped']:>12}", flush=True)
        return
    launching = "" if row["launching"] is None else f"{row['launching'] * 1e6:>12.0f}"
    peak = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:>12.1f}"
    print(
        f"{start}{row['seconds'] * 1e3:>12.3f}{row['bytes'] / 2**20:>12.1f}{row['share']:>8.2f}"
        f"{row.get('ratio', float('nan')):>9.2f}{launching}{peak}",
        flush=True,
    )


def plot(rows, bandwidth, title, path):
    """Draw the times of each model in its own panel, on a logarithmic scale, with the least time the bytes allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows if not row["skipped"]))
    ranks = sorted({row["rank"] for row in rows})
    columns = min(2, len(models))
    lines = -(-len(models) // columns)
    # One panel alone is wider, or title and legend would not fit.
    across = 11 if columns > 1 else 10
    figure, axes = plt.subplots(lines, columns, figsize=(across, 3.0 * lines + 0.9), squeeze=False)
    width = 0.85 / max(len(names), 1)
    for axis, model in zip(axes.flat, models):
        for i, name in enumerate(names):
            times = {
                r["rank"]: r["seconds"] * 1e3
                for r in rows
                if (r["model"], r["implementation"]) == (model, name) and not r["skipped"]
            }
            places = [ranks.index(rank) + (i - (len(names) - 1) / 2) * width for rank in times]
            axis.bar(places, times.values(), width, label=name, color=f"C{list(IMPLEMENTATIONS).index(name)}")
        for k, rank in enumerate(ranks):
            elements = next(r["elements"] for r in rows if r["model"] == model and r["rank"] == rank)
            least = (2 * (1 + rank) + 1) * elements * 2 / bandwidth * 1e3
            label = "least of a projection, by bytes and bandwidth" if k == 0 else None
            axis.hlines(least, k - 0.45, k + 0.45, colors="black", linestyles="dashed", label=label)
        axis.set(title=model, yscale="log", ylabel="ms per step", xticks=range(len(ranks)))
        axis.set_xticklabels([f"rank {rank}" for rank in ranks])
        axis.grid(axis="y", alpha=0.3)
    for axis in list(axes.flat)[len(models) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight() * 0.75, 1, 1))
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument(
        "--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS), metavar="NAME"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="shrink every tensor to this share of its elements")
    parser.add_argument("--micro-batches", type=int, default=4, help="per optimizer step, for the published rule")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/projection"))
    options = parser.parse_args()
    for name in ("scale", "micro_batches", "repeats"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be more than 0")

    torch.manual_seed(0)
    on_gpu = options.device.type == "cuda"
    environment = dict(
        command=shlex.join(["python", *sys.argv]),
        device=torch.cuda.get_device_name(options.device) if on_gpu else platform.processor() or platform.machine(),
        threads=None if on_gpu else torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
    )
    bandwidth = copy_bandwidth(options.device, options.repeats)
    print(", ".join(f"{key} {value}" for key, value in environment.items() if value is not None))
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    more = f"{'launch us':>12}{'peak MiB':>12}" if on_gpu else ""
    print(f"{'model':<24}{'rank':>5}  {'implementation':<16}{'ms':>12}{'MiB':>12}{'share':>8}{'ratio':>9}{more}")

    rows = []
    for model in options.models:
        for rank in options.ranks:
            rows += run(model, rank, options, bandwidth)
            for row in rows[-len(options.implementations) :]:
                print_row(row)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = dict(environment=environment, scale=options.scale, copy_bandwidth=bandwidth, rows=rows)
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    title = (
        f"Projection and clipping of one step's bfloat16 gradient, {environment['device']}, scale {options.scale:g}"
    )
    plot(rows, bandwidth, title, options.output.with_suffix(".png"))
    print(f"written: {options.output.with_suffix('.json')} and {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
