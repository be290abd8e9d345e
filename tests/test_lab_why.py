"""The two tables of `lab.real.why`: against formulas that hold exactly, on a small model."""

import itertools

import numpy as np
import pytest
import torch

from lab.real import why
from lab.tiny import model as tiny_model
from lab.tiny.model import DATA_DIR


# The small language has no ordinary prompts apart from its general ones.
FILES = {"heldout_ordinary": "heldout_general"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("why")
    tiny_model.main([str(folder / "model")])
    return why.load_checkpoint(folder / "model")


def test_steps_are_measured_by_the_formula(tiny, monkeypatch):
    model, tokenizer = tiny
    read = why.read
    monkeypatch.setattr(why, "read", lambda folder, name, count: read(folder, FILES.get(name, name), count))
    calls = itertools.count()
    steps = why.measure_steps(model, tokenizer, DATA_DIR, 4, lambda: next(calls))
    assert next(calls) == why.NUM_GRADIENTS
    # A scope of the loss leaves nothing of what a step does to a reference loss.
    for scope in ("parameter", "global"):
        assert abs(steps["left"]["answering the reference prompts"][scope]) < 1e-4
    assert 0 < steps["removed"]["global"] <= steps["removed"]["parameter"] < 1

    # What is left of a loss, by a small step of the weights themselves.
    sets = {name: why.read(DATA_DIR, name, 4) for name in (*why.REFERENCES, "safety_sft", "heldout_ordinary")}
    references = [clone(why.gradient(model, tokenizer, sets[name])[0]) for name in why.REFERENCES]
    whole = clone(why.gradient(model, tokenizer, sets["safety_sft"])[0])
    projected = clone(whole)
    why.Subspace.from_gradients(references).project_(projected)
    naive, ours = (change_of_loss(model, tokenizer, sets["heldout_ordinary"], grad) for grad in (whole, projected))
    assert steps["left"]["answering held-out ordinary prompts"]["parameter"] == pytest.approx(ours / naive, rel=0.02)


def clone(gradients):
    return {name: tensor.clone() for name, tensor in gradients.items()}


def change_of_loss(model, tokenizer, records, gradients, rate=1e-3):
    losses = []
    weights = dict(model.named_parameters())
    for sign in (1, -2, 1):  # forward, backward, and where it was
        with torch.no_grad():
            for name, tensor in gradients.items():
                weights[name] += sign * rate * tensor
        losses.append(why.gradient(model, tokenizer, records)[1])
    return losses[0] - losses[1]


def test_a_classifier_finds_what_can_be_told_apart():
    rng = np.random.default_rng(0)

    def rows(shift):
        return rng.normal(size=(60, 2, 8)) + np.array([[0.0] * 8, [shift, *[0.0] * 7]])

    by_set = {"safety_sft": rows(8), "general_helpful": rows(0), "heldout_harmful": rows(8)}
    by_set |= {"heldout_benign": rows(8), "heldout_ordinary": rows(0)}
    (row,) = why.measure_separation(by_set, ["general_helpful"])
    assert row["heldout_ordinary at 0.9"] == 0
    assert row["heldout_benign at 0.9"] > 0.75  # nothing tells them from the harmful ones
    assert row["heldout_benign at 0.8"] < row["heldout_benign at 0.9"]
