"""The lab in miniature: its data, its untrained models, and how it scores."""

import os
from pathlib import Path

from .. import report
from . import lab_data, model
from .score import score_checkpoint as score


__all__ = ["score"]
PLAN = Path(__file__).with_name("lab.yaml")
LAB_DIR = "outputs/lab"
# One thread per run: more hardly help such a small model, and so the sums are the same in every run.
THREADS, JOBS, KEEP_MODELS = 1, os.cpu_count(), True
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
write = report.write


def read(path, data, raw):
    """Make the data sets.

    Args:
        path: The plan's file; not used, as the data are the same for all plans.
        data: Not used: there is one choice of data.
        raw: Not used.

    Returns:
        The files' texts by name, and the source of the untrained model.
    """
    return lab_data.render(), Path(model.__file__).read_text(encoding="utf-8")


def prepare(plan, files, lab_dir):
    """Write the data sets and the untrained models, unless those there are the same.

    Args:
        plan: The plan.
        files: The files' texts by name.
        lab_dir: The lab's folder.
    """
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
