"""Why protecting a reference loss does not keep a real model from refusing, and what else is needed: two tables.

    python -m lab.real.why                                        # the demo's base model, the project's data
    python -m lab.real.why --model FOLDER --data-dir outputs/lab_real/data --json why.json

Both tables are about the base model, before any training; only a linear classifier is trained for them.

**What a step still does.** A step of SGD along `-g` changes a loss `L` by `-η ⟨g, ∇L⟩` to first order. For the safety
gradient `g` and its projection `g̃` the table gives `⟨g̃, ∇L⟩ / ⟨g, ∇L⟩`: the share that is left of what naive tuning
does to `L`. `L` is the loss of a refusal after held-out prompts, or of the right answer.

**What the model can tell apart.** A logistic regression on the hidden states of a layer, mean over the last five
tokens of the prompt, learns harmful prompts against general ones. The table gives the shares of held-out look-alikes
and ordinary prompts that it calls harmful, with a threshold at which it finds nine (or eight) of ten held-out harmful
ones. No method that learns from the same prompts by these states alone can be expected to do much better.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.utils import logging

from llamafactory_ogpsa import Subspace

from ..generate import load_checkpoint, tokens_of
from ..launch import console, progress_bar, write_whole
from ..score import DATA_DIR, answer_loss
from .data import read_records


REFERENCES = ("general_helpful", "general_truthful")
LOOKALIKES = "general_lookalikes"
FIRST_TOKENS = 3
LAST_TOKENS = 5
NUM_GRADIENTS = len(REFERENCES) + 3 + 4
RECALLS = (0.9, 0.8)


def read(data_dir, name, count):
    """Read the first records of a set."""
    return read_records(Path(data_dir) / f"{name}.json")[:count]


def refused(records, refusals):
    """Give records the refusals of other prompts as their answers."""
    return [rec | {"output": text} for rec, text in zip(records, itertools.cycle(refusals), strict=False)]


def gradient(model, tokenizer, records, part=slice(None)):
    """Compute the gradient of the mean loss per answer token.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        records: Records with an `output`.
        part: Which tokens of each answer count.

    Returns:
        The gradients by parameter name, float32, in tensors of their own, and the loss in nats.
    """
    model.zero_grad()  # sets None: the next call must not write into the tensors of this one
    count = sum(len(tokens_of(tokenizer, rec)[1][part]) for rec in records)
    total = 0.0
    for rec in records:
        loss = answer_loss(model, tokenizer, rec, part)[0] / count
        loss.backward()
        total += loss.item()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}, total


def inner(one, other):
    """Compute the inner product of two gradients in float64."""
    return sum(torch.dot(one[name].flatten().double(), other[name].flatten().double()).item() for name in one)


def cosine(one, other):
    """Compute the cosine of two gradients."""
    return inner(one, other) / (inner(one, one) * inner(other, other)) ** 0.5


def measure_steps(model, tokenizer, data_dir, count, advance):
    """Measure what a step along each projection of the safety gradient still does.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        data_dir: Folder of the sets.
        count: Records of each set.
        advance: Called after each gradient.

    Returns:
        Dictionary with `cosines` of parts of the safety gradient with each reference gradient, and with `left`: by
        loss and scope the share of naive tuning's first-order change, and what was `removed` of the gradient's norm.
    """

    def take(records, part=slice(None)):
        result = gradient(model, tokenizer, records, part)[0]
        advance()
        return result

    safety = read(data_dir, "safety_sft", count)
    refusals = [rec["output"] for rec in safety]
    references = {name: take(read(data_dir, name, count)) for name in REFERENCES}
    parts = {
        "all tokens": slice(None),
        f"first {FIRST_TOKENS}": slice(FIRST_TOKENS),
        "rest": slice(FIRST_TOKENS, None),
    }
    cosines = {}
    for title, part in parts.items():
        of_part = take(safety, part)
        cosines[title] = {name: cosine(of_part, of_set) for name, of_set in references.items()}
        if title == "all tokens":
            whole = of_part
    left = {}
    projected, removed = {}, {}
    for scope in ("parameter", "global", "inputs"):
        projected[scope] = {name: tensor.clone() for name, tensor in whole.items()}
        subspace = Subspace.from_gradients(list(references.values()), scope=scope)
        removed[scope] = subspace.project_(projected[scope]).removed
        del subspace  # as large as the references
    losses = {
        "refusing held-out harmful prompts": refused(read(data_dir, "heldout_harmful", count), refusals),
        "refusing held-out look-alikes": refused(read(data_dir, "heldout_benign", count), refusals),
        "refusing held-out ordinary prompts": refused(read(data_dir, "heldout_ordinary", count), refusals),
        "answering held-out ordinary prompts": read(data_dir, "heldout_ordinary", count),
        "answering the reference prompts": None,
    }
    for title, records in losses.items():
        of_loss = references[REFERENCES[0]] if records is None else take(records)
        left[title] = {"cosine": cosine(whole, of_loss)}
        left[title] |= {scope: inner(grad, of_loss) / inner(whole, of_loss) for scope, grad in projected.items()}
    return {"cosines": cosines, "left": left, "removed": removed}


@torch.inference_mode()
def states(model, tokenizer, records, advance):
    """Compute the hidden states of prompts, mean over their last tokens.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        records: The records.
        advance: Called after each record.

    Returns:
        Array `[records, layers + 1, hidden]`, float32.
    """
    rows = []
    for rec in records:
        prompt, _ = tokens_of(tokenizer, rec)
        hidden = model(input_ids=torch.tensor([prompt], device=model.device), output_hidden_states=True).hidden_states
        rows.append(torch.stack([layer[0, -LAST_TOKENS:].mean(0) for layer in hidden]).float().cpu())
        advance()
    return torch.stack(rows).numpy()


def measure_separation(by_set, negatives):
    """Measure how well a linear classifier of each layer's states tells harmful prompts from others.

    Args:
        by_set: What `states` returned by set name.
        negatives: Names of the sets that it learns as harmless.

    Returns:
        For each layer after the embeddings a dictionary from (recall, set) to the share called harmful.
    """
    result = []
    for layer in range(1, by_set["safety_sft"].shape[1]):
        sets = {name: rows[:, layer] for name, rows in by_set.items()}
        harmless = np.concatenate([sets[name] for name in negatives])
        labels = np.repeat([1, 0], [len(sets["safety_sft"]), len(harmless)])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        classifier.fit(np.concatenate([sets["safety_sft"], harmless]), labels)
        scores = {
            name: classifier.decision_function(rows) for name, rows in sets.items() if name.startswith("heldout")
        }
        row = {}
        for recall in RECALLS:
            threshold = np.quantile(scores["heldout_harmful"], 1 - recall)
            for name in ("heldout_benign", "heldout_ordinary"):
                row[f"{name} at {recall}"] = float((scores[name] >= threshold).mean())
        result.append(row)
    return result


def step_table(steps):
    """Lay the first table out."""
    scopes = list(steps["removed"])
    table = Table(title="What of naive tuning's first-order change is left", box=box.SIMPLE_HEAD)
    for column in ("loss of", "cosine with the safety gradient", *scopes):
        table.add_column(column, justify="left" if column == "loss of" else "right")
    for title, row in steps["left"].items():
        table.add_row(title, *(f"{row[name]:.3f}" for name in ("cosine", *scopes)))
    table.add_row("removed of the gradient's norm", "", *(f"{steps['removed'][name]:.3f}" for name in scopes))
    return table


def cosine_table(steps):
    """Lay the cosines out by token position."""
    table = Table(title="Cosine of the safety gradient with the reference gradients", box=box.SIMPLE_HEAD)
    for column in ("tokens of the refusal", *REFERENCES):
        table.add_column(column)
    for title, row in steps["cosines"].items():
        table.add_row(title, *(f"{row[name]:.3f}" for name in REFERENCES))
    return table


def separation_table(separation):
    """Lay the second table out, every third layer."""
    table = Table(title="Called harmful by a linear classifier of a layer's states", box=box.SIMPLE_HEAD)
    names = [(kind, column) for kind, rows in separation.items() for column in rows[0]]
    for column in ("layer", *(f"{kind}: {column.removeprefix('heldout_')}" for kind, column in names)):
        table.add_column(column, justify="right")
    layers = len(next(iter(separation.values())))
    for layer in range(2, layers, 3):
        table.add_row(str(layer + 1), *(f"{separation[kind][layer][column]:.2f}" for kind, column in names))
    return table


def main(argv=None):
    """Print both tables.

    Args:
        argv: Command-line arguments, `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(description="Why protecting a reference loss does not prevent refusals.")
    parser.add_argument("--model", default="outputs/demo/base", help="folder of the model before safety tuning")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the sets, named as in data/")
    parser.add_argument("--count", type=int, default=32, help="records of each set for the gradients")
    parser.add_argument("--prompts", type=int, default=100, help="prompts of each set for the classifier")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load_checkpoint(args.model)
    names = ["safety_sft", *REFERENCES, LOOKALIKES, "heldout_harmful", "heldout_benign", "heldout_ordinary"]
    sets = {name: read(args.data_dir, name, args.prompts) for name in names}
    with progress_bar("") as progress:
        bar = progress.add_task("gradients", total=NUM_GRADIENTS)
        steps = measure_steps(model, tokenizer, args.data_dir, args.count, lambda: progress.advance(bar))
        bar = progress.add_task("hidden states", total=sum(map(len, sets.values())))
        by_set = {name: states(model, tokenizer, rows, lambda: progress.advance(bar)) for name, rows in sets.items()}
    separation = {
        "without look-alikes": measure_separation(by_set, REFERENCES),
        "with": measure_separation(by_set, (*REFERENCES, LOOKALIKES)),
    }
    if args.json:
        write_whole(args.json, json.dumps({"steps": steps, "separation": separation}, indent=1) + "\n")
    for table in (cosine_table(steps), step_table(steps), separation_table(separation)):
        console.print(table)


if __name__ == "__main__":
    main()
