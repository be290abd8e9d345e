"""Show the alignment tax on a real model, and OGPSA's answer to it, with stock `llamafactory-cli train` only.

Takes SmolLM2-135M-Instruct from its Python package, tunes it for safety naively (to the end, and stopped early) and
with OGPSA, lets the base and the tuned models answer held-out prompts, prints the table and the answers side by side,
and leaves in `outputs/demo/` the picture `demo.png`, the answers `answers.md`, the figures `results.json` and the log
of every run.

    python -m lab.demo
    python -m lab.demo --model Qwen/Qwen2.5-0.5B-Instruct --template qwen    # any other model, from hub or folder
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

from rich import box
from rich.table import Table
from transformers.utils import logging

from . import ROOT, base_model, demo_plot
from .generate import prompt_of
from .launch import console, train, write_whole
from .score import read_sets, score_checkpoint, score_table


DEMO_DIR = ROOT / "outputs" / "demo"
# By title: the output folder's name, the YAML, and options that replace the YAML's.
RUNS = {
    "naive SFT": ("naive_sft", "examples/yaml/demo_naive_sft.yaml", ()),
    "naive, 5 steps": ("naive_sft_short", "examples/yaml/demo_naive_sft.yaml", ("max_steps=5",)),
    "OGPSA SFT": ("ogpsa_sft", "examples/yaml/demo_ogpsa_sft.yaml", ()),
}
PROMPTS_SCORED, PROMPTS_SHOWN = 50, 3  # of each of the four sets, the first ones
# More than one GPU would change the batch.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false"}


def score_base(sets):
    """Score the base model, or read its scores if the same model has answered the same prompts before.

    Args:
        sets: The held-out records by set name.

    Returns:
        What `score_checkpoint` returns.
    """
    sources = [(Path(__file__).with_name(name)).read_text(encoding="utf-8") for name in ("score.py", "generate.py")]
    source = (DEMO_DIR / "base" / "source.txt").read_text(encoding="utf-8")
    key = hashlib.sha256(json.dumps([sets, source, sources]).encode()).hexdigest()
    path = DEMO_DIR / "base_scores.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            console.print("base: has answered these prompts before")
            return kept["result"]
    result = score_checkpoint(DEMO_DIR / "base", sets, "base")
    write_whole(path, json.dumps({"key": key, "result": result}, ensure_ascii=False))
    return result


def side_by_side(sets, results):
    """Collect what the models answer to the first prompts of every set.

    Args:
        sets: The held-out records by set name.
        results: What `score_checkpoint` returned, by model.

    Returns:
        List of (set name, prompt, answers by model).
    """
    return [
        (name, prompt_of(rec), {title: result["answers"][name][index] for title, result in results.items()})
        for name, records in sets.items()
        for index, rec in enumerate(records[:PROMPTS_SHOWN])
    ]


def answers_table(rows):
    """Lay the answers out as a rich table, one row per prompt."""
    table = Table(title="What they answer (the first tokens)", box=box.HORIZONTALS, show_lines=True)
    for column in ("prompt", *rows[0][2]):
        table.add_column(column, ratio=1, overflow="fold")
    for _, prompt, answers in rows:
        table.add_row(*(" ".join(text.split()).replace("[", r"\[") for text in (prompt, *answers.values())))
    return table


def answers_markdown(rows):
    """Write the answers as a Markdown table."""

    def cell(text):
        return text.replace("|", r"\|").replace("\n", "<br>")

    header = ["set", "prompt", *rows[0][2]]
    lines = [header, ["---"] * len(header), *([name, prompt, *answers.values()] for name, prompt, answers in rows)]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)


def main(argv=None):
    """Run the demonstration.

    Args:
        argv: Command-line arguments, `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(description="The alignment tax and OGPSA on a real model.")
    parser.add_argument("--model", help="folder or hub name of another model than SmolLM2 from its package")
    parser.add_argument("--template", help="LLaMA-Factory's template of that model")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.template):
        parser.error("--model and --template go together: the template must be the model's own")
    overrides = [f"template={args.template}", "default_system=null"] if args.model else []

    start = time.time()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    DEMO_DIR.mkdir(parents=True, exist_ok=True)
    console.print("base model: outputs/demo/base")
    base_model.prepare(DEMO_DIR / "base", args.model)
    folders = {title: DEMO_DIR / name for title, (name, _, _) in RUNS.items()}
    seconds = {
        title: train(
            title,
            config,
            DEMO_DIR / f"demo_{name}.log",
            ENVIRONMENT,
            [*overrides, *changes, f"output_dir=outputs/demo/{name}"],
        )
        for title, (name, config, changes) in RUNS.items()
    }

    sets = read_sets(limit=PROMPTS_SCORED)
    results = {"base": score_base(sets)}
    for title, folder in folders.items():
        results[title] = score_checkpoint(folder, sets, title)
    rows = side_by_side(sets, results)
    write_whole(DEMO_DIR / "answers.md", answers_markdown(rows))
    scores = {title: result["scores"] for title, result in results.items()}
    demo_plot.draw(scores, folders, DEMO_DIR / "demo.png")
    figures = {
        "scores": scores,
        "train_seconds": {title: round(value, 1) for title, value in seconds.items()},
        "seconds": round(time.time() - start, 1),
    }
    write_whole(DEMO_DIR / "results.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    console.print(answers_table(rows))
    console.print(score_table(results))
    console.print(f"{figures['seconds']:.0f} s in all; picture, answers and figures: outputs/demo/")


if __name__ == "__main__":
    main()
