"""The alignment-tax lab: the paper's comparison and ablations of what it leaves open, in miniature.

    python -m lab            # all of lab.yaml; writes docs/results.md and its pictures
    python -m lab --quick    # one seed, fewer methods, no studies; writes outputs/lab/quick

Every training is `llamafactory-cli train` on a YAML that is left beside its result and can be run by hand; to save the
start-up, the function behind the command is called in a process forked from one that has LLaMA-Factory imported. A
finished run is never repeated: an interrupted lab goes on where it stopped.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from . import ROOT, report
from .plan import Plan
from .tiny import lab_data, model
from .train import make_run


HERE = Path(__file__).resolve().parent


def data_key(files):
    """Hash the data sets and what the untrained model is made by."""
    source = Path(model.__file__).read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([files, source], sort_keys=True).encode()).hexdigest()


def prepare(plan, files, lab_dir):
    """Write the data sets and the untrained models, unless those there are the same."""
    folder = Path(lab_dir)
    stamp, models = folder / "data_key.txt", {seed: folder / f"init-seed{seed}" for seed in plan.bases}
    if stamp.is_file() and stamp.read_text() == plan.data_key and all(path.is_dir() for path in models.values()):
        return
    stamp.unlink(missing_ok=True)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / "data" / name).write_text(text, encoding="utf-8")
    for seed, path in models.items():
        model.main([str(path), "--data-dir", str(folder / "data"), "--seed", str(seed)])
    stamp.write_text(plan.data_key)


def make_all(runs, lab_dir, jobs):
    """Make the runs that are not finished, each after those it needs.

    Args:
        runs: The runs of the plan; parents come before what needs them.
        lab_dir: The lab's folder.
        jobs: Runs made at once.

    Raises:
        RuntimeError: A run failed. Those that were going on are finished first.
    """
    waiting = [run for run in runs if not (Path(lab_dir) / run.folder / "result.json").is_file()]
    unfinished = {run.folder for run in waiting}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["llamafactory.train.tuner", "llamafactory.train.sft.workflow", "matplotlib.pyplot"]
    )
    going = {}
    with (
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="lab", unit="run", smoothing=0) as progress,
    ):
        while waiting or going:
            ready = [run for run in waiting if not any(parent.folder in unfinished for parent in run.parents)]
            for run in ready[: jobs - len(going)]:
                waiting.remove(run)
                going[pool.submit(make_run, run, lab_dir)] = run
            done, _ = wait(going, return_when=FIRST_COMPLETED)
            for future in done:
                run = going.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as err:
                    folders = ", ".join(str(Path(lab_dir) / other.folder) for other in (run, *going.values()))
                    raise RuntimeError(f"A process was killed, perhaps for its memory. Unfinished: {folders}") from err
                unfinished.remove(run.folder)
                progress.set_postfix_str(run.folder.split("/")[1])
                progress.update()


def main(argv=None):
    """Run the lab.

    Args:
        argv: Command-line arguments, `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(description="Compare OGPSA with its alternatives, in miniature.")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer methods, no studies")
    parser.add_argument("--plan", type=Path, default=HERE / "lab.yaml", help="the list of runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs made at once, one thread each")
    parser.add_argument("--lab-dir", default="outputs/lab", help="where the runs are")
    parser.add_argument("--output", type=Path, help="folder of results.md and the pictures")
    args = parser.parse_args(argv)

    os.chdir(ROOT)
    # One thread a run: more bring next to nothing for so small a model, and the sums are the same in every run.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    files = lab_data.render()
    plan = Plan(args.plan, data_key(files), args.quick)
    prepare(plan, files, args.lab_dir)
    make_all(list(plan.runs.values()), args.lab_dir, args.jobs)
    output = args.output or Path(f"{args.lab_dir}/quick" if args.quick else "docs")
    path = report.write(plan, args.lab_dir, output)
    print(f"The results are in {path}.")


if __name__ == "__main__":
    main()
