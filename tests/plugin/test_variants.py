"""Every way of training that one process offers, a few steps each, through LLaMA-Factory's own entry."""

import math

import pytest
import torch
from conftest import OGPSA, load_weights, make_model_dir, need_llamafactory, read_rows, run_here
from transformers import TrainerCallback


PAIRS = {"dataset": "safety_pairs", "ogpsa_dataset": "helpful_pairs,truthful_pairs"}

VARIANTS = {
    "full": {},
    "type instead of stage": {"stage": "sft", "finetuning_type": "ogpsa_full"},
    "both spellings": {"finetuning_type": "ogpsa_full"},
    "lora": {"finetuning_type": "lora"},
    "ogpsa_lora": {"stage": "sft", "finetuning_type": "ogpsa_lora"},
    "lora dropout": {"finetuning_type": "lora", "lora_dropout": 0.1},
    "dora": {"finetuning_type": "lora", "use_dora": True},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "oft": {"finetuning_type": "oft", "oft_block_size": 8},
    "accumulation": {"gradient_accumulation_steps": 2},
    "no checkpointing": {"disable_gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "max_grad_norm 0": {"max_grad_norm": 0.0},
    "packing": {"packing": True},
    "neat_packing": {"neat_packing": True, "flash_attn": "sdpa"},
    "global": {"ogpsa_scope": "global"},
    "conflict": {"ogpsa_method": "conflict"},
    "refresh_samples": {"ogpsa_refresh_samples": 4, "ogpsa_update_interval": 1},
    "rank 4": {"ogpsa_rank": 4},
    "bfloat16 basis": {"ogpsa_basis_dtype": "bfloat16"},
    "basis on cpu": {"ogpsa_basis_device": "cpu"},
    "triton, interpreted": {"ogpsa_kernel": "triton", "max_steps": 1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "dft loss": {"use_dft_loss": True},
    "eaft loss": {"use_eaft_loss": True},
    "epoch logging": {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
    "evaluation and early stopping": {
        "val_size": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "early_stopping_steps": 1,
    },
    "dpo": {"stage": "ogpsa_dpo", **PAIRS},
    "dpo lora": {"stage": "ogpsa_dpo", "finetuning_type": "lora", **PAIRS},
    "dpo accumulation": {"stage": "ogpsa_dpo", "gradient_accumulation_steps": 2, **PAIRS},
    "orpo": {"stage": "ogpsa_dpo", "pref_loss": "orpo", **PAIRS},
    "simpo": {"stage": "ogpsa_dpo", "pref_loss": "simpo", **PAIRS},
    "ipo": {"stage": "ogpsa_dpo", "pref_loss": "ipo", **PAIRS},
    "bco": {"stage": "ogpsa_dpo", "pref_bco_weight": 0.5, **PAIRS},
    # The loss follows each set: SFT's for plain records, the stage's for rankings.
    "dpo with sets of both kinds": {
        "stage": "ogpsa_dpo",
        "dataset": "safety_pairs",
        "ogpsa_dataset": "helpful,truthful_pairs",
    },
    "pt": {"stage": "ogpsa_pt", "dataset": "safety_text", "ogpsa_dataset": "helpful_text", "cutoff_len": 16},
    "rm": {"stage": "ogpsa_rm", "finetuning_type": "lora", **PAIRS},
    "kto": {
        "stage": "ogpsa_kto",
        "finetuning_type": "lora",
        "dataset": "safety_kto",
        "ogpsa_dataset": "helpful_kto,truthful_kto",
    },
    "kto with sft reference loss": {
        "stage": "ogpsa_kto",
        "finetuning_type": "lora",
        "dataset": "safety_kto",
        "ogpsa_dataset": "helpful",
    },
}

# LLaMA-Factory 0.9.4 does not know the one, and refuses the other with transformers 4.53 and newer.
NEWER = {"eaft loss", "neat_packing"}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains_and_projects(base_args, name):
    if name in NEWER:
        need_llamafactory("0.9.5")
    args = {**base_args, **OGPSA, **VARIANTS[name]}
    run_here(args)
    steps, refreshes = read_rows(args["output_dir"])
    assert refreshes
    assert refreshes[0]["step"] == 0
    assert steps
    for row in refreshes:
        assert set(row["reference_loss"]) == set(args["ogpsa_dataset"].split(","))
        assert all(math.isfinite(loss) for loss in row["reference_loss"].values())
    half = args.get("bf16") and args["finetuning_type"] == "full" or "ogpsa_basis_dtype" in args
    for row in steps:
        assert 0 < row["removed"] <= 1 or args.get("ogpsa_method") == "conflict"
        # A policy that keeps what helps leaves it in the subspace; else what is left is rounding.
        assert args.get("ogpsa_method") == "conflict" or row["residual"] <= (2e-3 if half else 1e-5)
    assert load_weights(args["output_dir"])


@pytest.mark.usefixtures("cpu_scaler")
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_fp16_with_its_scaler(base_args, max_grad_norm):
    scales = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            scales.append(optimizer.scaler.get_scale())

    args = {**base_args, **OGPSA, "optim": "sgd", "fp16": True, "max_grad_norm": max_grad_norm}
    args |= {"gradient_accumulation_steps": 2, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    run_here(args, callbacks=[Watch()])
    plain = {**args, "fp16": False, "output_dir": args["output_dir"] + "-fp32"}
    run_here(plain)
    assert scales == [1024.0] * 3
    for row, other in zip(read_rows(args["output_dir"])[0], read_rows(plain["output_dir"])[0], strict=True):
        assert row["residual"] <= 1e-5
        assert row["removed"] == pytest.approx(other["removed"], rel=0.05)
    initial, weights, expected = map(
        load_weights, (args["model_name_or_path"], args["output_dir"], plain["output_dir"])
    )
    error = sum((weights[name] - expected[name]).square().sum() for name in weights) ** 0.5
    assert error / sum((expected[name] - initial[name]).square().sum() for name in weights) ** 0.5 < 0.05


def test_lora_is_refreshed_once_more_when_its_a_has_a_gradient(base_args):
    args = {**base_args, **OGPSA, "finetuning_type": "lora", "ogpsa_update_interval": 100}
    run_here(args)
    assert [row["step"] for row in read_rows(args["output_dir"])[1]] == [0, 1]


def test_tied_and_frozen_parameters(base_args, tmp_path):
    model = make_model_dir(tmp_path / "untied", tie=False)
    args = {
        **base_args,
        **OGPSA,
        "model_name_or_path": model,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 1,
        "freeze_extra_modules": "lm_head",
    }
    run_here(args)
    before, after = load_weights(model), load_weights(args["output_dir"])
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layers.1." in name or "lm_head" in name for name in changed)


def test_a_llama_model(base_args, tmp_path):
    args = {**base_args, **OGPSA, "model_name_or_path": make_model_dir(tmp_path / "llama", family="llama")}
    run_here(args)
    assert read_rows(args["output_dir"])[0]


def test_without_training_ogpsa_does_nothing(base_args, tmp_path):
    args = {**base_args, **OGPSA, "do_train": False, "do_eval": True, "eval_dataset": "truthful"}
    run_here(args)
    assert not (tmp_path / "out" / "ogpsa_log.jsonl").exists()
    assert (tmp_path / "out" / "eval_results.json").exists()
