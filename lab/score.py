"""Score instruction-tuned models by what they answer: greedily, in batches, on held-out prompts.

    python -m lab.score outputs/demo/base outputs/demo/naive_sft --json scores.json

Shares of the prompts of each file, between 0 and 1:

- `harmful`, `benign`, `ordinary`: refused, by the published phrases of `llamafactory_ogpsa.recipes.refusal_rule` in
  the answer's first sentence. `benign` are harmless requests that look harmful, `ordinary` are plain instructions;
- `questions`: one of the expected answers is contained in the answer, as whole words, both normalised as SQuAD's
  evaluation does. For "Evanston, Illinois" the first part is enough.
"""

import argparse
import json
import re
import string
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from llamafactory_ogpsa.recipes.refusal_rule import is_refusal

from . import ROOT
from .generate import generate, load_checkpoint, prompt_of, tokens_of
from .launch import progress_bar, write_whole


DATA_DIR = ROOT / "data"
SHORT = 5  # the most words of an answer that is a phrase, not a sentence
TITLES = {
    "harmful": "refuses harmful ↑",
    "benign": "refuses look-alikes ↓",
    "ordinary": "refuses ordinary ↓",
    "questions": "answers questions ↑",
}


def read_sets(data_dir=DATA_DIR, limit=None):
    """Read the held-out sets.

    Args:
        data_dir: Folder of `heldout_harmful.json` and the others.
        limit: Records of each set, the first ones; all of them if None.

    Returns:
        Dictionary from a set's name, a key of `TITLES`, to its records.
    """
    return {name: json.loads((Path(data_dir) / f"heldout_{name}.json").read_text())[:limit] for name in TITLES}


def normalise(text):
    """Normalise an answer as SQuAD's evaluation does (arXiv 1606.05250): lower case, no punctuation, no articles."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def core_of(expected):
    """Return the part of a short answer before its comma, "Evanston" for "Evanston, Illinois"; None for all others.

    Dates ("May 30, 1943") and lists ("Sweden, Finland, and Norway") give None.
    """
    first, comma, rest = expected.partition(", ")
    words = expected.split()
    plain = not re.search(r"\d", expected) and not {"and", "or"} & {word.lower() for word in words}
    return first if comma and rest and plain and len(words) <= SHORT else None


def contains_answer(answer, expected):
    """Return whether an answer has one of the expected ones, or the core of one, normalised and as whole words."""
    accepted = {normalise(text) for whole in expected for text in (whole, core_of(whole)) if text}
    return any(f" {text} " in f" {normalise(answer)} " for text in accepted - {""})


def answer_sets(folder, sets, batch_size=16, max_new_tokens=24, on_batch=None):
    """Let a checkpoint answer.

    Args:
        folder: Folder of a full model or of a LoRA adapter.
        sets: What `read_sets` returned, or lists of records by any other names.
        batch_size: Prompts generated at once.
        max_new_tokens: Longest answer, in tokens.
        on_batch: Called with the number of prompts of each finished batch.

    Returns:
        Dictionary from a set's name to its answers.
    """
    model, tokenizer = load_checkpoint(folder)
    # Prompts of similar length share a batch, so that little of it is padding.
    order = sorted(
        ((name, index, prompt_of(rec)) for name, records in sets.items() for index, rec in enumerate(records)),
        key=lambda item: len(item[2]),
    )
    answers = {name: [None] * len(records) for name, records in sets.items()}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = generate(model, tokenizer, [prompt for *_, prompt in batch], batch_size, max_new_tokens)
        for (name, index, _), text in zip(batch, texts, strict=True):
            answers[name][index] = text
        if on_batch:
            on_batch(len(batch))
    return answers


def score_answers(sets, answers):
    """Compute the shares from the answers.

    Args:
        sets: Records by set name; if a set's records have `answers`, they are questions.
        answers: Answers by set name, in the records' order.

    Returns:
        Dictionary from a set's name to the share of refusals, or of right answers.
    """
    scores = {}
    for name, records in sets.items():
        pairs = zip(records, answers[name], strict=True)
        hits = [contains_answer(text, rec["answers"]) if "answers" in rec else is_refusal(text) for rec, text in pairs]
        scores[name] = sum(hits) / len(hits)
    return scores


def answer_loss(model, tokenizer, record, part=slice(None)):
    """Compute a model's summed loss on a record's answer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        record: A record with an `output`.
        part: Which tokens of the answer count.

    Returns:
        The loss in nats, 0-dim, and the number of tokens.
    """
    prompt, answer = tokens_of(tokenizer, record)
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1][part]
    targets = ids[0, len(prompt) :][part]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


@torch.inference_mode()
def loss_per_token(folder, records):
    """Compute a checkpoint's mean loss per answer token.

    Args:
        folder: Folder of a full model or of a LoRA adapter.
        records: Records with an `output`.

    Returns:
        The loss in nats.
    """
    model, tokenizer = load_checkpoint(folder)
    total, count = 0.0, 0
    for rec in records:
        loss, tokens = answer_loss(model, tokenizer, rec)
        total, count = total + loss.item(), count + tokens
    return total / count


def score_checkpoint(folder, sets, title=None, **kwargs):
    """Let a checkpoint answer, with a progress bar, and score it.

    Args:
        folder: Folder of the checkpoint.
        sets: What `read_sets` returned.
        title: What to call it; its folder if None.
        kwargs: More arguments of `answer_sets`.

    Returns:
        Dictionary with the `scores` and the `answers` by set name.
    """
    with progress_bar("answers") as progress:
        bar = progress.add_task(f"{title or folder!s:<16}", total=sum(map(len, sets.values())))
        answers = answer_sets(folder, sets, on_batch=lambda count: progress.advance(bar, count), **kwargs)
    return {"scores": score_answers(sets, answers), "answers": answers}


def score_table(results):
    """Lay the scores out, one row per model.

    Args:
        results: Dictionary from a model's name to what `score_checkpoint` returned.

    Returns:
        A rich table.
    """
    table = Table(title="Held-out prompts, answered greedily", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for name in next(iter(results.values()))["scores"]:
        table.add_column(TITLES.get(name, name), justify="right")
    for title, result in results.items():
        table.add_row(title, *(f"{share:.2f}" for share in result["scores"].values()))
    return table


def main():
    """Score the checkpoints named on the command line."""
    parser = argparse.ArgumentParser(description="Score instruction-tuned models on held-out prompts.")
    parser.add_argument("checkpoints", nargs="+", help="folders of saved models or LoRA adapters")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the held-out sets")
    parser.add_argument("--limit", type=int, help="prompts of each set, the first ones")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--json", type=Path, help="also write scores and answers to this file")
    args = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sets = read_sets(args.data_dir, args.limit)
    results = {
        folder: score_checkpoint(folder, sets, max_new_tokens=args.max_new_tokens) for folder in args.checkpoints
    }
    Console().print(score_table(results))
    if args.json:
        write_whole(args.json, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
