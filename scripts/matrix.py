"""Try the kernels' and the end-to-end tests in environments of other versions, and write the table of docs/compatibility.md.

    python scripts/matrix.py [--only NAME ...] [--tests PATH ...] [--folder FOLDER]
    python scripts/matrix.py --source FOLDER [--tests PATH ...] [--own PATH ...] [--folder FOLDER]

Each environment is built from nothing in a temporary folder, a few minutes and some GiB each. An environment whose
Python is not on this machine is left as the table has it.

With `--source`, a LLaMA-Factory in a folder (a clone of its main branch) takes the place of the released ones: the same
tests, then its own tests with and without this package, compared test by test. The exit status is 1 where one of ours
fails or one of its own differs; the page is not written.

With `--folder`, environments and reports are kept there, and another call with the same folder goes on where an
interrupted one stopped: a file of tests that has a report of the same commit is not run again. Remove its report to run
it again.
"""

import argparse
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = ["tests/test_autoload.py", "tests/kernels", "tests/plugin"]
SOURCE_TESTS = ["tests", "tests_v1"]  # LLaMA-Factory's own
ENDED = {0, 1, 5}  # pytest's exit status where all tests ran: all passed, some failed, there were none
BEGIN, END = "<!-- table: scripts/matrix.py -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Environment:
    """One row of the table; `requirements` are those that pip is held to, beside the package's own."""

    name: str
    python: str
    requirements: tuple[str, ...]


