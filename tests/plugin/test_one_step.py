"""One SGD step of the real trainers against the float64 oracle."""

import oracle
import pytest
import torch
from conftest import load_weights, run_here


LEARNING_RATE = 10.0


@pytest.fixture
def one_step(base_args):
    """A run of one plain SGD step over the first eight safety records, in float32."""
    return {
        **base_args,
        "max_samples": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "pure_bf16": False,
    }


def update_of(args, initial):
    """Return what the finished run subtracted from each weight, over the learning rate."""
    final = load_weights(args["output_dir"])
    return {name: (initial[name].double() - final[name].double()).flatten() / LEARNING_RATE for name in final}


def largest_cosine(update, references, scope):
    """Return the largest |cos| of the update with a reference gradient, in any group of the scope."""
    groups = [[name] for name in update] if scope == "parameter" else [list(update)]
    cosines = []
    for group in groups:
        u = torch.cat([update[name] for name in group])
        for reference in references:
            r = torch.cat([reference[name] for name in group])
            cosines.append((u @ r).abs() / (u.norm() * r.norm()))
    return max(cosines).item()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_update_is_the_projected_gradient(one_step, stage, scope, rank):
    suffix = "_pairs" if stage == "dpo" else ""
    args = {
        **one_step,
        "stage": f"ogpsa_{stage}",
        "dataset": f"safety{suffix}",
        "ogpsa_dataset": f"helpful{suffix},truthful{suffix}",
        "ogpsa_scope": scope,
        "ogpsa_rank": rank,
        "ogpsa_batch_size": 3,
    }
    initial = load_weights(args["model_name_or_path"])
    run_here(args)
    update = update_of(args, initial)

    expected, _ = oracle.projected_gradient(args, stage, scope, rank)
    error = sum((update[name] - expected[name]).square().sum() for name in expected) ** 0.5
    norm = sum(value.square().sum() for value in expected.values()) ** 0.5
    assert error / norm <= 1e-4


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_the_update_is_orthogonal_to_the_reference_gradients(one_step, tmp_path, stage, scope):
    suffix = "_pairs" if stage == "dpo" else ""
    stock = {**one_step, "stage": stage, "dataset": f"safety{suffix}", "output_dir": str(tmp_path / "stock")}
    args = {
        **stock,
        "stage": f"ogpsa_{stage}",
        "ogpsa_dataset": f"helpful{suffix},truthful{suffix}",
        "ogpsa_scope": scope,
        "output_dir": str(tmp_path / "ogpsa"),
    }
    initial = load_weights(args["model_name_or_path"])
    run_here(stock)
    run_here(args)
    _, references = oracle.projected_gradient(args, stage, scope, 2)
    assert largest_cosine(update_of(args, initial), references, scope) <= 1e-4
    assert largest_cosine(update_of(stock, initial), references, scope) > 1e-2
