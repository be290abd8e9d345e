"""`llamafactory-ogpsa doctor`: each thing that can be wrong is told, with a fix."""

import ast
import os
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from llamafactory_ogpsa import autoload, doctor


ROOT = Path(__file__).resolve().parents[1]


def run_doctor(*python, cwd=None, **env):
    return subprocess.run(
        [sys.executable, *python, "-m", "llamafactory_ogpsa.cli", "doctor"],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def failures(check):
    return [finding for finding in check() if finding.state == doctor.FAIL]


@pytest.mark.cli
def test_here_all_is_well():
    process = run_doctor()
    assert process.returncode == 0, process.stdout
    assert process.stdout.splitlines()[-1] == "OGPSA can train here."
    assert "FAIL" not in process.stdout
    assert f"torch: {torch.__version__.partition('+')[0]}" in process.stdout
    for name in autoload.SEAMS:
        assert f"  ok  {name}: patched" in process.stdout


@pytest.mark.cli
def test_autoloading_switched_off_is_diagnosed():
    process = run_doctor(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert process.returncode == 1
    assert "FAIL  import hook: TORCH_DEVICE_BACKEND_AUTOLOAD=0" in process.stdout
    assert "try: unset TORCH_DEVICE_BACKEND_AUTOLOAD" in process.stdout
    assert process.stdout.count("FAIL  ") == 1
    assert "llamafactory.train.sft.workflow: would be patched" in process.stdout


@pytest.mark.parametrize("value", ["0", "true", ""])
def test_torch_takes_anything_but_1_for_no(monkeypatch, value):
    finders = [finder for finder in sys.meta_path if not isinstance(finder, autoload.SeamFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", value)
    assert not torch._is_device_backend_autoload_enabled()
    (finding,) = failures(doctor.check_hook)
    assert f"TORCH_DEVICE_BACKEND_AUTOLOAD={value}" in finding.text
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD")
    (finding,) = failures(doctor.check_hook)
    assert "did not install it" in finding.text


@pytest.mark.cli
def test_a_copy_that_is_not_installed_is_diagnosed(site_without_plugin, tmp_path):
    (tmp_path / "llamafactory_ogpsa").symlink_to(ROOT / "llamafactory_ogpsa")
    # Not in the clone, whose egg-info is an installation to a Python that is started beside it.
    process = run_doctor("-S", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{site_without_plugin}")
    assert process.returncode == 1
    assert "FAIL  entry point" in process.stdout
    assert f"try: pip install . {doctor.CLONE}, into this environment" in process.stdout
    assert "FAIL  import hook: `import torch` did not install it" in process.stdout


@pytest.mark.cli
def test_a_torch_that_cannot_be_imported_is_diagnosed_to_the_end(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    process = run_doctor(PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert process.returncode == 1
    assert "FAIL  torch: cannot be imported (OSError: libcudart.so.13: cannot open)" in process.stdout
    assert "FAIL  llamafactory.hparams.parser: cannot be imported" in process.stdout
    assert process.stdout.splitlines()[-1].startswith("OGPSA cannot train here")
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("torch_build", "audio_build", "index"),
    [("cu132", "cu130", ""), ("cu130", "cu126", "cu126"), ("rocm6.2", None, "rocm6.2"), (None, None, "")],
)
def test_a_torch_for_another_cuda_than_torchaudio_is_diagnosed_once(
    monkeypatch, tmp_path, torch_build, audio_build, index
):
    (tmp_path / "torchaudio.py").write_text("raise RuntimeError('compiled with different CUDA versions')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    monkeypatch.setattr(doctor, "build_of", {"torch": torch_build, "torchaudio": audio_build}.get)
    (finding,) = doctor.check_torch()
    assert str(finding).startswith("FAIL  torchaudio: cannot be imported (RuntimeError: compiled with different CUDA")
    url = f" --index-url https://download.pytorch.org/whl/{index}" if index else ""
    assert finding.fix.endswith(f"pip install '{doctor.TORCH}' torchvision torchaudio{url}")


def test_the_torch_to_install_is_one_that_this_package_takes():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert doctor.TORCH in config["options"]["install_requires"].split()


@pytest.mark.parametrize(
    ("written", "build"),
    [("2.11.0+cu130", "cu130"), ("2.6.0+rocm6.2", "rocm6.2"), ("2.9+cpu", "cpu"), ("2.6.0", None)],
)
def test_the_build_of_a_wheel_is_read_without_importing_it(monkeypatch, tmp_path, written, build):
    (tmp_path / "wheel_of_torch").mkdir()
    (tmp_path / "wheel_of_torch" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "wheel_of_torch" / "version.py").write_text(f"__version__ = '{written}'\ngit_version = '34c52a'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.build_of("wheel_of_torch") == build
    assert doctor.build_of("not_installed_at_all") is None


@pytest.mark.parametrize("variable", ["USE_MCA", "USE_MEGATRON_BRIDGE", "USE_KT"])
def test_a_backend_that_refuses_ogpsa_is_diagnosed(monkeypatch, variable):
    assert failures(doctor.check_backends) == []
    monkeypatch.setenv(variable, "1")
    (finding,) = failures(doctor.check_backends)
    assert finding.text.startswith(f"{variable}=1 chooses LLaMA-Factory's ")
    assert finding.fix == f"unset {variable}"


def test_the_v1_trainer_is_noted(monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    (finding,) = doctor.check_backends()
    assert finding.state == doctor.NOTE
    assert "OGPSA is experimental: see docs/v1.md" in finding.text


def test_further_argument_lists_are_noted():
    notes = [finding.text for finding in doctor.check_seams() if finding.state == doctor.NOTE]
    assert "OGPSA runs of another backend's _parse_train_mca_args are refused" in notes


def test_a_missing_package_fails_where_it_is_required(monkeypatch):
    def version(name):
        if name in ("peft", "deepspeed"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    findings = {finding.subject: finding for finding in doctor.check_versions()}
    assert (findings["peft"].state, findings["peft"].fix) == (doctor.FAIL, f"pip install . {doctor.CLONE}")
    assert findings["deepspeed"].state == doctor.NOTE
    assert findings["torch"].state == doctor.OK


def test_a_workflow_that_looks_different_is_diagnosed(monkeypatch):
    import llamafactory.train.dpo.workflow as workflow

    assert failures(doctor.check_seams) == []
    monkeypatch.setattr(workflow, "get_dataset", lambda *args: None)
    (finding,) = failures(doctor.check_seams)
    assert finding.subject == "llamafactory.train.dpo.workflow"
    assert "get_dataset has other parameters" in finding.text


def test_a_parser_that_is_not_patched_is_diagnosed(monkeypatch):
    import llamafactory.hparams.parser as parser

    monkeypatch.setattr(parser, "get_train_args", parser.get_train_args.__wrapped__)
    (finding,) = failures(doctor.check_seams)
    assert finding.subject == "llamafactory.hparams.parser"
    assert "had been imported before the hook" in finding.text


@pytest.mark.cli
def test_what_the_hook_says_of_a_seam_is_told_and_a_broken_web_ui_is_no_obstacle():
    code = (
        "import sys, torch; from llamafactory_ogpsa import autoload, doctor\n"
        "for name in sys.argv[1:]: autoload.SEAMS[name] = 'llamafactory_ogpsa.nowhere'\n"
        "print([(f.state, f.subject, f.text) for f in doctor.check_seams() if f.subject in sys.argv])"
    )
    broken = ["llamafactory.train.kto.workflow", "llamafactory.webui.interface"]
    process = subprocess.run([sys.executable, "-c", code, *broken], capture_output=True, text=True, check=True)
    workflow, web_ui = ast.literal_eval(process.stdout.splitlines()[-1])
    assert workflow[:2] == ("FAIL", broken[0])
    assert web_ui[:2] == ("note", broken[1])
    for finding in (workflow, web_ui):
        assert "not patched (No module named 'llamafactory_ogpsa.nowhere')" in finding[2]


@pytest.mark.parametrize(
    ("error", "name", "told"),
    [
        ("cannot be imported (x)", "webui.interface", "the web UI has no OGPSA here, training is not affected"),
        ("cannot be imported (x)", "v1.config.arg_parser", "OGPSA cannot train with USE_V1=1"),
        ("not patched (x)", "v1.trainers.sft_trainer", "OGPSA cannot train with USE_V1=1"),
        (
            "not patched (x)",
            "v1.config.arg_parser",
            "OGPSA cannot train with USE_V1=1, and with ALLOW_EXTRA_KEYS=1 its options are ignored",
        ),
    ],
)
def test_a_note_says_what_follows_and_no_more(monkeypatch, error, name, told):
    monkeypatch.setattr(doctor, "seam_error", lambda seam: error if seam == f"llamafactory.{name}" else None)
    (finding,) = (finding for finding in doctor.check_seams() if finding.subject == f"llamafactory.{name}")
    assert (finding.state, finding.text) == (doctor.NOTE, f"{error}; {told}")


def test_deepspeed_that_cannot_be_imported_is_noted(monkeypatch, tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('no CUDA_HOME')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    (finding,) = doctor.check_deepspeed()
    assert finding.state == doctor.NOTE
    assert "no CUDA_HOME" in finding.text


def test_devices_and_kernels_are_told_on_gpus_too(monkeypatch):
    class Properties:
        name, total_memory = "GPU of the test", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert [str(finding) for finding in doctor.check_devices()] == [
        f"  ok  device {index}: GPU of the test, 80 GiB" for index in (0, 1)
    ]
    monkeypatch.setattr("llamafactory_ogpsa.kernels.triton_obstacle", lambda *args, **kwargs: None)
    assert [finding.text for finding in doctor.check_triton()] == ["Triton"]
    monkeypatch.setattr("llamafactory_ogpsa.kernels.triton_obstacle", lambda *args, **kwargs: "it is not installed")
    (finding,) = doctor.check_triton()
    assert (finding.state, finding.fix) == (
        doctor.NOTE,
        "pip install triton; install a C compiler; unset TRITON_INTERPRET",
    )
