"""The benchmark: what it compares must compute the same, and it must run from end to end."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import Case


PATH = Path(__file__).parents[2] / "benchmarks" / "projection.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_projection", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ours (torch)", "foreach", "published rule"])
def test_all_ways_give_the_same_gradient(benchmark, name):
    case = Case([600, 33, 512], [0, 1, 2], 2)
    benchmark.IMPLEMENTATIONS[name](case.gradients, case.basis, 4)()
    for g, e in zip(case.gradients, case.projected(benchmark.MAX_NORM), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-6)


def test_shapes_are_those_of_the_models(benchmark):
    elements = {name: sum(torch.Size(s).numel() for s in shapes) for name, shapes in benchmark.MODELS.items()}
    assert elements["Qwen2.5-7B full"] == 7_615_616_512
    assert elements["Llama-3.1-8B full"] == 8_030_261_248
    assert elements["Qwen2.5-7B LoRA r=8"] == 20_185_088
    assert elements["Llama-3.1-8B LoRA r=64"] == 167_772_160
    assert len(benchmark.MODELS["Qwen2.5-7B full"]) == 339


def test_runs_from_end_to_end(benchmark, monkeypatch, tmp_path, capsys):
    command = ["projection.py", "--device", "cpu", "--scale", "1e-6", "--ranks", "2", "--repeats", "2"]
    command += ["--models", "Qwen2.5-7B LoRA r=8", "--output", str(tmp_path / "out")]
    command += ["--implementations", "ours (triton)", "ours (torch)", "clipping alone"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device, repeats: 1e9)
    benchmark.main()
    triton, ours, clip = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert triton["skipped"] == "needs a GPU"
    assert ours["ratio"] == 1.0
    assert ours["bytes"] == 7 * 2 * ours["elements"]
    assert ours["share"] == pytest.approx(ours["bytes"] / ours["seconds"] / 1e9)
    assert clip["ratio"] == pytest.approx(clip["seconds"] / ours["seconds"])
    assert (tmp_path / "out.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "clipping alone" in out
    assert "'Qwen2.5-7B LoRA r=8'" in out  # the command can be copied
    assert str(tmp_path / "out.png") in out


@pytest.mark.parametrize("models", [1, 2, 3])
def test_nothing_of_the_picture_is_cut_off(benchmark, models, monkeypatch, tmp_path):
    def save(figure, path, **_):
        figure.canvas.draw()
        drawn = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        boxes.append(drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height)

    boxes = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    rows = [
        dict(model=model, rank=2, implementation=name, skipped=None, seconds=1e-3, elements=1000)
        for model in list(benchmark.MODELS)[:models]
        for name in benchmark.IMPLEMENTATIONS
    ]
    title = "Projection and clipping of one step's bfloat16 gradient, NVIDIA H100 80GB HBM3, scale 1"
    benchmark.plot(rows, 1e9, title, tmp_path / "out.png")
    assert boxes == [True]
