"""What scripts/matrix.py says of an environment in which nothing works, and which Pythons it takes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import matrix


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ({"stdout": "collected\nout\n\n", "stderr": "noise\nerr\n"}, {"pip": "err", "pytest": "out"}),
        (
            {"stdout": "", "stderr": "No module named pytest\n"},
            dict.fromkeys(["pip", "pytest"], "No module named pytest"),
        ),
        ({"stdout": "", "stderr": " \n"}, dict.fromkeys(["pip", "pytest"], "nothing was printed, exit status -9")),
    ],
)
@pytest.mark.parametrize("failing", ["pip", "pytest"])
def test_a_step_that_fails_is_told_by_its_last_line(tmp_path, monkeypatch, printed, told, failing):
    def run(command, **kwargs):
        return SimpleNamespace(returncode=-9 if command[2] == failing else 0, **printed)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    what = {"pip": "cannot be installed", "pytest": "the tests do not start"}[failing]
    assert matrix.try_environment(matrix.ENVIRONMENTS[0], sys.executable, tmp_path) == f"{what}: {told[failing]}"


@pytest.mark.parametrize("status", [0, 127])
def test_a_python_that_does_not_run_is_not_there(tmp_path, monkeypatch, status):
    shim = tmp_path / "python3.99"
    shim.write_text(f"#!/bin/sh\nexit {status}\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.find_python("3.99") == (str(shim) if status == 0 else None)
    assert matrix.find_python("3.98") is None
