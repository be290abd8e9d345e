"""The recipes' YAMLs and scripts: what LLaMA-Factory parses, twins, and two steps of each on a tiny model."""

import itertools
import math
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import WORDS, load_weights, make_model_dir, read_rows, run_here
from omegaconf import OmegaConf
from raw_records import make_halueval, make_pku, make_ultrafeedback, write_lines

from llamafactory_ogpsa.cli import main


ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "yaml" / "recipes"
SCRIPTS = ROOT / "examples" / "recipes"
MODELS = {
    "qwen2_5_7b": ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B-Instruct", "llama3"),
}
TUNINGS, STAGES, METHODS = ("full", "lora"), ("sft", "dpo"), ("ogpsa", "naive")
# Tokens of the chat templates `qwen` and `llama3`, which a tiny tokenizer does not bring along.
SPARE_TOKENS = 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The three recipes carried out on small raw files, in one dataset_dir."""
    raw, data = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
    for recipe, make in [("safety", make_pku), ("helpful", make_ultrafeedback), ("truthful", make_halueval)]:
        source = write_lines(raw / f"{recipe}.jsonl", make(30))
        assert main(["prepare", recipe, "--from", source, "--output", str(data)]) == 0
    return str(data)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each recipe's architecture, by the name of the model that it stands for."""
    path = tmp_path_factory.mktemp("models")
    size = len(WORDS) + 7 + SPARE_TOKENS
    return {
        MODELS["qwen2_5_7b"][0]: make_model_dir(path / "qwen", family="qwen2", vocab_size=size),
        MODELS["llama3_1_8b"][0]: make_model_dir(path / "llama", family="llama", tie=False, vocab_size=size),
    }


@pytest.fixture
def ask(tmp_path):
    """Run a script with a recorder in the place of `llamafactory-cli`; returns the arguments of each training."""
    record = tmp_path / "calls"
    fake = tmp_path / "bin" / "llamafactory-cli"
    fake.parent.mkdir()
    fake.write_text(f'#!/usr/bin/env bash\necho "${{FORCE_TORCHRUN:-0}} $*" >> {record}\n')
    fake.chmod(0o755)

    def run(script, tuning, *words):
        record.unlink(missing_ok=True)
        path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(
            [str(SCRIPTS / script), *words],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "SAVES": str(tmp_path / "saves")},
        )
        calls = []
        for torchrun, command, config, *pairs in map(str.split, record.read_text().splitlines()):
            assert (torchrun, command) == ({"full": "1", "lora": "0"}[tuning], "train")
            # As LLaMA-Factory reads a file and what is added on the command line.
            merged = OmegaConf.merge(OmegaConf.load(ROOT / config), OmegaConf.from_cli(pairs))
            calls.append(OmegaConf.to_container(merged))
        return calls

    return run


def shrink(args, prepared, models):
    """Make a recipe run for two steps here: a tiny model, one process, no DeepSpeed."""
    small = {
        "model_name_or_path": models.get(args["model_name_or_path"], args["model_name_or_path"]),
        "dataset_dir": prepared,
        "cutoff_len": 64,
        "preprocessing_num_workers": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "logging_steps": 1,
        "plot_loss": False,
        "use_cpu": True,
        "overwrite_cache": True,
    }
    return {key: value for key, value in {**args, **small}.items() if key != "deepspeed"}


def test_the_merge_in_the_docs_is_of_a_recipe_and_its_base_model():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    merge = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert merge["merge_method"] == "linear"
    assert [item["model"] for item in merge["models"]] == [MODELS["qwen2_5_7b"][0], "saves/qwen2_5_7b/full/sft_naive"]
    assert [item["parameters"] for item in merge["models"]] == [{"weight": 0.5}] * 2


def test_a_recipe_is_what_the_script_asks_for_by_its_names():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {
        f"{t}_{s}" for t, s in itertools.product(TUNINGS, STAGES)
    }


