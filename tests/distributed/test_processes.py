"""Two gloo processes, under every engine, against one process with the same global batch."""

import importlib.util

import pytest
import torch
from conftest import load_weights, read_rows, run_cli, run_here
from forks import run_forked
from zero import zero_config


pytestmark = pytest.mark.cli

ENGINES = {
    "ddp": None,
    "zero1": zero_config(1),
    "zero2": zero_config(2),
    "zero3": zero_config(3),
    "zero2 offload": zero_config(2, offload=True),
    "zero3 offload": zero_config(3, offload=True),
}

# The reference sets have 13 and 10 records, of which the first 11 and 10 are used: multiples of nothing here.
RUNS = {
    "sft full": {"stage": "ogpsa_sft", "ogpsa_dataset": "helpful,truthful", "ogpsa_num_samples": 11, "optim": "sgd"},
    "sft lora": {
        "stage": "ogpsa_sft",
        "finetuning_type": "lora",
        "ogpsa_dataset": "helpful,truthful",
        "ogpsa_scope": "global",
        "ogpsa_method": "conflict",
        "optim": "adamw_torch",
    },
    "dpo full": {
        "stage": "ogpsa_dpo",
        "dataset": "safety_pairs",
        "ogpsa_dataset": "helpful_pairs,truthful_pairs",
        "ogpsa_scope": "global",
        "ogpsa_rank": 4,
        "optim": "adamw_torch",
    },
    "dpo lora": {
        "stage": "ogpsa_dpo",
        "finetuning_type": "lora",
        "dataset": "safety_pairs",
        "ogpsa_dataset": "helpful,truthful",
        "ogpsa_loss": "sft",
        "optim": "sgd",
    },
    # BCO's loss communicates, and the last batch of a set is one process's alone.
    "bco full": {
        "stage": "ogpsa_dpo",
        "dataset": "safety_pairs",
        "ogpsa_dataset": "helpful_pairs",
        "ogpsa_num_samples": 3,
        "ogpsa_batch_size": 1,
        "pref_bco_weight": 0.5,
        "optim": "sgd",
    },
}

# Rows of matrices are cut by ZeRO's partitions; LoRA's matrices have fewer rows than there are processes' pieces.
INPUTS = {
    "inputs full": {
        "stage": "ogpsa_sft",
        "ogpsa_dataset": "helpful,truthful",
        "ogpsa_scope": "inputs",
        "ogpsa_rank": 5,
        "optim": "sgd",
    },
    "inputs lora": {
        "stage": "ogpsa_sft",
        "finetuning_type": "lora",
        "ogpsa_dataset": "helpful,truthful",
        "ogpsa_scope": "inputs",
        "ogpsa_rank": 5,
        "optim": "sgd",
    },
}
# The first step has learning rate zero, so that `A` has a gradient in the third alone.
WARM = {
    "lora warm-up": {
        "stage": "ogpsa_sft",
        "finetuning_type": "lora",
        "ogpsa_dataset": "helpful,truthful",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 1,
        "ogpsa_update_interval": 30,
        "optim": "adamw_torch",
    },
}

CASES = [(engine, name) for engine in ENGINES for name in RUNS if name != "bco full"]
CASES += [("ddp", "bco full"), ("zero2", "bco full")]
RUNS |= INPUTS | WARM
CASES += [(engine, "inputs full") for engine in ENGINES if engine != "zero3 offload"]
CASES += [("ddp", "inputs lora"), ("zero2", "inputs lora"), ("zero3", "inputs lora")]
CASES += [("ddp", "lora warm-up"), ("zero2", "lora warm-up")]


