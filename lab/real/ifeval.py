"""IFEval (arXiv 2311.07911) by lm-evaluation-harness: the share of answers that follow all their instructions."""

import importlib.util
import json
import subprocess
from pathlib import Path

import yaml

from llamafactory_ogpsa.recipes.evaluate import harness_command


FILE = "ifeval.jsonl"  # in the data folder of a lab that measures it
TASK = "lab_ifeval"
MAX_NEW_TOKENS = 256  # the harness's own 1280 would take hours per model on a CPU
PACKAGES = ("lm_eval", "langdetect", "immutabledict", "nltk")
# These count sentences or words with NLTK's tokeniser, which downloads a file: their prompts are left out.
NEED_PUNKT = {
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
}


def read_prompts(entry, folder):
    """Read the prompts that a plan asks for.

    Args:
        entry: `file`, IFEval's published `input_data.jsonl`, and `count`, how many of its prompts, the first ones that
            need no download.
        folder: Folder that the file's path starts from.

    Returns:
        The lines as one text; None if the file is not there.

    Raises:
        ValueError: The entry is wrong, a line is not a prompt, or the file holds too few prompts.
    """
    if entry.keys() != {"file", "count"}:
        raise ValueError(f"ifeval has {sorted(entry)}; needed are file and count.")
    path = Path(folder) / entry["file"]
    if not path.is_file():
        return None
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            instructions = json.loads(line)["instruction_id_list"]
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(f"{path}, line {number}, is not a prompt of IFEval: no instruction_id_list.") from err
        if NEED_PUNKT.isdisjoint(instructions):
            lines.append(line)
    if not 0 < entry["count"] <= len(lines):
        raise ValueError(f"ifeval asks for {entry['count']} prompts; {path} has {len(lines)} that need no download.")
    return "\n".join(lines[: entry["count"]]) + "\n"


def find_missing(path):
    """Say what is missing here to score the prompts of a file.

    Args:
        path: The prompts.

    Returns:
        What is missing, as text; None if nothing is.
    """
    if not path.is_file():
        return "its prompts"
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            return f"the package {name} (pip install 'lm_eval[hf,ifeval]')"
    return None


def write_task(folder, prompts):
    """Write a task of the harness: its own IFEval, on local prompts.

    Args:
        folder: Folder of the task's file.
        prompts: The prompts' file.
    """
    package = Path(importlib.util.find_spec("lm_eval").origin).parent
    task = {
        "include": str(package / "tasks" / "ifeval" / "ifeval.yaml"),
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(prompts.resolve())}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def measure(model, data_dir, max_new_tokens=MAX_NEW_TOKENS):
    """Let a model answer IFEval's prompts and score them strictly.

    Args:
        model: Folder of a full model.
        data_dir: Folder of the lab's data.
        max_new_tokens: Longest answer.

    Returns:
        The share of prompts, between 0 and 1; None, with the reason on stdout, if it cannot be measured here.

    Raises:
        CalledProcessError: The harness failed.
    """
    prompts = Path(data_dir) / FILE
    if missing := find_missing(prompts):
        print(f"IFEval is not measured: {missing} is not there.", flush=True)
        return None
    folder = Path(model).parent / f"{Path(model).name}_ifeval"
    write_task(folder, prompts)
    extra = ["--include_path", str(folder), "--batch_size", "8", "--gen_kwargs", f"max_gen_toks={max_new_tokens}"]
    command = harness_command(str(model), None, str(folder / "results"), TASK, {}, extra)
    subprocess.run(command, check=True)
    newest = max(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text(encoding="utf-8"))["results"][TASK]["prompt_level_strict_acc,none"]
