"""Measure on this machine's GPU what docs/performance.md and docs/distributed.md have tables for, and write them.

    python -m benchmarks.gpu                        # all parts, in this order
    python -m benchmarks.gpu accuracy projection    # some
    python -m benchmarks.gpu --pretend              # all on the CPU, tiny: only to try the code
    python -m benchmarks.gpu --write                # only the tables, from the rows in OUTPUT and docs/gpu

A part has nine minutes; every case that is done is a line of OUTPUT/rows.jsonl at once. The same command again goes on
with the cases that have no figures yet, so it may be stopped at any time. After a change of the code, or on another
device, give another --output. Needs PyTorch, Triton, transformers, peft and matplotlib, no network, and no installation
of this project (PYTHONPATH=.); parts that need more are skipped, and say what.
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..devices import default_device, environment
from . import rows, tables, write
from .parts import PARTS, PRETENDED, REAL, ROOT, Run, attempt


SECONDS = 540
OTHER_DEVICE = 3


def run_part(name: str, folder: Path, pretend: bool) -> int:
    """Measure the cases of a part that have no figures yet, in this process; return an exit code.

    Args:
        name: a name of `PARTS`.
        folder: where the rows go.
        pretend: on the CPU, with tiny sizes.

    Returns:
        0; 1 where a case failed; `OTHER_DEVICE` where the folder holds rows of another device or other versions.
    """
    device = torch.device("cpu") if pretend else default_device()
    here = {**environment(device), "pretended": pretend}
    known = rows.read(folder / rows.NAME)
    if any(row["environment"] != here for row in known):
        print(f"{folder} has rows of another device or other versions: give another --output.", file=sys.stderr)
        return OTHER_DEVICE
    done = {rows.key(row["part"], row["case"]) for row in known if rows.is_done(row)}
    failed = False
    for number, case in enumerate(PARTS[name].cases, 1):
        title = f"{name} {number}/{len(PARTS[name].cases)}: {', '.join(map(str, case.values()))}"
        if rows.key(name, case) in done:
            print(f"{title}: done before", flush=True)
            continue
        print(title, flush=True)
        start = time.perf_counter()
        result = attempt(name, case, Run(device, PRETENDED if pretend else REAL))
        row = {
            "part": name,
            "case": case,
            **result,
            "seconds": round(time.perf_counter() - start, 1),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "environment": here,
        }
        rows.append(folder, row)
        failed |= "error" in result
        print(f"  {summary(name, result)}", flush=True)
    return int(failed)


def summary(name: str, result: dict[str, Any]) -> str:
    """Return what came of a case, in one line, as its table will have it."""
    if "figures" not in result:
        return next(f"{kind}: {text}" for kind, text in result.items())
    if name not in tables.TABLES:
        return "done"
    layout = tables.TABLES[name]
    return "; ".join(f"{head}: {cell}" for head, cell in zip(layout.heads, layout.cells(result["figures"])))


def start_part(name: str, folder: Path, pretend: bool) -> int:
    """Run a part in a process of its own, with all that it starts; end it after nine minutes. Return its exit code."""
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--worker", "--output", str(folder)]
    variables = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    if pretend:
        command.append("--pretend")
        variables |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        code = process.wait(SECONDS)
        if code < 0:
            print(f"{name}: ended by signal {-code}; the same command tries the rest again.", flush=True)
        return code
    except subprocess.TimeoutExpired:
        print(f"{name}: nine minutes are over; the same command goes on where it stopped.", flush=True)
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Run the parts, print what there is of each, and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"from {', '.join(PARTS)}; all where none is given")
    parser.add_argument(
        "--output", type=Path, help="where the rows go; outputs/gpu, or outputs/gpu-pretended with --pretend"
    )
    parser.add_argument("--pretend", action="store_true", help="try the code on the CPU")
    parser.add_argument("--write", action="store_true", help="only write the tables, from the rows in --output")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    folder = options.output or Path("outputs/gpu-pretended" if options.pretend else "outputs/gpu")
    if options.worker:
        sys.exit(max(run_part(name, folder, options.pretend) for name in options.parts))

    codes = {}
    if not options.write:
        if not options.pretend and not torch.cuda.is_available():
            parser.error("PyTorch finds no CUDA or ROCm device here; --pretend tries the code on the CPU")
        for name in options.parts or PARTS:
            codes[name] = start_part(name, folder, options.pretend)
            if codes[name] == OTHER_DEVICE:
                sys.exit(1)
    # Pretended figures are not for docs/.
    measured = [row for row in rows.read(folder / rows.NAME) if row["environment"]["pretended"] == options.pretend]
    for name, part in PARTS.items():
        count = sum(rows.is_done(row) for row in measured if row["part"] == name)
        print(f"{name}: {count} of {len(part.cases)} cases measured")
    for page in write.write(measured, folder if options.pretend else write.DOCS):
        print(f"written: {page}")
    sys.exit(int(any(codes.values())))


if __name__ == "__main__":
    main()
