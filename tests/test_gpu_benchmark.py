"""`python -m benchmarks.gpu`: every part on a pretended device, the rows, and the tables written from them."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import distributed
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, rows, tables, targets, trace, write


PRETENDED = parts.Run(torch.device("cpu"), parts.PRETENDED)
HERE = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.159.04",
    "runtime": "CUDA 13.0",
    "threads": None,
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "peft": "0.19.0",
    "llamafactory": None,
    "deepspeed": None,
    "pretended": False,
}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled, for the GPU")
# One case of each way through a part, without torch.compile, whose first call takes half a minute.
CASES = [
    ("tests", {"tests": "tests/kernels/test_choice.py"}),
    pytest.param("accuracy", parts.PARTS["accuracy"].cases[0], marks=interpreted),
    ("projection", {**parts.PARTS["projection"].cases[-1], "scale": 0.1}),
    pytest.param("launches", parts.PARTS["launches"].cases[1], marks=interpreted),
    pytest.param("scopes", parts.PARTS["scopes"].cases[0], marks=interpreted),
    ("memory", parts.PARTS["memory"].cases[2]),
    ("memory", parts.PARTS["memory"].cases[-1]),
    ("training", parts.PARTS["training"].cases[0]),
    ("training", parts.PARTS["training"].cases[3]),
    ("training", parts.PARTS["training"].cases[-2]),
    ("training", parts.PARTS["training"].cases[-4]),
    ("streaming", parts.PARTS["streaming"].cases[1]),
]


def a_row(part, case, **result):
    return {"part": part, "case": case, **result, "seconds": 1.0, "date": "2026-11-26", "environment": HERE}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_every_part_measures_on_a_pretended_device(name, case):
    result = parts.attempt(name, case, PRETENDED)
    assert list(result) == ["figures"], result
    figures = json.loads(json.dumps(result))["figures"]
    cells = tables.TABLES[name].cells(figures)
    assert len(cells) == len(tables.TABLES[name].heads)
    assert all(cells)
    assert "; " in command.summary(name, result)


def test_processes_are_compared(monkeypatch):
    def launch(folder, engine, names, processes, steps, repeats):
        assert (Path(folder) / "model" / "config.json").is_file()
        launched.append((engine, names, processes))
        return {"seconds": {"stock": 0.2, "ogpsa": 0.3}, "peak": 2**20 * (100 if names == "stock" else 107)}

    launched = []
    monkeypatch.setattr(distributed, "launch", launch)
    monkeypatch.setitem(parts.PARTS, "distributed", parts.PARTS["distributed"]._replace(needs=()))
    figures = parts.attempt("distributed", {"engine": "fsdp2"}, PRETENDED)["figures"]
    assert launched == [("fsdp2", names, 1) for names in ("stock,ogpsa", "stock", "ogpsa")]
    assert figures["ogpsa_step_over_stock"] == 1.5
    assert figures["ogpsa_peak_over_stock_MiB"] == 7
    assert figures["basis_by_formula_MiB"] == pytest.approx(4 * figures["parameters"] / 2**20, abs=0.1)


def test_what_cannot_run_here_says_why(monkeypatch):
    def refuse(case, run):
        raise case["reason"]

    monkeypatch.setitem(parts.PARTS, "memory", parts.Part((), [], refuse))
    attempt = lambda reason: parts.attempt("memory", {"reason": reason}, PRETENDED)
    assert attempt(torch.OutOfMemoryError("no")) == {"skipped": "does not fit the memory"}
    assert attempt(parts.Skip("because")) == {"skipped": "because"}
    assert attempt(ValueError("a typo")) == {"error": "ValueError: a typo"}
    monkeypatch.setitem(parts.PARTS, "memory", parts.Part(("torch", "no_such_package"), [], refuse))
    assert attempt(None) == {"skipped": "no_such_package is not installed"}


def test_a_test_that_fails_is_no_figure(tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    assert False\n")
    result = parts.attempt("tests", {"tests": str(tmp_path / "test_it.py")}, PRETENDED)
    assert "1 of 1 tests failed: test_it" in result["error"]


def test_a_run_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    def attempt(name, case, run):
        tried.append(case["engine"])
        return {"error": "broken"} if case["engine"] == broken else {"figures": {**figures, "engine": case["engine"]}}

    figures = {"processes": 1, "stock_step_ms": 2.0, "ogpsa_step_over_stock": 1.1, "stock_peak_MiB": 3.0}
    figures |= {"ogpsa_peak_over_stock_MiB": 4.0, "basis_by_formula_MiB": 5.0}
    tried, broken = [], "zero2"
    monkeypatch.setattr(command, "attempt", attempt)
    assert command.run_part("distributed", tmp_path, pretend=True) == 1
    assert tried == ["fsdp2", "zero2", "zero3"]
    with (tmp_path / rows.NAME).open("a") as file:
        file.write('{"part": "distri')  # killed while it wrote
    tried, broken = [], None
    assert command.run_part("distributed", tmp_path, pretend=True) == 0
    assert tried == ["zero2"]
    found = rows.read(tmp_path / rows.NAME)
    assert sorted(row["figures"]["engine"] for row in found) == ["fsdp2", "zero2", "zero3"]
    assert "done before" in capsys.readouterr().out


def test_rows_of_two_devices_are_not_mixed(tmp_path, capsys):
    rows.append(tmp_path, a_row("memory", {}, figures={}))
    assert command.run_part("memory", tmp_path, pretend=True) == command.OTHER_DEVICE
    assert "another device" in capsys.readouterr().err


def test_a_part_ends_after_its_time(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(command, "SECONDS", 0.2)
    assert command.start_part("memory", tmp_path, pretend=True) == 1
    assert "nine minutes are over" in capfd.readouterr().out
    assert not (tmp_path / rows.NAME).exists()


def run_command(*words):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words], cwd=parts.ROOT, capture_output=True, text=True, check=False
    )


def test_from_end_to_end(tmp_path):
    before = {page: (write.DOCS / page).read_text() for page in write.PAGES}
    process = run_command("memory", "--pretend", "--output", str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert "memory: 15 of 15 cases measured" in process.stdout
    assert "training: 0 of 24 cases measured" in process.stdout
    assert "pretended, on a CPU" in (tmp_path / "performance.md").read_text()
    assert before == {page: (write.DOCS / page).read_text() for page in write.PAGES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    for words, message in ([], "no CUDA or ROCm device"), (["memry"], "there is no part memry"):
        monkeypatch.setattr(sys, "argv", ["gpu", *words])
        with pytest.raises(SystemExit):
            command.main()
        assert message in capsys.readouterr().err


def test_overlap_is_read_from_the_trace():
    def event(category, name, start, length):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}

    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", trace.STEP, 0, 7),
        event("user_annotation", trace.STEP, 100, 9),
        event("cuda_runtime", "cudaLaunchKernel", 0, 1),
        event("kernel", "partial_sums_kernel", 10, 10),
        event("kernel", "apply_kernel", 15, 15),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 5, 10),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 28, 12),
        event("gpu_memset", "Memset (Device)", 50, 12),
    ]
    activity = trace.summarise(events, 2, trace.GPU)
    # Kernels run from 10 to 30, copies from 5 to 15 and from 28 to 40.
    assert activity._asdict() == pytest.approx(
        {"launches": 1, "cpu": 8e-6, "kernels": 10e-6, "copies": 11e-6, "both": 3.5e-6}
    )


def test_a_profiler_that_sees_nothing_is_no_figure(monkeypatch):
    monkeypatch.setattr(trace, "CPU", trace.GPU)  # there are no such events on a CPU
    with pytest.raises(RuntimeError, match="saw no kernel"):
        trace.record(lambda: torch.ones(1) + 1, torch.device("cpu"), 1)


def timed(seconds, ours, **more):
    row = {"skipped": None, "seconds": seconds, "ratio": seconds / ours}
    return {**row, "share": 0.9, "peak_memory": 30, "elements": 1000, **more}


def test_figures_get_into_their_tables():
    fast, published = (parts.PARTS["projection"].cases[i] for i in (0, -2))
    assert fast["gradients"] == published["gradients"] == "Qwen2.5-7B full"
    measured = [
        a_row(
            "projection",
            fast,
            figures={
                "ours (triton)": timed(0.04, 0.04),
                "foreach": timed(0.1, 0.04),
                "torch.compile": {"skipped": "does not fit the memory"},
                "clipping alone": timed(0.03, 0.04),
            },
        ),
        a_row(
            "projection",
            published,
            figures={"ours (triton)": timed(0.05, 0.05), "published rule": timed(2.0, 0.05)},
        ),
        a_row("projection", parts.PARTS["projection"].cases[1], error="RuntimeError: a | b\nmore"),
    ]
    region = write.region("projection", measured)
    assert region.startswith(
        "`python -m benchmarks.gpu projection`: NVIDIA H100 80GB HBM3, driver 580.159.04, CUDA 13"
    )
    assert "torch 2.11.0, triton 3.6.0" in region
    assert "None" not in region
    assert "2026-11-26." in region
    first, second, third = region.splitlines()[4:7]
    assert first == "| Qwen2.5-7B full | 2 | 40 | 100 | – (does not fit the memory) | 2000 | 30 | 0.90 |"
    assert second.startswith("| Llama-3.1-8B full | 2 | failed: RuntimeError: a / b |")
    assert third.startswith("| Qwen2.5-7B LoRA r=8 | 2 | not measured |")

    held = dict(line.strip("| ").split(" | ", 1) for line in targets.table(measured).splitlines()[2:])
    assert held["full, rank 2: at least 0.85 of the copy bandwidth"] == "Qwen2.5-7B full: 0.90 | holds"
    assert held["the same: at least 1.5 times as fast as foreach"] == "Qwen2.5-7B full: 2.50 | holds"
    assert held["20 times the published rule"] == "Qwen2.5-7B full: 40 | holds"
    assert held["1.1 times torch.compile"] == "not measured"
    missed = "full, rank 2: peak memory beside gradients and basis at most 1 % of the gradients"
    assert held[missed] == "Qwen2.5-7B full: 1.50 % | missed"


def test_a_limit_is_kept_by_the_worst():
    cases = [case for case in parts.PARTS["accuracy"].cases if case["dtype"] == "bfloat16"]
    errors = {"c": 1e-7, "‖g‖²": 1e-7, "gradient": 1e-3, "beyond": 1e-7, "residual": 1e-3}
    measured = [a_row("accuracy", case, figures=copy.copy(errors)) for case in cases]
    for case, share in zip(parts.PARTS["projection"].cases[:2], (0.9, 0.8)):
        measured.append(a_row("projection", case, figures={"ours (triton)": timed(0.04, 0.04, share=share)}))
    found = targets.table(measured)
    assert "bandwidth | Qwen2.5-7B full: 0.90; Llama-3.1-8B full: 0.80 | missed |" in found
    line = lambda: next(line for line in targets.table(measured).splitlines() if "residual 2e-3" in line)
    assert line().endswith("residual: 1.0e-03 | holds |")
    measured[0]["figures"]["residual"] = 3e-3
    assert line().endswith("residual: 3.0e-03 | missed |")


def test_the_docs_are_what_was_measured():
    measured = rows.read(write.DOCS / write.KEPT / rows.NAME)
    assert not any(row["environment"]["pretended"] for row in measured)
    for page, regions in write.PAGES.items():
        text = (write.DOCS / page).read_text(encoding="utf-8")
        assert tuple(name for _, name, _ in write._REGION.findall(text)) == regions
        assert write.fill(text, measured) == text, "run `python -m benchmarks.gpu --write`"


def test_figures_are_kept_until_there_are_newer_ones(tmp_path):
    def passed():
        line = next(line for line in (tmp_path / "performance.md").read_text().splitlines() if case["tests"] in line)
        return line.split("|")[2].strip()

    case = parts.PARTS["tests"].cases[0]
    write.write([a_row("tests", case, figures={"passed": 3, "skipped": 0})], tmp_path)
    assert passed() == "3"
    write.write([a_row("tests", case, skipped="pytest is not installed")], tmp_path)
    assert passed() == "3"
    write.write([a_row("tests", case, figures={"passed": 4, "skipped": 0})], tmp_path)
    assert passed() == "4"


def test_writing_again_changes_nothing(tmp_path):
    case = parts.PARTS["memory"].cases[0]
    figures = {"basis": 2**30, "formula": 2**30, "making": 2**31, "step": 2**20, "gradients": 2**29}
    measured = [a_row("memory", case, figures=figures)]
    write.write(measured, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| Qwen2.5-0.5B full | bfloat16 | parameter | 1.00 GiB | 1.00 GiB | 2.00 GiB | 1.0 MiB | 0.20 % |" in page
    assert rows.read(tmp_path / write.KEPT / rows.NAME) == measured
    assert write.fill(page, measured) == page
