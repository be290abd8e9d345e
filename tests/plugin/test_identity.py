"""What must not change: stock runs, and runs that only monitor, to the last bit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import OGPSA, load_weights, run_cli, run_here
from forks import run_forked


PAIRS = {"dataset": "safety_pairs", "ogpsa_dataset": "helpful_pairs,truthful_pairs"}

RUNS = {
    "full": {},
    "adamw with clipping": {"max_grad_norm": 0.05},
    "max_grad_norm 0": {"max_grad_norm": 0.0},
    "dropout": {"finetuning_type": "lora", "lora_dropout": 0.3},
    "neftune": {"neftune_noise_alpha": 5.0},
    "accumulation and evaluation": {
        "gradient_accumulation_steps": 2,
        "val_size": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "bf16": {"bf16": True},
    "fp16 with its scaler": {"fp16": True, "max_grad_norm": 0.05},
    # The Trainer carries the gradients of an epoch's remainder over, and begins their step twice.
    "streaming remainder": {
        "streaming": True,
        "max_steps": 5,
        "gradient_accumulation_steps": 4,
        "dataloader_num_workers": 1,
    },
    "dpo": {"stage": "ogpsa_dpo", **PAIRS},
    "bco": {"stage": "ogpsa_dpo", "pref_bco_weight": 0.5, **PAIRS},
}


def stock_of(args):
    stock = {key: value for key, value in args.items() if not key.startswith("ogpsa_")}
    return {**stock, "stage": args["stage"].removeprefix("ogpsa_")}


def assert_same_weights(one, other):
    one, other = load_weights(one), load_weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def logged(output_dir):
    """What the trainers logged of training, without times and OGPSA's own figures."""
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    return [
        {key: value for key, value in row.items() if not key.startswith("ogpsa/") and not key.endswith(timed)}
        for row in history
    ]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("cpu_scaler")
def test_monitor_is_bit_identical_to_stock(base_args, tmp_path, name):
    args = {**base_args, **OGPSA, **RUNS[name], "ogpsa_method": "monitor", "output_dir": str(tmp_path / "monitor")}
    stock = {**stock_of(args), "output_dir": str(tmp_path / "stock")}
    run_here(args)
    run_here(stock)
    assert_same_weights(args["output_dir"], stock["output_dir"])
    assert logged(args["output_dir"]) == logged(stock["output_dir"])
    assert any(
        row.get("ogpsa/removed")
        for row in json.loads((tmp_path / "monitor" / "trainer_state.json").read_text())["log_history"]
    )


@pytest.mark.cli
def test_a_stock_run_is_bit_identical_without_the_plugin(base_args, tmp_path, site_without_plugin):
    """The same stock run in an environment that has every installed package but this one."""
    with_plugin = {**base_args, "output_dir": str(tmp_path / "with" / "run")}
    without = {**base_args, "output_dir": str(tmp_path / "without" / "run")}
    run_forked(tmp_path, run_here, with_plugin)
    run_cli(without, tmp_path, env={"PYTHONPATH": site_without_plugin}, python=("-S",))
    assert_same_weights(with_plugin["output_dir"], without["output_dir"])
    assert logged(with_plugin["output_dir"]) == logged(without["output_dir"])
    cards = [(Path(run["output_dir"]) / "README.md").read_text() for run in (with_plugin, without)]
    assert cards[0] == cards[1]


def test_a_refresh_leaves_the_random_state_alone(base_args, tmp_path):
    """Refreshing every step or once gives the same dropout and data order, hence the same losses with lr 0."""
    losses = []
    for interval in (1, 100):
        args = {
            **base_args,
            **OGPSA,
            "finetuning_type": "lora",
            "lora_dropout": 0.3,
            "learning_rate": 0.0,
            "ogpsa_update_interval": interval,
            "output_dir": str(tmp_path / str(interval)),
        }
        run_here(args)
        losses.append([row["loss"] for row in logged(args["output_dir"]) if "loss" in row])
    assert losses[0] == losses[1]


def test_the_extended_arguments_can_be_pickled_like_the_stock_ones():
    from llamafactory.hparams import parser

    extended = next(item for item in parser._TRAIN_ARGS if item.__name__ == "FinetuningArguments")
    arguments = extended(stage="ogpsa_sft", ogpsa_dataset="a,b")
    assert pickle.loads(pickle.dumps(arguments)).to_dict() == arguments.to_dict()


def test_trackers_are_told_the_same_of_a_stock_run():
    from dataclasses import fields

    from llamafactory.hparams import FinetuningArguments as Stock
    from llamafactory.hparams import parser

    extended = next(item for item in parser._TRAIN_ARGS if item.__name__ == "FinetuningArguments")
    assert extended is not Stock
    assert extended(stage="sft").to_dict() == Stock(stage="sft").to_dict()
    assert {item.name for item in fields(Stock)} < {item.name for item in fields(extended)}
