"""Run the stock command line, with its progress in one line; write files whole."""

import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from llamafactory_ogpsa.files import replacing

from . import ROOT


# The training bar; bars that count something else begin with what they count.
STEP_BAR = re.compile(rb"^\s*\d+%\|[^|]*\| (\d+)/(\d+) \[")

console = Console()


def progress_bar(unit):
    """Make a progress display that counts in the given unit."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
        TimeElapsedColumn(),
        console=console,
    )


def write_whole(path, text):
    """Write a file, and make its folder if needed, so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def save_picture(figure, path, dpi):
    """Write a matplotlib figure as PNG, so that it is never seen half written, and close it."""
    import matplotlib.pyplot as plt  # here, because pictures choose the backend before they import it

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)


def train(title, config, log_path, environment, overrides=()):
    """Run `llamafactory-cli train` on a YAML, its progress in one line, its output in a log.

    Args:
        title: What to call the run.
        config: The YAML, relative to the repository.
        log_path: The log to write.
        environment: Variables to set, unless the environment sets them already.
        overrides: Options that replace the YAML's, each `name=value`.

    Returns:
        Seconds it took.

    Raises:
        SystemExit: If the run fails; the end of its output is printed first.
    """
    start = time.time()
    command = [str(Path(sys.executable).with_name("llamafactory-cli")), "train", str(config), *overrides]
    last_lines = deque(maxlen=60)
    with (
        open(log_path, "wb") as log,
        progress_bar("steps") as progress,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        bar = progress.add_task(f"{title:<16}", total=0)
        rest = b""
        while chunk := process.stdout.read1(65536):
            log.write(chunk)
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            for line in lines:
                if match := STEP_BAR.match(line):
                    progress.update(bar, completed=int(match[1]), total=int(match[2]))
                elif line.strip():
                    last_lines.append(line.decode(errors="replace"))
    if process.returncode:
        console.print("\n".join(last_lines), markup=False, highlight=False)
        command_line = " ".join(["llamafactory-cli", *command[1:]])
        sys.exit(f"`{command_line}` failed with exit status {process.returncode}; its output is in {log.name}")
    return time.time() - start
