"""From raw files to the table: prepare, SFT, DPO, evaluation of a checkpoint and of an adapter, comparison."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import WORDS, make_model_dir, run_here
from raw_records import make_halueval, make_pku, make_ultrafeedback, write_lines

from llamafactory_ogpsa.cli import main
from llamafactory_ogpsa.recipes import evaluate
from llamafactory_ogpsa.recipes.errors import RecipeError


RECIPES = Path(__file__).resolve().parents[2] / "examples" / "yaml" / "recipes"
QUICK = ["--device", "cpu", "--batch_size", "4", "--gen_kwargs", "max_gen_toks=6"]


@pytest.fixture
def harness_here(monkeypatch):
    """Run the harness in this process, which saves its imports, and let it look for tasks where those used here are."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    from lm_eval.__main__ import cli_evaluate

    if importlib.util.find_spec("lm_eval.tasks._index"):  # of its versions that have it; a search takes seconds
        from lm_eval.tasks._index import TaskIndex

        search = TaskIndex._iter_yaml_files
        narrow = staticmethod(lambda root: search(root / "truthfulqa" if (root / "truthfulqa").is_dir() else root))
        monkeypatch.setattr(TaskIndex, "_iter_yaml_files", narrow)

    def run(command):
        monkeypatch.setattr(sys, "argv", command[2:])
        cli_evaluate()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evaluate, "subprocess", SimpleNamespace(run=run))


def write_safety_data(folder):
    (folder / "xstest.csv").write_text(
        "id,prompt,type,label,focus,note\n"
        + "".join(f"{i},{WORDS[i]} {WORDS[i + 1]},x,{'safe' if i % 3 else 'unsafe'},y,z\n" for i in range(9))
    )
    (folder / "strongreject.csv").write_text('category,source,forbidden_prompt\nx,y,ba be bi\nx,y,"bo, bu"\n')
    return ["--xstest", str(folder / "xstest.csv"), "--strongreject", str(folder / "strongreject.csv")]


def write_truthfulqa(folder):
    """Lay a local copy where the harness, looking for the hub id, finds it."""
    targets = {"choices": ["ba be", "bi bo"], "labels": [1, 0]}
    write_lines(
        folder / "truthfulqa" / "truthful_qa" / "validation.jsonl",
        [{"question": f"{word}?", "mc1_targets": targets, "mc2_targets": targets} for word in WORDS[:4]],
    )
    (folder / "truthfulqa" / "truthful_qa" / "README.md").write_text(
        "---\nconfigs:\n- config_name: multiple_choice\n  data_files:\n  - split: validation\n"
        "    path: validation.jsonl\n---\n"
    )


