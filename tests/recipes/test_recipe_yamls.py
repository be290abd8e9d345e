"""The recipes' YAMLs: what LLaMA-Factory parses, twins, and two steps of each on prepared data and a tiny model."""

import math
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import WORDS, load_weights, make_model_dir, read_rows, run_here
from raw_records import make_halueval, make_pku, make_ultrafeedback, write_lines

from llamafactory_ogpsa.cli import main


ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "yaml" / "recipes"
YAMLS = sorted(RECIPES.glob("*.yaml"))
NAMES = {
    f"{model}_{tuning}_{stage}_{method}.yaml"
    for model in ("qwen2_5_7b", "llama3_1_8b")
    for tuning in ("full", "lora")
    for stage in ("sft", "dpo")
    for method in ("ogpsa", "naive")
}
# Tokens of the chat templates `qwen` and `llama3`, which a tiny tokenizer does not bring along.
SPARE_TOKENS = 32


def parts_of(path):
    """Split a file name into model, tuning, stage and method."""
    return path.stem.rsplit("_", 3)


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
    """A tiny model of each recipe's architecture."""
    path = tmp_path_factory.mktemp("models")
    size = len(WORDS) + 7 + SPARE_TOKENS
    return {
        "qwen2_5_7b": make_model_dir(path / "qwen", family="qwen2", vocab_size=size),
        "llama3_1_8b": make_model_dir(path / "llama", family="llama", tie=False, vocab_size=size),
    }


def shrink(args, prepared, models, output):
    """Make a recipe run for two steps here: a tiny model, one process, no DeepSpeed."""
    model = {"Qwen/Qwen2.5-7B-Instruct": "qwen2_5_7b", "meta-llama/Llama-3.1-8B-Instruct": "llama3_1_8b"}
    small = {
        "model_name_or_path": models[model[args["model_name_or_path"]]],
        "dataset_dir": prepared,
        "output_dir": str(output),
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


def test_every_recipe_is_there_and_nothing_else():
    assert {path.name for path in YAMLS} == NAMES


def test_the_merge_in_the_docs_is_of_a_recipe_and_its_base_model():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    merge = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    recipe = yaml.safe_load((RECIPES / "qwen2_5_7b_full_sft_naive.yaml").read_text())
    assert merge["merge_method"] == "linear"
    assert [item["model"] for item in merge["models"]] == [recipe["model_name_or_path"], recipe["output_dir"]]
    assert [item["parameters"] for item in merge["models"]] == [{"weight": 0.5}] * 2


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_llamafactory_parses_the_recipe_with_the_papers_settings(path, prepared, models, tmp_path):
    from llamafactory.hparams import get_train_args

    model, tuning, stage, method = parts_of(path)
    args = yaml.safe_load(path.read_text())
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(
        {**args, **shrink(args, prepared, models, tmp_path), "deepspeed": None, "max_steps": -1}
    )
    assert (finetuning_args.stage, finetuning_args.finetuning_type) == (stage, tuning)
    assert data_args.template == {"qwen2_5_7b": "qwen", "llama3_1_8b": "llama3"}[model]
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


@pytest.mark.parametrize("path", [path for path in YAMLS if "_ogpsa" in path.name], ids=lambda path: path.stem)
def test_twins_differ_by_the_ogpsa_lines_alone(path):
    twin = path.with_name(path.name.replace("_ogpsa", "_naive"))
    ogpsa, naive = ([line for line in p.read_text().splitlines() if not line.startswith("# ")] for p in (path, twin))
    added = [line for line in ogpsa if line not in naive]
    start = ogpsa.index("### ogpsa")
    block = ogpsa[start : ogpsa.index("", start) + 1]
    rest = ogpsa[:start] + ogpsa[start + len(block) :]
    assert [line.split(":")[0] for line in added] == [
        "stage",
        "### ogpsa",
        "ogpsa_dataset",
        "ogpsa_num_samples",
        "ogpsa_update_interval",
        "output_dir",
    ]
    assert [line.replace("stage: ogpsa_", "stage: ").replace("_ogpsa", "_naive") for line in rest] == naive


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps(path, prepared, models, tmp_path):
    _, tuning, stage, method = parts_of(path)
    args = shrink(yaml.safe_load(path.read_text()), prepared, models, tmp_path / "out")
    run_here(args)
    assert all(weight.isfinite().all() for weight in load_weights(args["output_dir"]).values())
    if method == "naive":
        assert not (tmp_path / "out" / "ogpsa_log.jsonl").exists()
        return

    steps, refreshes = read_rows(args["output_dir"])
    # LoRA's A has no gradient before the first step, hence its second refresh after it.
    assert [row["step"] for row in refreshes] == ([0] if tuning == "full" else [0, 1])
    assert [row["step"] for row in steps] == [1, 2]
    assert all(0 < row["removed"] < 1 for row in steps)
    for row in refreshes:
        assert set(row["reference_loss"]) == {f"helpful_{stage}", f"truthful_{stage}"}
        assert all(math.isfinite(loss) for loss in row["reference_loss"].values())


SCRIPT = ROOT / "examples" / "recipes" / "sft_then_dpo.sh"


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_script_trains_dpo_on_top_of_sft(tuning, prepared, models, tmp_path):
    """`llamafactory-cli` is replaced by a recorder; what it was asked for is then run here, shrunk."""
    record = tmp_path / "calls"
    fake = tmp_path / "bin" / "llamafactory-cli"
    fake.parent.mkdir()
    fake.write_text(f'#!/usr/bin/env bash\necho "${{FORCE_TORCHRUN:-0}} $*" >> {record}\n')
    fake.chmod(0o755)
    saves = tmp_path / "saves"
    subprocess.run(
        [str(SCRIPT), "llama3_1_8b", tuning, "ogpsa", "learning_rate=0.05"],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}", "SAVES": str(saves)},
    )
    calls = [line.split() for line in record.read_text().splitlines()]
    assert len(calls) == 2
    results = saves / "llama3_1_8b" / tuning
    for call in calls:
        torchrun, command, config, *pairs = call
        assert (torchrun, command) == ({"full": "1", "lora": "0"}[tuning], "train")
        given = {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in pairs)}
        assert given["learning_rate"] == 0.05
        args = yaml.safe_load((ROOT / config).read_text())
        run_here({**shrink(args, prepared, models, given["output_dir"]), **given})

    start = {"full": "model_name_or_path", "lora": "adapter_name_or_path"}[tuning]
    assert given[start] == str(results / "sft_ogpsa")
    assert sorted(folder.name for folder in results.iterdir()) == ["sft_dpo_ogpsa", "sft_ogpsa"]
    _, refreshes = read_rows(results / "sft_dpo_ogpsa")
    # DPO's loss on any pair is log 2 where the model is its own reference, which is the model after SFT.
    assert all(loss == pytest.approx(math.log(2), abs=1e-3) for loss in refreshes[0]["reference_loss"].values())


def test_the_script_explains_itself():
    process = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert process.returncode == 2
    assert "MODEL is qwen2_5_7b or llama3_1_8b" in process.stderr
