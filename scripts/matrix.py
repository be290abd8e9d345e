"""Try the kernels' and the end-to-end tests in environments of other versions, and write the table of docs/compatibility.md.

    python scripts/matrix.py [--only NAME ...] [--keep]
    python scripts/matrix.py --source FOLDER [--keep]

Each environment is built from nothing in a temporary folder, a few minutes and some GiB each. An environment whose
Python is not on this machine is left as the table has it.

With `--source`, a LLaMA-Factory in a folder (a clone of its main branch) takes the place of the released ones: the same
tests, then its own tests with and without this package, compared test by test. The exit status is 1 where one of ours
fails or one of its own differs; the page is not written.
"""

import argparse
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


def last_line(other: str, text: str, status: int) -> str:
    """Return the last line of a text, of another where it is empty, and the exit status where both are."""
    lines = f"{other}\n{text}".strip().splitlines()
    return lines[-1] if lines else f"nothing was printed, exit status {status}"


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


def run_tests(folder: Path, root: Path, tests: Sequence[str], *options: str) -> dict[str, str] | str:
    """Run tests in an environment.

    Args:
        folder: the environment.
        root: the folder that the tests are in, and run in.
        tests: their files and folders.
        options: for pytest.

    Returns:
        `passed`, `failed` or `skipped` by the name of the test; or why the tests do not start.
    """
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    process = subprocess.run(
        [
            folder / "bin" / "python",
            "-m",
            "pytest",
            *tests,
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
            *options,
        ],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    if not report.exists():
        return f"the tests do not start: {last_line(process.stderr, process.stdout, process.returncode)}"
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


def try_environment(environment: Environment, python: str, folder: Path) -> str:
    """Build an environment with an interpreter and run the tests in it; return the result in words."""
    problem = install(python, folder, environment.requirements)
    if problem:
        return problem
    results = run_tests(folder, ROOT, TESTS)
    print_failures(results)
    return summarise(results)


def print_failures(results: dict[str, str] | str) -> None:
    """Print the tests that failed, a line each."""
    for name, result in results.items() if isinstance(results, dict) else ():
        if result == "failed":
            print(f"  failed: {name}", file=sys.stderr)


def try_source(source: Path, python: str, folder: Path) -> bool:
    """Try a LLaMA-Factory from a folder: our tests with it, and its own tests with and without this package.

    Args:
        source: the folder, a clone of LLaMA-Factory; it is copied first, and not changed.
        python: the interpreter.
        folder: an empty folder for the environment and the copy.

    Returns:
        whether all of our tests pass, and all of its own have the same result with and without the package.
    """
    copy, environment = folder / "source", folder / "environment"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", "*.egg-info", "__pycache__"))
    problem = install(python, environment, [str(copy)])
    if problem:
        print(f"{source}: {problem}", flush=True)
        return False

    ours = run_tests(environment, ROOT, TESTS)
    print_failures(ours)
    print(f"end-to-end tests: {summarise(ours)}", flush=True)

    folders = [name for name in SOURCE_TESTS if (copy / name).is_dir()]
    options = ("--import-mode=importlib",)  # as its Makefile runs them: two of its folders have files of one name
    with_package = {name: run_tests(environment, copy, [name], *options) for name in folders}
    uninstall = [environment / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "llamafactory-ogpsa"]
    subprocess.run(uninstall, check=True)
    without = {name: run_tests(environment, copy, [name], *options) for name in folders}

    equal = bool(folders)
    for name in folders:
        print(f"its {name} with the package: {summarise(with_package[name])}", flush=True)
        print(f"its {name} without it: {summarise(without[name])}", flush=True)
        lines = differences(with_package[name], without[name])
        print("\n".join(lines) if lines else "  no test differs", flush=True)
        equal = equal and not lines
    if not folders:
        print(f"{source} has none of {', '.join(SOURCE_TESTS)}: nothing to compare", flush=True)
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
    parser.add_argument("--only", nargs="*", default=[item.name for item in ENVIRONMENTS], metavar="NAME")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="a LLaMA-Factory to try instead")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they were built")
    options = parser.parse_args()
    unknown = set(options.only) - {item.name for item in ENVIRONMENTS}
    if unknown:
        parser.error(f"--only has {min(unknown)!r}; allowed: {', '.join(item.name for item in ENVIRONMENTS)}")
    if options.source is not None and not (options.source / "src" / "llamafactory").is_dir():
        parser.error(f"--source is {str(options.source)!r}; allowed: a folder with LLaMA-Factory's src/llamafactory")

    if options.source is not None:
        with environment_folder(options.keep) as folder:
            sys.exit(not try_source(options.source, sys.executable, folder))

    results = read_table()
    for environment in ENVIRONMENTS:
        if environment.name not in options.only:
            continue
        python = find_python(environment.python)
        if python is None:
            print(f"{environment.name}: python{environment.python} is not here", flush=True)
            continue
        with environment_folder(options.keep) as folder:
            results[environment.name] = try_environment(environment, python, folder)
        print(f"{environment.name}: {results[environment.name]}", flush=True)
        write_table(results)


@contextmanager
def environment_folder(keep: bool) -> Iterator[Path]:
    """Make a temporary folder, removed at the end unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="ogpsa-matrix-"))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}", flush=True)
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
