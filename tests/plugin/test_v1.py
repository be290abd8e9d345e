"""OGPSA in LLaMA-Factory's v1 trainer (`USE_V1=1`): its steps against a float64 projection, and what it refuses."""

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import v1_on_cpu
import yaml
from conftest import load_weights, read_rows, same_weights
from forks import run_forked


LEARNING_RATE = 0.5


@pytest.fixture
def v1_args(model_dir, data_dir, tmp_path):
    """A stock SFT run of v1: three steps, each on all 24 records, by plain gradient descent."""

    def write(name, *sets):
        entries = {
            item: {"path": f"{data_dir}/{item}.json", "source": "local", "converter": "alpaca"} for item in sets
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(entries))
        return str(path)

    sgd()
    return {
        "model": model_dir,
        **({"template": "chatml"} if has_templates() else {}),
        "train_dataset": write("train", "safety"),
        "output_dir": str(tmp_path / "out"),
        "micro_batch_size": 24,
        "cutoff_len": 64,
        "learning_rate": LEARNING_RATE,
        "optim_config": {"name": "test_sgd", "lr": LEARNING_RATE},
        "max_steps": 3,
        "max_grad_norm": 1000.0,
        "batching_workers": 0,
        "bf16": False,
        "enable_activation_checkpointing": False,
        "seed": 7,
        "general": write("general", "helpful", "truthful"),
    }


def has_templates():
    """Return whether v1 has templates of its own: 0.9.5. Later ones take the model's, or ChatML where it has none."""
    from llamafactory.v1.config import ModelArguments

    return hasattr(ModelArguments, "template")


def sgd():
    """Register gradient descent where v1 looks optimizers up."""
    try:
        from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
    except ImportError:  # from 0.9.6 on
        from llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer import OptimizerPlugin

    OptimizerPlugin("test_sgd").register()(
        lambda model, config: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=config["lr"])
    )


def ask(args, **options):
    """Turn a stock run into one that asks for OGPSA, in four lines."""
    args = dict(args)
    return {**args, "ogpsa_dataset": args.pop("general"), "ogpsa_update_interval": 2, **options} | {"general": None}


def run_v1(args):
    """Run v1's SFT in this process."""
    from llamafactory.v1.trainers.sft_trainer import run_sft

    run_sft({name: copy.deepcopy(value) for name, value in args.items() if name != "general"})
    return args["output_dir"]


def losses(args, data_dir, name):
    """Return a function of a float64 model: the mean loss over the labelled tokens of a whole set."""
    from llamafactory.v1.plugins.data_plugins.converter import DataConverterPlugin
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args["model"])
    records = [DataConverterPlugin("alpaca")(r) for r in json.loads(Path(data_dir, f"{name}.json").read_text())]

    def mean_loss(model):
        total, count = 0.0, 0
        for record in records:
            ids, labels = [], []
            for message in record["messages"]:
                text = "".join(part["value"] for part in message["content"])
                header, body = (
                    tokenizer.encode(part, add_special_tokens=False)
                    for part in (f"<|im_start|>{message['role']}\n", f"{text}<|im_end|>\n")
                )
                answer = message["role"] == "assistant"
                ids += header + body
                labels += header if answer and has_templates() else [-100] * len(header)  # 0.9.5 learns it too
                labels += body if answer else [-100] * len(body)
            ids, labels = torch.tensor([ids]), torch.tensor(labels)
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            kept = labels[1:] != -100
            total = total - log_probs[kept].gather(1, labels[1:][kept, None]).sum()
            count += int(kept.sum())
        return total / count

    return mean_loss