@pytest.mark.parametrize(("model", "tuning", "stage"), list(itertools.product(MODELS, TUNINGS, STAGES)))
def test_llamafactory_parses_the_recipe_with_the_papers_settings_and_twins_differ_by_the_ogpsa_lines(
    model, tuning, stage, ask, prepared, models, tmp_path
):
    from llamafactory.hparams import get_train_args

    asked = {}
    for method in METHODS:
        (args,) = ask("train.sh", tuning, model, tuning, stage, method)
        asked[method] = {key: value for key, value in args.items() if value is not None}
        _, data_args, training_args, finetuning_args, _ = get_train_args(
            {**args, **shrink(args, prepared, models), "deepspeed": None, "max_steps": -1}
        )
        assert args["output_dir"] == str(tmp_path / "saves" / model / tuning / f"{stage}_{method}")
        assert (args["model_name_or_path"], data_args.template) == MODELS[model]
        assert (finetuning_args.stage, finetuning_args.finetuning_type) == (stage, tuning)
        assert training_args.learning_rate == {"full": 1e-6, "lora": 1e-4}[tuning]
        assert training_args.num_train_epochs == {"sft": 3, "dpo": 1}[stage]
        assert (training_args.lr_scheduler_type, training_args.max_grad_norm) == ("cosine", 1.0)
        assert args["warmup_ratio"] == 0.1
        assert args.get("deepspeed") == ("examples/deepspeed/ds_z3_config.json" if tuning == "full" else None)
        processes = {"full": 8, "lora": 1}[tuning]
        assert args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * processes == 16
        assert finetuning_args.ogpsa_enabled is (method == "ogpsa")
        if method == "ogpsa":
            assert finetuning_args.ogpsa_update_interval == {"sft": 30, "dpo": 5}[stage]
            assert finetuning_args.ogpsa_num_samples == 200
            assert finetuning_args.ogpsa_dataset == [f"helpful_{stage}", f"truthful_{stage}"]

    ogpsa, naive = asked["ogpsa"], asked["naive"]
    differing = {key for key in ogpsa.keys() | naive.keys() if ogpsa.get(key) != naive.get(key)}
    assert differing == {"stage", "ogpsa_dataset", "ogpsa_num_samples", "ogpsa_update_interval", "output_dir"}


@pytest.mark.parametrize(
    ("model", "tuning", "method"),
    [
        ("qwen2_5_7b", "lora", "ogpsa"),
        ("llama3_1_8b", "full", "ogpsa"),
        ("llama3_1_8b", "lora", "naive"),
        ("qwen2_5_7b", "full", "naive"),
    ],
)
def test_the_script_trains_dpo_on_top_of_sft(model, tuning, method, ask, prepared, models, tmp_path):
    """Every file with every method, two steps each; every model with every kind of tuning."""
    calls = ask("sft_then_dpo.sh", tuning, model, tuning, method, "learning_rate=0.05")
    results = tmp_path / "saves" / model / tuning
    assert [args["output_dir"] for args in calls] == [str(results / f"{name}_{method}") for name in ("sft", "sft_dpo")]
    start = {"full": "model_name_or_path", "lora": "adapter_name_or_path"}[tuning]
    assert calls[1][start] == str(results / f"sft_{method}")

    for stage, args in zip(STAGES, calls, strict=True):
        assert args["learning_rate"] == 0.05
        run_here(shrink(args, prepared, models))
        assert all(weight.isfinite().all() for weight in load_weights(args["output_dir"]).values())
        if method == "naive":
            assert not (Path(args["output_dir"]) / "ogpsa_log.jsonl").exists()
            continue

        steps, refreshes = read_rows(args["output_dir"])
        # The first of the two steps warms up at learning rate zero, so LoRA's A has no gradient to refresh for yet.
        assert [row["step"] for row in refreshes] == [0]
        assert [row["step"] for row in steps] == [1, 2]
        assert all(0 < row["removed"] < 1 for row in steps)
        for row in refreshes:
            assert set(row["reference_loss"]) == {f"helpful_{stage}", f"truthful_{stage}"}
            assert all(math.isfinite(loss) for loss in row["reference_loss"].values())
        if stage == "dpo":
            # DPO's loss on any pair is log 2 where the model is its own reference, which is the model after SFT.
            assert all(x == pytest.approx(math.log(2), abs=1e-3) for x in refreshes[0]["reference_loss"].values())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sft_then_dpo.sh", []),
        ("train.sh", []),
        ("train.sh", ["qwen", "lora", "sft", "ogpsa"]),
        ("train.sh", ["qwen2_5_7b", "qlora", "sft", "ogpsa"]),
        ("train.sh", ["qwen2_5_7b", "lora", "kto", "ogpsa"]),
        ("train.sh", ["qwen2_5_7b", "lora", "sft", "mixed"]),
    ],
)
def test_a_script_asked_for_something_else_explains_itself(script, words):
    process = subprocess.run([str(SCRIPTS / script), *words], capture_output=True, text=True)
    assert process.returncode == 2
    assert "MODEL is qwen2_5_7b or llama3_1_8b" in process.stderr