def on_two(args, engine):
    """Return the arguments of the same run on two processes."""
    args = {**args, "per_device_train_batch_size": args["per_device_train_batch_size"] // 2}
    if ENGINES[engine] is None:
        return {**args, "ddp_backend": "gloo"}
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    # `use_cpu` would keep transformers from starting DeepSpeed's communication.
    args.pop("use_cpu")
    return {**args, "deepspeed": ENGINES[engine]}


def run_two(args, tmp_path):
    """Run LLaMA-Factory in two processes."""
    run_forked(tmp_path, run_here, args, processes=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run one process, once for each kind of run; return its output folder."""
    finished = {}

    def run(name, args):
        if name not in finished:
            finished[name] = str(tmp_path_factory.mktemp("alone"))
            run_here({**args, "output_dir": finished[name]})
        return finished[name]

    return run


def relative_difference(weights, expected):
    assert expected.keys() <= weights.keys()  # DeepSpeed saves tied weights twice
    difference = torch.cat([(weights[k].double() - expected[k].double()).flatten() for k in expected]).norm()
    return difference / torch.cat([expected[k].double().flatten() for k in expected]).norm()


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_two_processes_do_what_one_does(base_args, tmp_path, alone, engine, name):
    sgd = RUNS[name]["optim"] == "sgd"
    args = {
        **base_args,
        "disable_shuffling": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2 if "full" in name else 1,
        "max_steps": 4,
        "learning_rate": 0.1 if sgd else 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "ogpsa_update_interval": 2,
        **RUNS[name],
    }
    two = on_two(args, engine)
    if (engine, name) == ("ddp", "sft full"):
        run_cli(two, tmp_path, env={"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"})
    else:
        run_two(two, tmp_path)

    output_dir = alone(name, args)
    weights, expected = load_weights(args["output_dir"]), load_weights(output_dir)
    assert relative_difference(weights, expected) <= (1e-5 if sgd else 1e-4)

    (steps, refreshes), (expected_steps, expected_refreshes) = read_rows(args["output_dir"]), read_rows(output_dir)
    for row, other in zip(steps, expected_steps, strict=True):
        assert row["removed"] == pytest.approx(other["removed"], rel=1e-3, abs=1e-6)
        assert row.keys() == other.keys()
        for key in {"cosine", "update_cosine", "update_share"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4)
        assert args.get("ogpsa_method") == "conflict" or row["residual"] <= 1e-5
    for row, other in zip(refreshes, expected_refreshes, strict=True):
        for key in ("step", "rank", "covered_tensors", "trainable_tensors", "covered_elements"):
            assert row[key] == other[key]
        assert row["reference_loss"] == pytest.approx(other["reference_loss"], rel=1e-5)
    if name in WARM:
        assert [row["step"] for row in refreshes] == [0, 2]
        assert refreshes[1]["covered_elements"] == 1
    norms, expected_norms = read_norms(args["output_dir"]), read_norms(output_dir)
    assert norms == pytest.approx(expected_norms, rel=1e-3)


def read_norms(output_dir):
    """Read the gradient norms that the Trainer logged."""
    from transformers import TrainerState

    history = TrainerState.load_from_json(f"{output_dir}/trainer_state.json").log_history
    return [entry["grad_norm"] for entry in history if "grad_norm" in entry]


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_process_without_a_reference_sample_waits_for_the_other(base_args, tmp_path, engine):
    args = {**base_args, "stage": "ogpsa_sft", "ogpsa_dataset": "helpful", "ogpsa_num_samples": 1}
    run_two(on_two(args, engine), tmp_path)
    steps, refreshes = read_rows(args["output_dir"])
    assert len(steps) == 3
    assert refreshes[0]["rank"] == 1


@pytest.mark.parametrize("engine", ["zero1", "zero2 offload", "zero3", "zero3 offload"])
def test_monitor_leaves_the_weights_as_a_stock_run_does(base_args, tmp_path, engine):
    args = on_two({**base_args, "gradient_accumulation_steps": 2}, engine)
    stock = {**args, "output_dir": str(tmp_path / "stock")}
    watched = {**args, "stage": "ogpsa_sft", "ogpsa_dataset": "helpful", "ogpsa_method": "monitor"}
    run_two(stock, tmp_path)
    run_two({**watched, "ogpsa_update_interval": 1}, tmp_path)
    weights, expected = load_weights(args["output_dir"]), load_weights(stock["output_dir"])
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
