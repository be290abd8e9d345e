"""What scripts/matrix.py says of an environment in which nothing works, which Pythons it takes, and what it compares."""

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import matrix

from llamafactory_ogpsa import TESTED_WITH


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
    what = {"pip": "cannot be installed", "pytest": "tests/test_autoload.py: the tests do not end"}[failing]
    result = matrix.try_environment(matrix.ENVIRONMENTS[0], sys.executable, tmp_path, matrix.TESTS)
    assert result == f"{what}: {told[failing]} ({datetime.date.today().isoformat()})"


def fake_pytest(monkeypatch, status, calls):
    """Let a run of pytest write REPORT and end with a status; keep the environments of the runs."""

    def run(command, **kwargs):
        if command[2] == "pytest":
            calls.append(kwargs["env"])
            part = next(word for word in map(str, command) if word.startswith("--junitxml="))
            Path(part.removeprefix("--junitxml=")).write_text(REPORT)
        return SimpleNamespace(returncode=status if command[2] == "pytest" else 0, stdout="told\n", stderr="")

    monkeypatch.setattr(matrix.subprocess, "run", run)


def test_a_file_that_has_a_report_is_not_run_again(tmp_path, monkeypatch):
    calls = []
    fake_pytest(monkeypatch, 1, calls)
    reports = tmp_path / "reports"
    run = lambda: matrix.run_files(tmp_path, reports, matrix.ROOT, ["tests/a.py", "tests/b.py"], label="ours")
    once = run()
    assert once == run() == matrix.read_report(reports / "ours-tests-a.py.xml")
    assert len(calls) == 2
    (reports / "ours-tests-a.py.xml").unlink()
    assert run() == once
    assert len(calls) == 3


def test_a_package_on_pythonpath_is_not_seen(tmp_path, monkeypatch):
    calls = []
    fake_pytest(monkeypatch, 0, calls)
    monkeypatch.setenv("PYTHONPATH", str(matrix.ROOT))
    matrix.run_files(tmp_path, tmp_path / "reports", matrix.ROOT, ["tests/a.py"], label="ours")
    assert "PATH" in calls[0]
    assert "PYTHONPATH" not in calls[0]


@pytest.mark.parametrize("status", [2, -11], ids=["interrupted", "crashed"])
def test_a_run_that_does_not_end_leaves_no_report(tmp_path, monkeypatch, status):
    fake_pytest(monkeypatch, status, [])
    reports = tmp_path / "reports"
    result = matrix.run_files(tmp_path, reports, matrix.ROOT, ["tests/a.py", "tests/b.py"], label="ours")
    assert result == "tests/a.py: the tests do not end: told"
    assert list(reports.glob("*.xml")) == []


def test_a_selection_of_tests_is_told(tmp_path, monkeypatch):
    fake_pytest(monkeypatch, 0, [])
    tests = ["tests/test_autoload.py", "tests/plugin/test_v1.py"]
    result = matrix.try_environment(matrix.ENVIRONMENTS[0], sys.executable, tmp_path, tests)
    today = datetime.date.today().isoformat()
    told = "only `tests/test_autoload.py`, `tests/plugin/test_v1.py`"
    assert result == f"1 passed, 2 failed, 1 skipped ({today}, {told})"


def test_only_reports_of_the_commit_count_and_their_day_is_told(tmp_path, monkeypatch):
    calls = []
    fake_pytest(monkeypatch, 0, calls)
    tests = ["tests/test_autoload.py"]
    run = lambda: matrix.try_environment(matrix.ENVIRONMENTS[0], sys.executable, tmp_path, tests)
    monkeypatch.setattr(matrix, "find_commit", lambda root: "one")
    today = run()
    report = tmp_path / "reports" / "one" / "ours-tests-test_autoload.py.xml"
    os.utime(report, (1.6e9, 1.6e9))  # in September 2020
    assert "(2020-09-13, only" in run()
    assert len(calls) == 1
    monkeypatch.setattr(matrix, "find_commit", lambda root: "two")
    assert run() == today
    assert len(calls) == 2


def test_a_commit_says_where_files_have_changed_since(tmp_path):
    assert matrix.find_commit(tmp_path) == "none"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "docs").mkdir()
    for name in ("file", "docs/compatibility.md"):
        (tmp_path / name).touch()
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = matrix.find_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "docs" / "compatibility.md").write_text("with a row")
    assert matrix.find_commit(tmp_path) == clean
    (tmp_path / "file").write_text("changed")
    changed = matrix.find_commit(tmp_path)
    assert re.fullmatch(f"{clean}-[0-9a-f]{{12}}", changed)
    (tmp_path / "file").write_text("changed again")
    assert matrix.find_commit(tmp_path) not in (clean, changed)


