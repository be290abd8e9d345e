"""Scope `inputs` in real runs: the step against float64, LoRA, what it logs, resume, monitor."""

import oracle
import pytest
import torch
from conftest import OGPSA, assert_same_run, load_weights, read_rows, run_here, same_weights
from transformers import AutoModelForCausalLM


INPUTS = {**OGPSA, "ogpsa_scope": "inputs", "ogpsa_rank": 5, "ogpsa_update_interval": 100}
LORA = {"finetuning_type": "lora", "lora_rank": 4}
RATE = 10.0


def record_inputs(args, names, stage):
    """Return what reaches each linear layer at the real tokens of all samples, float64 `[tokens, in]`, by name."""
    model = AutoModelForCausalLM.from_pretrained(args["model_name_or_path"], dtype=torch.float64)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            keep = lambda module, given, name=name: inputs.setdefault(name, []).append(given[0][0].detach())
            module.register_forward_pre_hook(keep)
    for dataset in names:
        for sample in oracle.tokenised({**args, "max_samples": None}, dataset, "rm" if stage == "dpo" else "sft"):
            for key in ("chosen_input_ids", "rejected_input_ids") if stage == "dpo" else ("input_ids",):
                model(input_ids=torch.tensor([sample[key]]))
    tied = {"lm_head": "model.embed_tokens"}
    return {f"{tied.get(name, name)}.weight": torch.cat(rows) for name, rows in inputs.items()}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_one_step_equals_the_float64_formula(base_args, stage):
    suffix = "_pairs" if stage == "dpo" else ""
    args = {
        **base_args,
        **INPUTS,
        "stage": f"ogpsa_{stage}",
        "dataset": f"safety{suffix}",
        "ogpsa_dataset": f"helpful{suffix},truthful{suffix}",
        "ogpsa_batch_size": 3,
        "max_samples": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    initial = load_weights(args["model_name_or_path"])
    run_here(args)
    final = load_weights(args["output_dir"])

    data_stage = "rm" if stage == "dpo" else "sft"
    safety = oracle.gradient_of(args, oracle.tokenised(args, args["dataset"], data_stage), stage)
    inputs = record_inputs(args, args["ogpsa_dataset"].split(","), stage)
    error = norm = 0.0
    for name, before in initial.items():
        expected = torch.zeros_like(before, dtype=torch.float64)
        if name in inputs:
            basis = torch.linalg.svd(inputs[name], full_matrices=False)[2][:5]
            gradient = safety[name].view(before.shape)
            expected = gradient - gradient @ basis.T @ basis
        else:
            assert before.dim() == 1
        update = (before.double() - final[name].double()) / RATE
        error += (update - expected).square().sum()
        norm += expected.square().sum()
    assert (error / norm).sqrt() <= 1e-4
    (row,), (refresh,) = read_rows(args["output_dir"])
    assert row["residual"] < 1e-5
    assert row["update_share"] < 1e-4
    assert refresh["covered_elements"] == 1
    assert refresh["rank"] == 5


def test_an_untied_embedding_keeps_the_rows_of_reference_tokens(base_args, tmp_path):
    from conftest import make_model_dir

    args = {**base_args, **INPUTS, "model_name_or_path": make_model_dir(tmp_path / "model", tie=False)}
    run_here(args)
    initial, final = load_weights(args["model_name_or_path"]), load_weights(args["output_dir"])
    used = set()
    for name in ("helpful", "truthful"):
        for sample in oracle.tokenised({**args, "max_samples": None}, name, "sft"):
            used |= set(sample["input_ids"])
    name = "model.embed_tokens.weight"
    same = (initial[name] == final[name]).all(1)
    assert all(same[token] for token in used)
    assert not same.all()
    assert read_rows(args["output_dir"])[1][0]["covered_elements"] == 1


def adapter_outputs(args):
    """Return the largest norm of what each adapter adds for reference inputs, over that of its input times its norm."""
    inputs = record_inputs(args, ["helpful", "truthful"], "sft")
    weights = load_weights(args["output_dir"])
    shares = []
    for name, a in weights.items():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            basis = torch.linalg.svd(inputs[layer], full_matrices=False)[2][:5]
            shares.append(((a.double() @ basis.T).norm() / a.double().norm()).item())
    return shares


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_lora_keeps_reference_inputs_out_of_the_adapter(base_args, optim):
    args = {**base_args, **INPUTS, **LORA, "optim": optim, "learning_rate": 0.5 if optim == "sgd" else 1e-3}
    run_here(args)
    shares = adapter_outputs(args)
    assert len(shares) == 14
    assert max(shares) < (1e-3 if optim == "sgd" else 0.2)  # AdamW's scaling turns the update, which is logged
    steps, refreshes = read_rows(args["output_dir"])
    assert refreshes[0]["covered_elements"] == 1
    assert len(refreshes) == 1
    assert all(row["uncovered"] == 0 for row in steps)


def test_an_adapter_that_is_trained_further_is_left_as_it_is(base_args, tmp_path):
    first = {**base_args, **INPUTS, **LORA, "ogpsa_scope": "global", "ogpsa_rank": 2}
    run_here(first)
    args = {**base_args, **INPUTS, **LORA, "adapter_name_or_path": first["output_dir"], "learning_rate": 1e-12}
    args["output_dir"] = str(tmp_path / "further")
    run_here(args)
    before, after = load_weights(first["output_dir"]), load_weights(args["output_dir"])
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    assert read_rows(args["output_dir"])[1][0]["covered_elements"] == 1


@pytest.mark.parametrize("change", [{}, LORA], ids=["full", "lora"])
def test_monitor_is_the_stock_run(base_args, tmp_path, change):
    run_here({**base_args, **change, "output_dir": str(tmp_path / "stock")})
    run_here({**base_args, **INPUTS, **change, "ogpsa_method": "monitor"})
    assert same_weights(base_args["output_dir"], str(tmp_path / "stock"))
    removed = [row["removed"] for row in read_rows(base_args["output_dir"])[0]]
    if change is LORA:
        # Of LoRA a run removes a part of A's gradient alone, which is zero where B is.
        assert removed[0] == 0
        assert all(0 < share < 0.5 for share in removed[1:]), removed
    else:
        assert all(share > 0.1 for share in removed)


@pytest.mark.parametrize("change", [{}, LORA], ids=["full", "lora"])
def test_a_resumed_run_is_the_whole_run(base_args, tmp_path, change):
    args = {**base_args, **INPUTS, **change, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    run_here(args)
    resumed = {**args, "output_dir": str(tmp_path / "resumed")}
    run_here({**resumed, "resume_from_checkpoint": f"{args['output_dir']}/checkpoint-3"})
    assert_same_run(args["output_dir"], resumed["output_dir"])


def test_the_batch_size_of_the_passes_does_not_matter(base_args, tmp_path):
    weights = []
    for size in (1, 7):
        out = str(tmp_path / str(size))
        run_here({**base_args, **INPUTS, "ogpsa_batch_size": size, "output_dir": out, "optim": "sgd"})
        weights.append(load_weights(out))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)


def test_a_run_resumed_where_a_refresh_is_due_is_the_whole_run(base_args, tmp_path):
    # The checkpoint holds no basis, but which `B` reference inputs do not reach.
    args = {**base_args, **INPUTS, **LORA, "ogpsa_update_interval": 3, "max_steps": 6}
    args |= {"save_strategy": "steps", "save_steps": 3}
    run_here(args)
    resumed = {**args, "output_dir": str(tmp_path / "resumed")}
    run_here({**resumed, "resume_from_checkpoint": f"{args['output_dir']}/checkpoint-3"})
    assert_same_run(args["output_dir"], resumed["output_dir"])