TORCH = {"2.11": ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")}
TORCH["2.14"] = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
TORCH["2.6"] = ("torch==2.6.0", "torchvision==0.21.0", "torchaudio==2.6.0")
ENVIRONMENTS = [
    Environment(
        f"py{python} lf{factory} tf{transformers} torch{torch}",
        python,
        (f"llamafactory=={factory}", f"transformers=={transformers}", *TORCH[torch]),
    )
    for python, factory, transformers, torch in [
        ("3.11", "0.9.5", "5.6.0", "2.11"),
        ("3.11", "0.9.5", "5.6.0", "2.14"),
        ("3.11", "0.9.5", "4.57.1", "2.11"),
        ("3.11", "0.9.4", "4.57.1", "2.11"),
        ("3.11", "0.9.4", "4.57.1", "2.6"),
        ("3.12", "0.9.5", "5.6.0", "2.11"),
        ("3.13", "0.9.5", "5.6.0", "2.11"),
    ]
]


def last_line(fallback: str, text: str, status: int) -> str:
    """Return the last line of `text`, or of `fallback` where `text` is empty; the exit status where both are."""
    lines = f"{fallback}\n{text}".strip().splitlines()
    return lines[-1] if lines else f"nothing was printed, exit status {status}"


def find_commit(root: Path) -> str:
    """Return the commit of a folder, and a hash of what has changed since; of a folder without commits "none".

    The page does not count, because a row that was written changes it.
    """
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changes = [*git, "diff", "HEAD", "--", ".", f":!{PAGE.relative_to(ROOT)}"]
    diff = subprocess.run(changes, capture_output=True, text=True, errors="replace").stdout
    return "-".join([commit or "none", *([hashlib.sha256(diff.encode()).hexdigest()[:12]] if diff else [])])


def find_python(version: str) -> str | None:
    """Return the path of `python<version>`, or None where it is missing or, as a version manager's shim, does not run."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode != 0:
        return None
    return python


def install(python: str, folder: Path, requirements: Sequence[str]) -> str | None:
    """Build an environment with an interpreter, this package in it; return why it cannot be, None where it is."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    packages = ["pytest", "pytest-timeout", "hypothesis", "scipy", "-e", str(ROOT)]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    installed = subprocess.run([*pip, *requirements, *packages], capture_output=True, text=True)
    if installed.returncode != 0:
        return f"cannot be installed: {last_line(installed.stdout, installed.stderr, installed.returncode)}"
    return None


def find_tests(root: Path, paths: Sequence[str]) -> list[str]:
    """Return the files of tests among files and folders under `root`."""
    return [
        str(file.relative_to(root))
        for path in paths
        for file in (sorted((root / path).rglob("test_*.py")) if (root / path).is_dir() else [root / path])
    ]


def run_files(
    folder: Path, reports: Path, root: Path, files: Sequence[str], *options: str, label: str
) -> dict[str, str] | str:
    """Run files of tests one after another; return the results of all of them, or why one does not end.

    Args:
        folder: the environment.
        reports: where the reports are.
        root: the folder that the tests are in, and run in.
        files: relative to `root`.
        options: for pytest.
        label: begins the names of the reports.
    """
    results: dict[str, str] = {}
    for file in files:
        report = reports / f"{label}-{file.replace('/', '-')}.xml"
        one = run_tests(folder, root, file, report, *options)
        print(f"  {label} {file}: {summarise(one)}", flush=True)
        print_failures(one)
        if isinstance(one, str):
            return f"{file}: {one}"
        results |= one
    return results


def run_tests(folder: Path, root: Path, file: str, report: Path, *options: str) -> dict[str, str] | str:
    """Run a file of tests in an environment, unless its report is there already.

    Args:
        folder: the environment.
        root: the folder that the tests are in, and run in.
        file: the file of tests, or a folder with some.
        report: where the report is written.
        options: for pytest.

    Returns:
        `passed`, `failed` or `skipped` by the name of the test; or why the tests do not end.
    """
    if report.exists():
        return read_report(report)
    report.parent.mkdir(parents=True, exist_ok=True)
    part = report.with_suffix(".part")
    part.unlink(missing_ok=True)
    # A package on PYTHONPATH would be there although it is not installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [
        folder / "bin" / "python",
        "-m",
        "pytest",
        file,
        f"--junitxml={part}",
        "--continue-on-collection-errors",
    ]
    process = subprocess.run(
        [*command, "-p", "no:cacheprovider", *options],
        cwd=root,
        env={**env, "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
    )
    if process.returncode not in ENDED or not part.exists():
        return f"the tests do not end: {last_line(process.stderr, process.stdout, process.returncode)}"
    os.replace(part, report)  # an interrupted pytest writes a report too
    return read_report(report)


def read_report(report: Path) -> dict[str, str]:
    """Read a JUnit report: `passed`, `failed` or `skipped` by the name of the test; an error is a failure."""
    results: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            results[name] = "failed"  # also where there are two of it: a test that passed, and whose teardown did not
        elif results.get(name) != "failed":
            results[name] = "skipped" if case.find("skipped") is not None else "passed"
    return results


def summarise(results: dict[str, str] | str) -> str:
    """Return the results of tests in words, as the page has them."""
    if isinstance(results, str):
        return results
    counts = Counter(results.values())
    return f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"


def try_environment(environment: Environment, python: str, folder: Path, tests: Sequence[str]) -> str:
    """Build an environment with an interpreter and run tests in it; return the result in words, with its date."""
    problem = install(python, folder, environment.requirements)
    reports = folder / "reports" / find_commit(ROOT)
    result = problem or summarise(run_files(folder, reports, ROOT, find_tests(ROOT, tests), label="ours"))
    selected = "" if tests == TESTS else f", only {', '.join(f'`{path}`' for path in tests)}"
    return f"{result} ({find_date(reports)}{selected})"


def find_date(reports: Path) -> str:
    """Return the day of the oldest report in a folder, today's where there is none."""
    times = [report.stat().st_mtime for report in reports.glob("*.xml")]
    return (datetime.date.fromtimestamp(min(times)) if times else datetime.date.today()).isoformat()


def print_failures(results: dict[str, str] | str) -> None:
    """Print the tests that failed, a line each."""
    for name, result in results.items() if isinstance(results, dict) else ():
        if result == "failed":
            print(f"  failed: {name}", file=sys.stderr)


def try_source(source: Path, python: str, folder: Path, tests: Sequence[str], own: Sequence[str]) -> bool:
    """Try a LLaMA-Factory from a folder: our tests with it, and its own tests with and without this package.

    Args:
        source: the folder, a clone of LLaMA-Factory; it is copied first, and not changed.
        python: the interpreter.
        folder: for the environment and the copy.
        tests: ours, files and folders of this project.
        own: its own, files and folders of the clone; those that it does not have are left out.

    Returns:
        whether all of our tests pass, and all of its own have the same result with and without the package.
    """
    copy, environment = folder / "source", folder / "environment"
    ignore = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__")
    shutil.rmtree(copy, ignore_errors=True)  # of an older commit, in a folder that is kept
    shutil.copytree(source, copy, ignore=ignore)
    problem = install(python, environment, [str(copy)])
    if problem:
        print(f"{source}: {problem}", flush=True)
        return False

    reports = environment / "reports" / f"{find_commit(ROOT)}-{find_commit(source)}"
    ours = run_files(environment, reports, ROOT, find_tests(ROOT, tests), label="ours")
    print(f"end-to-end tests: {summarise(ours)}", flush=True)

    paths = [path for path in own if (copy / path).exists()]
    options = ("--import-mode=importlib",)  # as its Makefile runs them: two of its folders have files of one name
    with_package = {path: run_files(environment, reports, copy, [path], *options, label="with") for path in paths}
    uninstall = [environment / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "llamafactory-ogpsa"]
    subprocess.run(uninstall, check=True)
    without = {path: run_files(environment, reports, copy, [path], *options, label="without") for path in paths}

    equal = bool(paths)
    for path in paths:
        print(f"its {path} with the package: {summarise(with_package[path])}", flush=True)
        print(f"its {path} without it: {summarise(without[path])}", flush=True)
        lines = differences(with_package[path], without[path])
        print("\n".join(lines) if lines else "  no test differs", flush=True)
        equal = equal and not lines
    if not paths:
        print(f"{source} has none of {', '.join(own)}: nothing to compare", flush=True)
    return equal and isinstance(ours, dict) and "passed" in ours.values() and "failed" not in ours.values()


def differences(one: dict[str, str] | str, other: dict[str, str] | str) -> list[str]:
    """Return a line for each test whose result with the package is not the one without it."""
    if isinstance(one, str) or isinstance(other, str):
        return [f"  cannot be compared: {result}" for result in (one, other) if isinstance(result, str)]
    names = sorted(one.keys() | other.keys())
    pairs = {name: (one.get(name, "not run"), other.get(name, "not run")) for name in names}
    return [f"  differs: {name}: {a} with, {b} without" for name, (a, b) in pairs.items() if a != b]


def read_table() -> dict[str, str]:
    """Return the results that the page holds, by the name of the environment."""
    rows = re.findall(r"^\| `(.+?)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return dict(rows)


def write_table(results: dict[str, str]) -> None:
    """Put the results into the page, under a temporary name first."""
    page = PAGE.read_text()
    rows = [f"| `{item.name}` | {results.get(item.name, 'not run')} |" for item in ENVIRONMENTS]
    table = "\n".join([BEGIN, "", "| environment | tests |", "|---|---|", *rows, "", END])
    page = page[: page.index(BEGIN)] + table + page[page.index(END) + len(END) :]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(page)
    os.replace(temporary, PAGE)


def main() -> None:
    """Try the environments one after another, and write the page after each; or a LLaMA-Factory from a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="environments of the table")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="a LLaMA-Factory to try instead")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="of ours, only these")
    parser.add_argument("--own", nargs="+", metavar="PATH", help="with --source: of LLaMA-Factory's, only these")
    parser.add_argument("--folder", type=Path, help="keep environments and reports there, and go on from them")
    options = parser.parse_args()
    if options.source is not None and options.only is not None:
        parser.error("--only is for the table's environments; allowed: --source or --only")
    if options.source is None and options.own is not None:
        parser.error("--own is for a LLaMA-Factory in a folder; allowed: with --source")
    names = [item.name for item in ENVIRONMENTS]
    only = options.only or names
    unknown = set(only) - set(names)
    if unknown:
        parser.error(f"--only has {min(unknown)!r}; allowed: {', '.join(names)}")
    if options.source is not None and not (options.source / "src" / "llamafactory").is_dir():
        parser.error(f"--source is {str(options.source)!r}; allowed: a folder with LLaMA-Factory's src/llamafactory")

    missing = [path for path in options.tests if not (ROOT / path).exists()]
    if missing:
        parser.error(
            f"--tests has {missing[0]!r}, which is not there; allowed: files and folders of tests, from {ROOT}"
        )

    if options.source is not None:
        with environment_folder(options.folder, "source") as folder:
            sys.exit(
                not try_source(options.source, sys.executable, folder, options.tests, options.own or SOURCE_TESTS)
            )

    results = read_table()
    for environment in ENVIRONMENTS:
        if environment.name not in only:
            continue
        python = find_python(environment.python)
        if python is None:
            print(f"{environment.name}: python{environment.python} is not here", flush=True)
            continue
        with environment_folder(options.folder, environment.name.replace(" ", "-")) as folder:
            results[environment.name] = try_environment(environment, python, folder, options.tests)
        print(f"{environment.name}: {results[environment.name]}", flush=True)
        write_table(results)


@contextmanager
def environment_folder(folder: Path | None, name: str) -> Iterator[Path]:
    """Give a folder of this name in the one that is kept, or a temporary one that is removed at the end."""
    if folder is not None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        yield (folder / name).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="ogpsa-matrix-") as temporary:
        yield Path(temporary)


if __name__ == "__main__":
    main()