def gradients(model, loss):
    names, params = zip(*model.named_parameters(), strict=True)
    value = loss(model)
    return value.item(), dict(zip(names, torch.autograd.grad(value, params), strict=True))


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_the_first_step_is_the_float64_projection(v1_args, data_dir, scope):
    from transformers import AutoModelForCausalLM

    out = run_v1(ask(v1_args, ogpsa_scope=scope, max_steps=1))

    model = AutoModelForCausalLM.from_pretrained(v1_args["model"], dtype=torch.float64)
    _, g = gradients(model, losses(v1_args, data_dir, "safety"))
    references, told = [], {}
    for name in ("helpful", "truthful"):
        told[name], reference = gradients(model, losses(v1_args, data_dir, name))
        references.append(reference)
    groups = [[name] for name in g] if scope == "parameter" else [list(g)]
    expected, removed = {}, 0.0
    for group in groups:
        flat = torch.cat([g[name].flatten() for name in group])
        rows = torch.stack([torch.cat([r[name].flatten() for name in group]) for r in references])
        basis = torch.linalg.svd(rows, full_matrices=False).Vh
        component = basis.T @ (basis @ flat)
        removed += float(component.square().sum())
        expected |= dict(zip(group, (flat - component).split([g[name].numel() for name in group]), strict=True))
    norm = sum(float(value.square().sum()) for value in g.values())

    before, after = dict(model.named_parameters()), load_weights(out)
    for name, step in expected.items():
        taken = (before[name].detach() - after[name].double()).flatten() / LEARNING_RATE
        assert torch.allclose(taken, step, rtol=1e-4, atol=2e-6), name
    (row,), (refresh,) = read_rows(out)
    assert row["step"] == 1
    assert refresh["step"] == 0
    assert row["removed"] == pytest.approx((removed / norm) ** 0.5, rel=1e-4)
    assert 0.05 < row["removed"] < 1
    assert row["residual"] < 1e-5
    assert refresh["reference_loss"] == pytest.approx(told, rel=1e-5)


def test_the_log_has_every_refresh_and_every_step(v1_args):
    steps, refreshes = read_rows(run_v1(ask(v1_args)))
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["step"] for row in refreshes] == [0, 2]
    assert refreshes[0]["reference_loss"] != refreshes[1]["reference_loss"]


def test_a_reference_batch_size_does_not_matter(v1_args, tmp_path):
    one = run_v1(ask(v1_args))
    other = run_v1(ask(v1_args, ogpsa_batch_size=3, output_dir=str(tmp_path / "other")))
    one, other = load_weights(one), load_weights(other)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_monitor_leaves_the_run_as_it_is(v1_args, tmp_path):
    stock = run_v1(v1_args)
    watched = run_v1(ask(v1_args, ogpsa_method="monitor", output_dir=str(tmp_path / "watched")))
    assert same_weights(stock, watched)
    assert read_rows(watched)[0][0]["residual"] > 0.01


def test_accumulated_and_clipped_gradients_are_projected(v1_args):
    steps, _ = read_rows(run_v1(ask(v1_args, micro_batch_size=4, global_batch_size=12, max_grad_norm=0.01)))
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["residual"] < 1e-5 and row["removed"] > 0.05 for row in steps)