def test_from_raw_files_to_the_comparison(harness_here, tmp_path, monkeypatch, capsys):
    """SFT of a Qwen, as a full checkpoint, and SFT and DPO of a Llama, as a LoRA adapter on the SFT's exported model."""
    from llamafactory.train.tuner import export_model

    monkeypatch.chdir(tmp_path)
    for recipe, make in [("safety", make_pku), ("helpful", make_ultrafeedback), ("truthful", make_halueval)]:
        assert main(["prepare", recipe, "--from", write_lines(f"{recipe}.jsonl", make(30))]) == 0
    qwen, llama = (
        make_model_dir(tmp_path / family, family=family, vocab_size=len(WORDS) + 40) for family in ("qwen2", "llama")
    )

    def train(name, model, template):
        args = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        args.pop("deepspeed", None)
        small = {"model_name_or_path": model, "cutoff_len": 64, "max_steps": 2, "gradient_accumulation_steps": 1}
        small |= {"template": template, "preprocessing_num_workers": 1, "use_cpu": True, "plot_loss": False}
        run_here({**args, **small})
        return args["output_dir"]

    checkpoint = train("full_sft", qwen, "qwen")
    merged = str(tmp_path / "merged")
    export_model(
        {
            "model_name_or_path": llama,
            "adapter_name_or_path": train("lora_sft", llama, "llama3"),
            "template": "llama3",
            "export_dir": merged,
        }
    )
    adapter = train("lora_dpo", merged, "llama3")

    safety = write_safety_data(tmp_path)
    write_truthfulqa(tmp_path)
    for name, model in [("qwen", ["--model", checkpoint]), ("llama", ["--model", merged, "--adapter", adapter])]:
        output = ["--output", f"results/{name}", *QUICK]
        assert main(["evaluate", "safety", *model, *safety, *output]) == 0
        assert main(["evaluate", "general", *model, *output, "--tasks", "truthfulqa_mc2"]) == 0

    capsys.readouterr()
    assert main(["compare", "results/qwen", "results/llama", "--picture", "comparison.png"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split(" | ")[1:3] == ["general average ↑", "truthfulqa_mc2"]
    assert len(header.split(" | ")) == 6
    assert [row.split(" | ")[0] for row in rows] == ["| qwen", "| llama"]
    assert all(0 <= float(figure.strip("| ")) <= 100 for row in rows for figure in row.split(" | ")[1:])
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")

    (samples,) = (tmp_path / "results" / "llama").rglob("samples_ogpsa_xstest_safe_*.jsonl")
    assert len(samples.read_text().splitlines()) == 6
    (results,) = (file for file in samples.parent.glob("results_*") if "ogpsa_xstest" in file.read_text())
    assert json.loads(results.read_text())["config"]["model_args"]["peft"] == adapter


def test_a_judge_takes_the_place_of_the_rule(harness_here, tmp_path, monkeypatch):
    model = make_model_dir(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "my_judge.py").write_text("def refuses(prompt, answer):\n    return prompt.startswith('ba')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--model", model, "--output", str(tmp_path / "out"), "--judge", "my_judge:refuses"]
    assert main(["evaluate", "safety", *words, *write_safety_data(tmp_path), *QUICK]) == 0
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    rates = {task: figures.get("refusal_rate,none") for task, figures in results.items()}
    # Of XSTest's unsafe prompts the first starts with "ba" (1 of 3), of StrongREJECT's one of two.
    assert rates["ogpsa_strongreject"] == 0.5
    assert rates["ogpsa_xstest_unsafe"] == pytest.approx(1 / 3)
    assert rates["ogpsa_xstest_safe"] == 0


@pytest.mark.cli
def test_the_console_script_finds_a_judge_in_the_current_folder(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    (tmp_path / "my_judge.py").write_text("def refuses(prompt, answer):\n    return True\n")
    script = Path(sys.executable).with_name("llamafactory-ogpsa")
    words = ["--model", "m", "--output", "out", "--judge", "my_judge:refuses", "--xstest", "nowhere.csv"]
    process = subprocess.run([script, "evaluate", "safety", *words], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert (
        process.stderr == "llamafactory-ogpsa: nowhere.csv does not exist.\n"
    )  # so the judge, loaded first, was found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["general", "--judge", "operator:contains"], "--judge has no effect on the tasks mmlu,gpqa_main_zeroshot,"),
        (["general", "--xstest", "x.csv"], "allowed with it: ogpsa_safety, ogpsa_xstest_safe, ogpsa_xstest_unsafe."),
        (["safety", "--tasks", "ogpsa_xstest_safe", "--strongreject", "x.csv"], "--strongreject has no effect"),
        (["safety", "--judge", ""], "--judge is '', but importing '' raised"),
        (["safety", "--output_path", "elsewhere"], "--output_path would replace --output"),
        (["safety", "-o=elsewhere"], "--output_path would replace --output"),
        (["safety", "--out", "elsewhere"], "--output_path would replace --output"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(words, told, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    monkeypatch.setattr(evaluate, "subprocess", None)
    assert main(["evaluate", "--model", "m", "--output", "out", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("tasks", ["ogpsa_safety", "mmlu,ogpsa_safety", "ogpsa_xstest_*", "mmlu,ogpsa_xstest_unsafe"])
def test_the_safety_options_are_taken_with_every_way_to_name_the_tasks(tasks, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    monkeypatch.setattr(evaluate, "subprocess", SimpleNamespace(run=lambda command: SimpleNamespace(returncode=7)))
    words = ["--tasks", tasks, "--judge", "operator:contains", *write_safety_data(tmp_path)[:2]]
    assert main(["evaluate", "general", "--model", "m", "--output", "out", *words]) == 7


def test_the_command_line_of_the_harness():
    command = evaluate.harness_command("m", "a", "out", "mmlu,ifeval", {}, ["--limit", "3", "--batch_size", "2"])
    assert command[1:5] == ["-m", "lm_eval", "run", "--model"]
    assert "pretrained=m,peft=a" in command
    assert command[command.index("--tasks") + 1] == "mmlu,ifeval"
    assert command[-6:] == ["--batch_size", "auto", "--limit", "3", "--batch_size", "2"]
    command = evaluate.harness_command("m", None, "out", "ogpsa_safety", {"xstest": "x.csv"}, [])
    assert "pretrained=m" in command
    assert command[-2:] == ["--batch_size", "auto"]
    assert json.loads(command[command.index("--metadata") + 1]) == {"xstest": "x.csv"}
    folder = Path(command[command.index("--include_path") + 1])
    assert {path.name for path in folder.glob("ogpsa_*.yaml")} == {
        "ogpsa_safety.yaml",
        "ogpsa_strongreject.yaml",
        "ogpsa_xstest_safe.yaml",
        "ogpsa_xstest_unsafe.yaml",
    }


@pytest.mark.parametrize(
    ("option", "content", "told"),
    [
        ("--xstest", None, "does not exist"),
        ("--xstest", "id,type,prompt\n1,x,ba\n", "the columns [label] are missing; found: [id, type, prompt]"),
        ("--xstest", "prompt,label\nba,safe\n", "(label unsafe) has no prompt for this task"),
        ("--strongreject", "text\nba\n", "[forbidden_prompt] or [prompt] are missing; found: [text]"),
    ],
)
def test_safety_data_that_cannot_be_used_are_told_before_the_harness_runs(option, content, told, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    file = tmp_path / "prompts.csv"
    if content:
        file.write_text(content)
    assert main(["evaluate", "safety", "--model", "m", "--output", str(tmp_path), option, str(file)]) == 2
    assert told in capsys.readouterr().err


def test_a_missing_harness_is_told_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install '\.\[eval\]' in a clone"):
        evaluate.evaluate("general", "m", None, "out", None, [])


def test_a_misspelt_option_is_refused_where_nobody_else_could_take_it(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "safety", "--form", "x"])
    assert "unrecognized arguments: --form x" in capsys.readouterr().err
