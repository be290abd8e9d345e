"""Make the runs of a plan, several at once, each after those it needs."""

import multiprocessing
import shutil
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from .train import make_run


def is_finished(run, lab_dir):
    """Return whether a run has left its result."""
    return (Path(lab_dir) / run.folder / "result.json").is_file()


def find_waiting(runs, lab_dir):
    """Find the runs to make: those without a result, and the runs that they start from whose weights are gone.

    Args:
        runs: The runs of the plan; parents come before what needs them.
        lab_dir: The lab's folder.

    Returns:
        The runs, in the plan's order.
    """
    waiting, needed = set(), set()
    for run in reversed(runs):
        gone = not list((Path(lab_dir) / run.model).glob("*.safetensors"))
        if not is_finished(run, lab_dir) or (run.folder in needed and gone):
            waiting.add(run.folder)
            needed |= {parent.folder for parent in run.parents}
    return [run for run in runs if run.folder in waiting]


def make_all(runs, lab_dir, jobs, score, threads=None, keep_models=True):
    """Make the runs that are not finished, each after those it needs.

    Args:
        runs: The runs of the plan; parents come before what needs them.
        lab_dir: The lab's folder.
        jobs: Runs made at once.
        score: Function of a model's folder and the data folder that returns the scores.
        threads: Threads of each run; None for as many as PyTorch takes.
        keep_models: Whether weights stay when all runs that need them are finished.

    Raises:
        RuntimeError: A run failed. Those that were going on are finished first.
    """
    waiting = find_waiting(runs, lab_dir)
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
                going[pool.submit(make_run, run, lab_dir, score, threads)] = run
            done, _ = wait(going, return_when=FIRST_COMPLETED)
            for future in done:
                run = going.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as err:
                    folders = ", ".join(str(Path(lab_dir) / other.folder) for other in (run, *going.values()))
                    raise RuntimeError(f"A process was killed, perhaps for its memory. Unfinished: {folders}") from err
                unfinished.remove(run.folder)
                if not keep_models:
                    remove_models(runs, unfinished, lab_dir)
                progress.set_postfix_str(run.folder.split("/")[1])
                progress.update()


def remove_models(runs, unfinished, lab_dir):
    """Remove the weights of finished runs that no unfinished run starts from.

    Args:
        runs: The runs of the plan.
        unfinished: Folders of those that are not finished.
        lab_dir: The lab's folder.
    """
    needed = {parent.folder for run in runs if run.folder in unfinished for parent in run.parents}
    for run in runs:
        if run.folder in unfinished or run.folder in needed or run.given:
            continue
        for path in (Path(lab_dir) / run.folder).glob("*/*.safetensors"):
            path.unlink()
        shutil.rmtree(Path(lab_dir) / run.folder / "model", ignore_errors=True)