@pytest.mark.parametrize("scope", ["parameter", "inputs"])
def test_lora(v1_args, scope):
    peft = {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all"}
    out = run_v1(ask(v1_args, peft_config=peft, ogpsa_scope=scope, optim_config=None, learning_rate=0.01))
    steps, refreshes = read_rows(out)
    assert len(steps) == 3
    assert refreshes[-1]["covered_tensors"] == refreshes[-1]["trainable_tensors"] == 28


@pytest.mark.parametrize(("skipped", "logging_steps", "kept"), [({1, 2, 3}, 1, []), ({2}, 1, [1, 3]), ({2}, 2, [])])
def test_a_skipped_step_is_not_a_step(v1_args, monkeypatch, skipped, logging_steps, kept):
    calls = itertools.count(1)
    measure = lambda *args: torch.tensor(float("nan") if next(calls) in skipped else 1.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", measure)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", measure)
    steps, refreshes = read_rows(run_v1(ask(v1_args, logging_steps=logging_steps)))
    assert [row["step"] for row in steps] == kept
    losses = {row["step"]: row["reference_loss"] for row in refreshes}
    assert len(losses) == 2
    assert (losses[0] == losses[2]) is (1 in skipped)


def test_bad_input_is_refused_before_the_model_is_loaded(v1_args, data_dir, monkeypatch, tmp_path):
    def load_model(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("llamafactory.v1.trainers.sft_trainer.ModelEngine", load_model)
    raw = tmp_path / "raw.yaml"
    raw.write_text(yaml.safe_dump({"raw": {"path": f"{data_dir}/helpful.json", "source": "local"}}))
    again = shutil.copy(v1_args["general"], tmp_path / "again.yaml")
    told = {
        "`ogpsa_rank` is 0; allowed: a positive integer": {"ogpsa_rank": 0},
        "`ogpsa_rnak` is given, which OGPSA does not have": {"ogpsa_rnak": 2},
        "`ogpsa_save_state` is True, but the checkpoints": {"ogpsa_save_state": True},
        "`resume_from_checkpoint` is 'auto', which OGPSA does not support": {"resume_from_checkpoint": "auto"},
        "`batching_strategy` is 'padding_free', which": {"batching_strategy": "padding_free"},
        "`dist_config.name` is 'deepspeed', which": {"dist_config": {"name": "deepspeed"}},
        "`cp_size` is 2, which": {"dist_config": {"name": "fsdp2", "cp_size": 2}},
        f"a set 'helpful' twice, in {v1_args['general']} and {again}; allowed": {
            "ogpsa_dataset": f"{v1_args['general']},{again}"
        },
        "which cannot be read (": {"ogpsa_dataset": str(tmp_path / "none.json")},
        "'raw', whose records have _dataset_name, input, instruction, output; allowed": {"ogpsa_dataset": str(raw)},
        "`stage: ogpsa_sft` is given, but LLaMA-Factory's v1 trainer takes the stage from": {"stage": "ogpsa_sft"},
    }
    for message, options in told.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run_v1(ask(v1_args, **options))


def test_a_command_without_ogpsa_refuses_it(v1_args):
    from llamafactory.v1.config import get_args

    with pytest.raises(ValueError, match="this command of LLaMA-Factory's v1 trainer has no OGPSA; allowed: `llama"):
        get_args({name: value for name, value in ask(v1_args).items() if name != "general"})


def write_config(args):
    """Write the YAML of a run with AdamW; return its path."""
    config = Path(args["output_dir"] + ".yaml")
    config.write_text(yaml.safe_dump({k: v for k, v in args.items() if k not in ("general", "optim_config")}))
    return str(config)


def forked(args, tmp_path, processes=1):
    """Do the same in processes that have everything imported."""
    env = {"USE_V1": "1", "CUDA_VISIBLE_DEVICES": ""}
    run_forked(tmp_path, v1_on_cpu.train, write_config(args), processes=processes, env=env)


def command(args, *words, python=(), **env):
    """Run `llamafactory-cli sft` on a YAML made of `args`, with AdamW; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        [sys.executable, *python, "-m", "llamafactory.cli", "sft", write_config(args), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "USE_V1": "1", "CUDA_VISIBLE_DEVICES": "", **env},
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout + process.stderr


@pytest.mark.cli
def test_the_command_line(v1_args):
    told = command(
        {**v1_args, "learning_rate": 0.01}, f"ogpsa_dataset={v1_args['general']}", "ogpsa_update_interval=2"
    )
    steps, refreshes = read_rows(v1_args["output_dir"])
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["step"] for row in refreshes] == [0, 2]
    assert "ogpsa/removed: " in told


@pytest.mark.cli
def test_a_stock_run_is_what_it_is_without_the_plugin(v1_args, site_without_plugin, tmp_path):
    forked(v1_args, tmp_path)
    other = {**v1_args, "output_dir": str(tmp_path / "other")}
    command(other, python=["-S"], PYTHONPATH=site_without_plugin)
    assert same_weights(v1_args["output_dir"], other["output_dir"])


@pytest.mark.parametrize("dist_config", [None, {"name": "fsdp2"}], ids=["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(v1_args, tmp_path, dist_config):
    asking = {**v1_args, "ogpsa_dataset": v1_args["general"], "ogpsa_update_interval": 2, "learning_rate": 0.01}
    forked(asking, tmp_path)
    two = {**asking, "micro_batch_size": 12, "output_dir": str(tmp_path / "two")}
    if dist_config is not None:
        two["dist_config"] = dist_config
    forked(two, tmp_path, processes=2)
    (steps, refreshes), (two_steps, two_refreshes) = read_rows(asking["output_dir"]), read_rows(two["output_dir"])
    assert len(two_steps) == len(steps) == 3
    assert len(two_refreshes) == len(refreshes) == 2
    for one, other in zip(refreshes, two_refreshes, strict=True):
        assert one["reference_loss"] == pytest.approx(other["reference_loss"], rel=1e-4)
    for one, other in zip(steps, two_steps, strict=True):
        assert one["removed"] == pytest.approx(other["removed"], rel=1e-2)
        assert other["residual"] < 1e-5
