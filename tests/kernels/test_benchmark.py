"""The benchmarks: what they compare must compute the same, and they must run from end to end."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import KERNELS_INTERPRETED, Case, each_implementation

from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.run.refresh_inputs import InputBasis


sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import accuracy, implementations, memory, models, projection, scopes


@pytest.mark.parametrize("name", ["ours (torch)", "foreach", "published rule"])
def test_all_ways_give_the_same_gradient(name):
    case = Case([600, 33, 512], [0, 1, 2], 2)
    implementations.IMPLEMENTATIONS[name](case.gradients, case.basis, 4)()
    for g, e in zip(case.gradients, case.projected(implementations.MAX_NORM), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["inputs (torch)", "two products"])
def test_all_ways_of_scope_inputs_give_the_same_gradient(name):
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in ((20, 12), (7, 30), (9,))]
    bases = scopes.random_bases([tuple(g.shape) for g in gradients], 5, torch.device("cpu"))
    exact = [g.double() - g.double() @ v.double().T @ v.double() for g, v in zip(gradients, bases) if v is not None]
    norm = sum(g.square().sum() for g in exact).sqrt()
    rows = [torch.randn(scopes.RANK, gradient.numel()) for gradient in gradients]
    scopes.build(name, gradients, bases, rows)()
    for g, e in zip(gradients, [g * implementations.MAX_NORM / norm for g in exact] + [torch.zeros(9)], strict=True):
        torch.testing.assert_close(g.double(), e.double(), rtol=1e-4, atol=1e-6)


def test_the_memory_of_scope_inputs_is_that_of_the_start_line():
    model = models.build("tiny", "cpu", torch.float32)
    settings = SimpleNamespace(rank=None, kernel="torch", method="orthogonal", scope="inputs")
    maker = InputBasis(settings, ReplicatedEngine(model), model)
    assert memory.inputs_bytes(models.trainable_shapes("tiny full")) == maker.num_bytes


def test_sizes_are_those_of_the_models():
    elements = {name: sum(models.trainable_numels(name)) for name in projection.MODELS}
    assert elements["Qwen2.5-7B full"] == 7_615_616_512
    assert elements["Llama-3.1-8B full"] == 8_030_261_248
    assert elements["Qwen2.5-7B LoRA r=8"] == 20_185_088
    assert elements["Llama-3.1-8B LoRA r=64"] == 167_772_160
    assert len(models.trainable_numels("Qwen2.5-7B full")) == 339
    assert models.count_parameters("Qwen2.5-0.5B") == (494_032_768, 494_032_768)
    assert models.count_parameters("Qwen2.5-7B", lora_rank=8) == (7_615_616_512, 20_185_088)


def test_runs_from_end_to_end(monkeypatch, tmp_path, capsys):
    command = ["projection.py", "--device", "cpu", "--ranks", "2", "--repeats", "2"]
    command += ["--models", "tiny LoRA r=8", "--output", str(tmp_path / "out")]
    command += ["--implementations", "ours (triton)", "ours (torch)", "clipping alone"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(projection, "MODELS", ("tiny LoRA r=8",))
    monkeypatch.setattr(projection, "copy_bandwidth", lambda device, repeats: 1e9)
    projection.main()
    triton, ours, clip = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert triton["seconds"] > 0 if KERNELS_INTERPRETED else "kernel triton cannot run here" in triton["skipped"]
    first = triton if KERNELS_INTERPRETED else ours
    assert ours["ratio"] == pytest.approx(ours["seconds"] / first["seconds"])
    assert ours["bytes"] == 7 * 2 * ours["elements"]
    assert ours["share"] == pytest.approx(ours["bytes"] / ours["seconds"] / 1e9)
    assert clip["ratio"] == pytest.approx(clip["seconds"] / first["seconds"])
    assert (tmp_path / "out.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "clipping alone" in out
    assert "'tiny LoRA r=8'" in out  # the command can be copied
    assert str(tmp_path / "out.png") in out


@each_implementation
def test_accuracy_is_as_promised(implementation, monkeypatch, capsys):
    kernel, device = implementation
    command = ["accuracy.py", "--numel", "20000", "--kernel", kernel, "--device", device]
    monkeypatch.setattr(sys, "argv", command)
    accuracy.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["beyond", "residual"]
    assert [row.split()[0] for row in rows] == 2 * ["float32"] + 4 * ["bfloat16"]
    for row in rows:
        *_, gradient, beyond, residual = map(float, row.split()[2:])
        in_float32 = row.startswith("float32")
        assert gradient <= (1e-6 if in_float32 else 2**-8)
        # The interpreter rounds float32 to bfloat16 towards zero.
        assert beyond <= (2**-8 if kernel == "triton" and KERNELS_INTERPRETED and not in_float32 else 1e-6)
        assert residual <= (1e-6 if in_float32 else 2e-3)


def test_accuracy_tells_one_rounding_from_two():
    exact = torch.tensor([1 + 2**-8 + 2**-12], dtype=torch.float64)
    once, twice = exact.bfloat16().double(), (exact - 2**-11).bfloat16().double()
    half = accuracy.spacing(exact, torch.bfloat16) / 2
    assert (once - exact).abs() <= half < (twice - exact).abs()
