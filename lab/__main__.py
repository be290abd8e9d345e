"""The alignment-tax lab: the paper's comparison and ablations of what it leaves open.

    python -m lab                   # a small language and model: all of lab/tiny/lab.yaml; writes docs/results.md
    python -m lab --quick           # one seed, fewer methods, no studies; writes outputs/lab/quick
    python -m lab --real            # a real model: all of lab/real/lab.yaml; writes docs/results-real.md
    python -m lab --real --quick    # one seed, fewer methods, SFT alone; writes outputs/lab_real/quick

Every training is `llamafactory-cli train` on a YAML that is left beside its result and can be run by hand; to save the
start-up, the function behind the command is called in a process forked from one that has imported LLaMA-Factory. A
finished run is never repeated: an interrupted lab goes on where it stopped.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

from . import ROOT
from .plan import Plan
from .real import lab as real
from .runs import make_all
from .tiny import lab as tiny


def main(argv=None):
    """Run the lab.

    Args:
        argv: Command-line arguments, `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(description="Compare OGPSA with its alternatives.")
    parser.add_argument("--real", action="store_true", help="a real model in place of the small language")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer methods, no studies")
    parser.add_argument("--plan", type=Path, help="another list of runs than the lab's own")
    parser.add_argument("--data", help="with --real: which of the plan's data sets, by its name there (own)")
    parser.add_argument("--raw", type=Path, help="with --real: folder of raw data files, for data that are not `own`")
    parser.add_argument("--jobs", type=int, help="runs made at once; small ones have one thread each")
    parser.add_argument("--lab-dir", help="where the runs are")
    parser.add_argument("--output", type=Path, help="folder of the results and the pictures")
    args = parser.parse_args(argv)
    for name in ("data", "raw"):
        if getattr(args, name) is not None and not args.real:
            parser.error(f"--{name} goes with --real; the small language has one choice of data")

    os.chdir(ROOT)
    kind = real if args.real else tiny
    lab_dir = args.lab_dir or kind.LAB_DIR
    os.environ |= kind.ENVIRONMENT
    path = args.plan or kind.PLAN
    files, source = kind.read(path, args.data or "own", args.raw)
    key = hashlib.sha256(json.dumps([files, source], sort_keys=True).encode()).hexdigest()
    plan = Plan(path, key, args.quick)
    kind.prepare(plan, files, lab_dir)
    jobs = args.jobs or kind.JOBS
    make_all(list(plan.runs.values()), lab_dir, jobs, kind.score, kind.THREADS, kind.KEEP_MODELS)
    output = args.output or Path(f"{lab_dir}/quick" if args.quick else "docs")
    print(f"The results are in {kind.write(plan, lab_dir, output)}.")


if __name__ == "__main__":
    main()
