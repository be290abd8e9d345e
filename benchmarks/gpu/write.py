"""Write the tables of docs/ that hold a GPU's figures, between their markers, from the rows that were measured."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import rows as store
from . import tables, targets
from .rows import Row


DOCS = Path(__file__).resolve().parents[2] / "docs"
# The regions of each page. What was measured is kept beside them, so that the tables can be written again.
PAGES = {
    "performance.md": (
        "targets",
        "tests",
        "projection",
        "scopes",
        "launches",
        "accuracy",
        "memory",
        "training",
        "streaming",
    ),
    "distributed.md": ("distributed",),
}
KEPT = "gpu"
_REGION = re.compile(r"(<!-- gpu: (\w+) -->\n).*?(<!-- gpu: end -->)", re.DOTALL)


def write(measured: Sequence[Row], folder: Path) -> list[Path]:
    """Write both pages of docs/ into a folder, with these rows and those kept there, and keep them.

    Args:
        measured: the rows; they replace those of the same cases that the folder keeps.
        folder: docs/ itself, or another.

    Returns:
        the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / KEPT / store.NAME
    measured = store.latest([*store.read(kept), *measured])
    written = []
    for page in PAGES:
        path = folder / page
        path.write_text(fill((DOCS / page).read_text(encoding="utf-8"), measured), encoding="utf-8")
        written.append(path)
    kept.unlink(missing_ok=True)
    for row in measured:
        store.append(kept.parent, row)
    return [*written, kept] if measured else written


def fill(page: str, measured: Sequence[Row]) -> str:
    """Return a page with every region written anew from these rows."""
    return _REGION.sub(lambda match: f"{match[1]}{region(match[2], measured)}\n{match[3]}", page)


def region(name: str, measured: Sequence[Row]) -> str:
    """Return a region: a caption that says what was measured on and when, and the table."""
    parts = ("projection", "launches", "accuracy") if name == "targets" else (name,)
    table = targets.table(measured) if name == "targets" else tables.table(name, measured)
    return f"{caption(parts, [row for row in measured if row['part'] in parts])}\n\n{table}"


def caption(parts: Sequence[str], measured: Sequence[Row]) -> str:
    """Return the command of some rows, the dates, and the device, driver and versions, each of them if they differ."""
    command = f"`python -m benchmarks.gpu {' '.join(parts)}`"
    if not measured:
        return f"{command}: not measured."
    dates = sorted({row["date"] for row in measured})
    machines = dict.fromkeys(_machine(row["environment"]) for row in measured)
    return f"{command}: {'; and '.join(machines)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def _machine(environment: dict[str, Any]) -> str:
    versions = ("python", "torch", "triton", "transformers", "accelerate", "peft", "llamafactory", "deepspeed")
    known = [
        ("pretended, on a CPU: " if environment["pretended"] else "") + environment["device"],
        f"driver {environment['driver']}" if environment["driver"] else None,
        environment["runtime"],
        *(f"{name} {environment[name]}" for name in versions if environment[name]),
    ]
    return ", ".join(filter(None, known))
