"""What was measured: one JSON object a line, written the moment its case is done, so that a run can go on later."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


NAME = "rows.jsonl"

# `part`, `case` (what was measured), `environment`, `date` (UTC), `seconds` that it took, and one of `figures`,
# `skipped` (why the case cannot run here) and `error`.
Row = dict[str, Any]


def append(folder: Path, row: Row) -> None:
    """Add a row to a folder's file, on a line of its own even after one that a killed run left unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    unfinished = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * unfinished + json.dumps(row, ensure_ascii=False) + "\n")


def read(file: Path) -> list[Row]:
    """Return the rows of a file, one a case as in `latest`; none where there is no file.

    A line that a killed run left unfinished is dropped.
    """
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return latest(found)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each case; one without figures does not replace one that has them."""
    found: dict[str, Row] = {}
    for row in rows:
        name = key(row["part"], row["case"])
        if is_done(row) or name not in found or not is_done(found[name]):
            found[name] = row
    return list(found.values())


def key(part: str, case: dict[str, Any]) -> str:
    """Return what tells a case from all others."""
    return json.dumps([part, case], sort_keys=True)


def is_done(row: Row) -> bool:
    """Return whether a case need not be run again: it has figures."""
    return "figures" in row
