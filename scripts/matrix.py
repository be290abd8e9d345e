"""Try the kernels' and the end-to-end tests in environments of other versions, and write the table of docs/compatibility.md.

    python scripts/matrix.py [--only NAME ...] [--keep]

Each environment is built from nothing in a temporary folder, a few minutes and some GiB each. An environment whose
Python is not on this machine is left as the table has it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = ["tests/test_autoload.py", "tests/kernels", "tests/plugin"]
BEGIN, END = "<!-- table: scripts/matrix.py -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Environment:
    """One row of the table; `requirements` are those that pip is held to, beside the package's own."""

    name: str
    python: str
    requirements: tuple[str, ...]


TORCH = {"2.11": ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")}
TORCH["2.6"] = ("torch==2.6.0", "torchvision==0.21.0", "torchaudio==2.6.0")
ENVIRONMENTS = [
    Environment(
        f"py{python} lf{factory} tf{transformers} torch{torch}",
        python,
        (f"llamafactory=={factory}", f"transformers=={transformers}", *TORCH[torch]),
    )
    for python, factory, transformers, torch in [
        ("3.11", "0.9.5", "5.6.0", "2.11"),
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


def try_environment(environment: Environment, python: str, folder: Path) -> str:
    """Build an environment with an interpreter and run the tests in it; return the result in words."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    packages = ["pytest", "pytest-timeout", "hypothesis", "scipy", "-e", str(ROOT)]
    installed = subprocess.run([*pip, *environment.requirements, *packages], capture_output=True, text=True)
    if installed.returncode != 0:
        return f"cannot be installed: {last_line(installed.stdout, installed.stderr, installed.returncode)}"

    report = folder / "report.xml"
    process = subprocess.run(
        [folder / "bin" / "python", "-m", "pytest", *TESTS, f"--junitxml={report}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if not report.exists():
        return f"the tests do not start: {last_line(process.stderr, process.stdout, process.returncode)}"
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    passed = int(suite.get("tests")) - failed - int(suite.get("skipped"))
    for case in suite.iter("testcase") if failed else ():
        if case.find("failure") is not None or case.find("error") is not None:
            print(f"  failed: {case.get('classname')}::{case.get('name')}", file=sys.stderr)
    return f"{passed} passed, {failed} failed, {suite.get('skipped')} skipped"


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
    """Try the environments one after another; the page is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[item.name for item in ENVIRONMENTS], metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they were built")
    options = parser.parse_args()
    unknown = set(options.only) - {item.name for item in ENVIRONMENTS}
    if unknown:
        parser.error(f"--only has {min(unknown)!r}; allowed: {', '.join(item.name for item in ENVIRONMENTS)}")

    results = read_table()
    for environment in ENVIRONMENTS:
        if environment.name not in options.only:
            continue
        python = find_python(environment.python)
        if python is None:
            print(f"{environment.name}: python{environment.python} is not here", flush=True)
            continue
        folder = Path(tempfile.mkdtemp(prefix="ogpsa-matrix-"))
        try:
            results[environment.name] = try_environment(environment, python, folder)
        finally:
            if not options.keep:
                shutil.rmtree(folder)
        print(f"{environment.name}: {results[environment.name]}", flush=True)
        write_table(results)


if __name__ == "__main__":
    main()
