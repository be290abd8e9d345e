"""Values that are not finite, and gradients of which nothing is left: what happens to the run, and what it says."""

import itertools

import pytest
import torch
from conftest import OGPSA, load_weights, read_rows, run_here
from transformers import TrainerCallback


class Poison(TrainerCallback):
    """Puts a value into one parameter's gradient, in the backward passes of one step, and keeps the loss scales."""

    def __init__(self, value, step):
        self.value, self.step, self.active, self.scales = value, step, False, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        next(model.parameters()).register_hook(self.spoil)

    def spoil(self, gradient):
        if self.active:
            gradient = gradient.clone()
            gradient[0, 0] = self.value
        return gradient

    def on_step_begin(self, args, state, control, **kwargs):
        self.active = state.global_step == self.step

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler is not None else 1.0)


def compare_with_stock(args, value, step):
    """Run with OGPSA and without, with the same fault; return both runs' weights and loss scales."""
    stock = {key: value for key, value in args.items() if not key.startswith("ogpsa_")}
    stock |= {"stage": "sft", "output_dir": args["output_dir"] + "-stock"}
    poisons = Poison(value, step), Poison(value, step)
    for run, poison in zip((args, stock), poisons, strict=True):
        run_here(run, callbacks=[poison])
    return [load_weights(run["output_dir"]) for run in (args, stock)], [poison.scales for poison in poisons]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
@pytest.mark.usefixtures("cpu_scaler")
def test_the_scaler_skips_a_step_that_is_not_finite_as_in_a_stock_run(base_args, said, value, method):
    args = {**base_args, **OGPSA, "ogpsa_method": method, "fp16": True, "max_steps": 5}
    (weights, _), (scales, stock_scales) = compare_with_stock(args, value, step=1)
    assert scales == stock_scales == [1024.0, 512.0, 512.0, 512.0, 512.0]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    steps, refreshes = read_rows(args["output_dir"])
    assert [row.get("non_finite_steps", 0) for row in steps] == [0, 1, 0, 0, 0]
    assert [row["removed"] is None for row in steps] == [False, True, False, False, False]
    assert [row["rank"] for row in refreshes] == [2, 2, 2]
    assert sum("did not project 1 gradient(s): they held inf or NaN" in message for message in said()) == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_without_a_scaler_the_optimizer_gets_what_it_gets_in_a_stock_run(base_args, value):
    # With a learning rate of 0 in the first step, both runs have the same weights when the fault comes.
    args = {**base_args, **OGPSA, "ogpsa_update_interval": 100, "optim": "sgd", "warmup_steps": 1, "max_steps": 2}
    (weights, stock), _ = compare_with_stock(args, value, step=1)
    assert any(tensor.isnan().any() for tensor in stock.values())
    for name, tensor in stock.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0, equal_nan=True)


def spoil_losses(monkeypatch, is_bad):
    """Make the reference loss of some passes NaN, by the number of the pass."""
    from llamafactory_ogpsa.plugin.trainer import StageLoss

    stock, calls = StageLoss.__call__, itertools.count(1)

    def spoiled(self, batch, weight, total):
        return stock(self, batch, weight, total) * (float("nan") if is_bad(next(calls)) else 1.0)

    monkeypatch.setattr(StageLoss, "__call__", spoiled)


def test_a_reference_batch_that_is_not_finite_is_left_out(base_args, monkeypatch):
    # A refresh has 4 + 3 passes; the 9th is in the second refresh, which does its set's other passes again.
    spoil_losses(monkeypatch, lambda number: number == 9)
    run_here({**base_args, **OGPSA, "max_steps": 4})
    steps, refreshes = read_rows(base_args["output_dir"])
    assert [row["rank"] for row in refreshes] == [2, 2]
    assert all(0 < loss < 10 for row in refreshes for loss in row["reference_loss"].values())
    assert all(row["removed"] > 0 and row["residual"] < 1e-5 for row in steps)


def test_a_set_that_gives_only_values_that_are_not_finite_stops_the_run(base_args, monkeypatch):
    # After four losses that check the passes for noise, those of one refresh and two steps.
    spoil_losses(monkeypatch, lambda number: number > 15)
    with pytest.raises(FloatingPointError, match="reference set truthful gives no reference gradient: no batch has"):
        run_here({**base_args, **OGPSA, "max_steps": 4})
    steps, refreshes = read_rows(base_args["output_dir"])
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["step"] for row in refreshes] == [0]


@pytest.mark.parametrize(("method", "warnings"), [("orthogonal", 1), ("monitor", 0)])
def test_a_run_whose_gradient_is_inside_the_subspace_is_warned_once(base_args, said, method, warnings):
    # The reference set is the training data, and a step has all of it: nothing is left of any gradient.
    args = {**base_args, **OGPSA, "ogpsa_dataset": "safety", "ogpsa_method": method, "ogpsa_update_interval": 1}
    args |= {"per_device_train_batch_size": 24, "max_steps": 8, "learning_rate": 0.001}
    run_here(args)
    steps, _ = read_rows(args["output_dir"])
    assert all(row["removed"] > 0.99 for row in steps)
    messages = [message for message in said() if "has removed more than 99%" in message]
    assert len(messages) == warnings
    initial, weights = load_weights(args["model_name_or_path"]), load_weights(args["output_dir"])
    # No weight moves further than AdamW moves one by its learning rate, whatever rounding leaves of the gradient.
    assert all((weights[name] - initial[name]).abs().max() < 8 * 0.001 for name in weights)


def test_a_resumed_run_is_warned_when_the_uninterrupted_one_is(base_args, said, tmp_path):
    args = {**base_args, **OGPSA, "ogpsa_dataset": "safety", "ogpsa_update_interval": 1, "max_steps": 7}
    args |= {"per_device_train_batch_size": 24, "learning_rate": 0.001}
    run_here({**args, "save_strategy": "steps", "save_steps": 1})
    # The warning comes at step 5: to a run that begins at 3, where a new count would not get to five, and to none later.
    for step, warnings in [(3, 2), (5, 2)]:
        checkpoint = f"{args['output_dir']}/checkpoint-{step}"
        run_here({**args, "output_dir": str(tmp_path / f"from-{step}"), "resume_from_checkpoint": checkpoint})
        assert len([message for message in said() if "has removed more than 99%" in message]) == warnings
