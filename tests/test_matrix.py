"""What scripts/matrix.py compares, and the versions that it tries."""

import re
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import matrix

from llamafactory_ogpsa import TESTED_WITH


RESULTS = {"ours": {"o": "passed"}, "tests": {"a": "passed", "b": "failed"}, "tests_v1": {"c": "skipped"}}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({("tests", False): {"a": "passed", "b": "passed"}}, 1),
        ({("ours", True): {"o": "failed"}}, 1),
        ({("ours", True): "the tests do not start: x"}, 1),
        ({("ours", True): {"o": "skipped"}}, 1),
    ],
    ids=["equal", "differs", "ours fail", "ours do not start", "ours are all skipped"],
)
def test_a_source_passes_where_ours_pass_and_its_own_do_not_differ(tmp_path, monkeypatch, capsys, change, status):
    source = tmp_path / "source"
    for name in ("src/llamafactory", "tests", "tests_v1", ".git"):
        (source / name).mkdir(parents=True)
    steps = []

    def run_tests(folder, root, tests, *options):
        installed = "uninstall" not in steps
        name = "ours" if root == matrix.ROOT else tests[0]
        assert root == matrix.ROOT or (root != source and (root / tests[0]).is_dir() and not (root / ".git").exists())
        steps.append((name, installed))
        return change.get((name, installed), RESULTS[name])

    monkeypatch.setattr(matrix, "run_tests", run_tests)
    monkeypatch.setattr(matrix, "install", lambda python, folder, requirements: steps.append("install"))
    monkeypatch.setattr(matrix.subprocess, "run", lambda command, **kwargs: steps.append(command[3]))
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--source", str(source)])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert ended.value.code == status
    assert steps == [
        "install",
        ("ours", True),
        ("tests", True),
        ("tests_v1", True),
        "uninstall",
        ("tests", False),
        ("tests_v1", False),
    ]
    assert ("differs: b: failed with, passed without" in capsys.readouterr().out) is (("tests", False) in change)


def test_the_versions_that_errors_name_are_those_that_are_tried():
    tried = {re.search(r"lf(\S+)", environment.name)[1] for environment in matrix.ENVIRONMENTS}
    assert tried == set(re.findall(r"\d+\.\d+\.\d+(?=,)", TESTED_WITH))