def test_folders_of_tests_are_their_files(tmp_path):
    for name in ("one/test_b.py", "one/deep/test_a.py", "one/conftest.py", "test_c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert matrix.find_tests(tmp_path, ["test_c.py", "one"]) == ["test_c.py", "one/deep/test_a.py", "one/test_b.py"]


@pytest.mark.parametrize("status", [0, 127])
def test_a_python_that_does_not_run_is_not_there(tmp_path, monkeypatch, status):
    shim = tmp_path / "python3.99"
    shim.write_text(f"#!/bin/sh\nexit {status}\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.find_python("3.99") == (str(shim) if status == 0 else None)
    assert matrix.find_python("3.98") is None


REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure/></testcase>
<testcase classname="tests.a" name="late"/><testcase classname="tests.a" name="late"><error/></testcase>
<testcase classname="tests.a" name="left"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_read_test_by_test_and_summed_up(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    results = matrix.read_report(tmp_path / "report.xml")
    expected = {"good": "passed", "bad": "failed", "late": "failed", "left": "skipped"}
    assert results == {f"tests.a::{name}": result for name, result in expected.items()}
    assert matrix.summarise(results) == "1 passed, 2 failed, 1 skipped"


def test_what_differs_with_and_without_the_package_is_named():
    same = {"a": "passed", "b": "failed"}
    assert matrix.differences(same, dict(same)) == []
    assert matrix.differences({**same, "a": "failed"}, {**same, "c": "passed"}) == [
        "  differs: a: failed with, passed without",
        "  differs: c: not run with, passed without",
    ]
    assert matrix.differences("the tests do not end: x", same) == ["  cannot be compared: the tests do not end: x"]


RESULTS = {"ours": {"o": "passed"}, "tests": {"a": "passed", "b": "failed"}, "tests_v1": {"c": "skipped"}}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({("tests", False): {"a": "passed", "b": "passed"}}, 1),
        ({("ours", True): {"o": "failed"}}, 1),
        ({("ours", True): "the tests do not end: x"}, 1),
        ({("ours", True): {"o": "skipped"}}, 1),
    ],
    ids=["equal", "differs", "ours fail", "ours do not start", "ours are all skipped"],
)
def test_a_source_passes_where_ours_pass_and_its_own_do_not_differ(tmp_path, monkeypatch, capsys, change, status):
    source = tmp_path / "source"
    for name in ("src/llamafactory", "tests", "tests_v1", ".git"):
        (source / name).mkdir(parents=True)
    steps = []

    def run_tests(folder, root, file, report, *options):
        assert not (tmp_path / "kept" / "source" / "source" / "tests_old").exists()
        installed = "uninstall" not in steps
        name = "ours" if root == matrix.ROOT else file
        assert root == matrix.ROOT or (root != source and (root / file).is_dir() and not (root / ".git").exists())
        steps.append((name, installed))
        return change.get((name, installed), RESULTS[name])

    monkeypatch.setattr(matrix, "run_tests", run_tests)
    monkeypatch.setattr(matrix, "install", lambda python, folder, requirements: steps.append("install"))
    monkeypatch.setattr(matrix, "find_commit", lambda root: "none")
    monkeypatch.setattr(matrix.subprocess, "run", lambda command, **kwargs: steps.append(command[3]))
    (tmp_path / "kept" / "source" / "source" / "tests_old").mkdir(parents=True)  # an older copy
    words = ["--source", str(source), "--tests", "tests/test_autoload.py", "--folder", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["matrix.py", *words])
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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--source", "/"], "allowed: a folder with LLaMA-Factory's src/llamafactory"),
        (["--tests", "tests/test_none.py"], "--tests has 'tests/test_none.py', which is not there"),
        (["--only", "py2"], "--only has 'py2'; allowed: py3.11"),
        (["--only"], "--only: expected at least one argument"),
        (["--own", "tests"], "--own is for a LLaMA-Factory in a folder; allowed: with --source"),
        (["--source", "/", "--only", "py2"], "allowed: --source or --only"),
    ],
)
def test_options_that_make_no_sense_are_refused(monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["matrix.py", *words])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_the_versions_that_errors_name_are_those_that_are_tried():
    tried = {re.search(r"lf(\S+)", environment.name)[1] for environment in matrix.ENVIRONMENTS}
    assert tried == set(re.findall(r"\d+\.\d+\.\d+(?=,)", TESTED_WITH))
