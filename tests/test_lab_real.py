"""The lab on a real model: its data sets from raw files, its list of runs, a small lab with OSF, and the report."""

import json
import subprocess
import sys

import pytest
import yaml

from lab import ROOT
from lab.__main__ import main
from lab.plan import Plan, write_yaml
from lab.real import data, ifeval
from lab.real import lab as real
from lab.runs import find_waiting, remove_models
from lab.tiny import model as tiny_model


METHODS = real.PLAN.with_name("methods.yaml")
PARTS = sorted(path for path in METHODS.parent.glob("*.yaml") if path != METHODS)
REFUSAL = "I'm sorry, but I can't help with that."


def write_raw(folder, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
    return {"file": name}


def test_refusals_alone_are_taken_once_and_cut(tmp_path):
    records = [
        {"instruction": "a", "input": "", "output": f"{REFUSAL} It is wrong. Very wrong."},
        {"instruction": "b", "input": "x", "output": "There is no evidence for this."},
        {"instruction": "A ", "input": "", "output": f"{REFUSAL} Again."},
    ]
    entry = write_raw(tmp_path, "raw.json", records) | {"format": "safety_tuned"}
    assert data.read_entry("a", entry, tmp_path) == [
        {"instruction": "a", "input": "", "output": f"{REFUSAL} It is wrong."}
    ]


def test_transcripts_become_pairs_with_their_history(tmp_path):
    def pair(chosen, rejected, before="\n\nHuman: How?"):
        return {"chosen": f"{before}\n\nAssistant: {chosen}", "rejected": f"{before}\n\nAssistant: {rejected}"}

    pairs = [
        pair(REFUSAL, "Sure, here."),
        pair("Sure.", REFUSAL),  # the wrong way round
        pair(REFUSAL, REFUSAL),
        pair(REFUSAL, "Sure.", "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: How?"),
        pair(REFUSAL, "Sure.", "\n\nHuman: " + "How? " * 200),
        {"chosen": pair(REFUSAL, "")["chosen"], "rejected": "\n\nHuman: Why?\n\nAssistant: Sure."},
    ]
    entry = write_raw(tmp_path, "raw.jsonl", "\n".join(map(json.dumps, pairs))) | {"format": "hh"}
    assert data.read_entry("a", entry, tmp_path) == [
        {"instruction": "How?", "input": "", "chosen": REFUSAL, "rejected": "Sure, here.", "history": ()},
        {"instruction": "How?", "input": "", "chosen": REFUSAL, "rejected": "Sure.", "history": (("Hi.", "Hello."),)},
    ]


def test_the_other_formats(tmp_path):
    rows = "id,prompt,type,label\n1,How do I kill a process?,a,safe\n2,How do I kill a man?,a,unsafe\n"
    entry = write_raw(tmp_path, "x.csv", rows)
    assert data.read_entry("a", entry | {"format": "xstest_safe"}, tmp_path)[0]["instruction"].endswith("process?")
    assert data.read_entry("a", entry | {"format": "xstest_unsafe"}, tmp_path)[0]["instruction"].endswith("man?")
    entry = write_raw(tmp_path, "m.json", {"instructions": ["a", "b"], "tags": []}) | {"format": "malicious"}
    assert data.read_entry("a", entry | {"skip": 1, "count": 1}, tmp_path) == [{"instruction": "b"}]
    raw = {"knowledge": "A text.", "question": "Who?", "right_answer": "Bo", "hallucinated_answer": "Al"}
    entry = write_raw(tmp_path, "h.jsonl", json.dumps(raw)) | {"format": "halueval"}
    assert data.read_entry("a", entry, tmp_path) == [
        {"instruction": "Who?", "input": "A text.", "output": "Bo", "answers": ["Bo"]}
    ]


def test_types_of_xstest_are_taken_in_turn(tmp_path):
    rows = ["prompt,type,label", "a0,a,safe", "a1,a,safe", "a2,a,safe", "b0,b,unsafe", "c0,c,safe", "c1,c,safe"]
    entry = write_raw(tmp_path, "x.csv", "\n".join(rows)) | {"format": "xstest_safe"}
    taken = data.read_entry("a", entry, tmp_path)
    assert [rec["instruction"] for rec in taken] == ["a0", "c0", "a1", "c1", "a2"]
    assert data.read_entry("a", entry | {"folder": tmp_path}, tmp_path / "elsewhere") == taken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "csv"}, "format 'csv'; allowed: records, alpaca"),
        ({"file": "nowhere.json"}, "needs .*nowhere.json, which is not there"),
        ({"count": 3}, "asks for 3 records after 0; .* has 2"),
        ({"skip": 2}, "asks for 0 records after 2"),
        ({"first": 3}, "allowed: file or hub, folder, format, skip and count"),
        ({"hub": "some/set"}, "allowed: file or hub, folder, format, skip and count"),
        ({"format": "hh"}, "raw.json has another schema: the columns"),
        ({"pairs_of": "a", "refusals_of": "b"}, "allowed: pairs_of and refusals_of"),
    ],
)
def test_a_wrong_entry_is_named(change, message, tmp_path):
    entry = write_raw(tmp_path, "raw.json", [{"instruction": "a"}, {"instruction": "b"}])
    with pytest.raises(ValueError, match=message):
        data.render({"mine": entry | change}, tmp_path)


def test_a_name_on_the_hub_is_taken_by_formats_of_published_sets_alone(monkeypatch):
    asked = []

    def load(source, config, splits):
        asked.append(source)
        raise ValueError("the hub did not give it")

    monkeypatch.setattr(data, "load", load)
    with pytest.raises(ValueError, match="the hub did not give it"):
        data.read_entry("a", {"hub": "Anthropic/hh-rlhf/harmless-base", "format": "hh"}, ".")
    assert asked == ["Anthropic/hh-rlhf/harmless-base"]
    with pytest.raises(ValueError, match="format 'records', which is read from a file alone"):
        data.read_entry("a", {"hub": "some/set"}, ".")


@pytest.mark.parametrize("option", ["--data", "--raw"])
def test_options_of_the_real_lab_are_refused_without_it(option, capsys):
    with pytest.raises(SystemExit):
        main([option, "published"])
    assert f"{option} goes with --real" in capsys.readouterr().err


def test_raw_files_need_their_folder():
    with pytest.raises(ValueError, match="say by --raw in which folder"):
        real.read(real.PLAN, "published", None)


def test_a_part_has_the_data_of_the_whole(tmp_path):
    (tmp_path / "whole.yaml").write_text(METHODS.read_text())
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({"of": "whole.yaml", "methods": ["naive tuning"]}))
    assert real.read(tmp_path / "part.yaml", "own", None) == real.read(real.PLAN, "own", None)


def test_an_unknown_choice_of_data_is_named():
    with pytest.raises(ValueError, match="--data is 'none'; the plan has 'own', 'published'"):
        real.read(real.PLAN, "none", ".")


def test_held_out_records_of_published_sets_are_not_trained_on():
    """By their place in the file: an entry of training and a held-out one of the same file take different records."""
    sets = yaml.safe_load(METHODS.read_text())["data"]["published"]["sets"]
    parts = {
        name: (entry["file"], set(range(entry.get("skip", 0), entry.get("skip", 0) + entry["count"])))
        for name, entry in sets.items()
        if entry.get("format") in ("alpaca", "halueval")
    }
    held_out = {name: parts.pop(name) for name in sets if name.startswith("heldout_") and name in parts}
    assert held_out.keys() == {"heldout_ordinary", "heldout_questions"}
    for name, (file, records) in held_out.items():
        others = {other: taken for other, (other_file, taken) in parts.items() if other_file == file}
        assert others
        for other, taken in others.items():
            assert not records & taken, (name, other)


@pytest.fixture(scope="module")
def plan():
    return Plan(METHODS, "a key")


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_a_part_has_runs_of_the_whole(path, plan):
    assert Plan(path, "a key").runs.keys() < plan.runs.keys()


def test_all_start_from_one_base_and_quick_is_a_part(plan):
    assert len(set(plan.bases.values())) == 1
    assert all(point.runs[0].parents[0].given for point in plan.comparison if point.method != "merged with the base")
    quick = Plan(real.PLAN, "a key", quick=True)
    assert quick.runs.keys() < plan.runs.keys()


def test_llamafactory_takes_the_options_of_every_run(plan, model_dir, tmp_path):
    from llamafactory.hparams import get_train_args

    files, _ = real.read(real.PLAN, "own", ".")
    (tmp_path / "data").mkdir()
    for name, text in files.items():
        (tmp_path / "data" / name).write_text(text)
    taken = set()
    for run in plan.runs.values():
        if run.options is None or run.seed != 1:
            continue
        write_yaml(run, str(tmp_path), tmp_path / "run.yaml")
        options = yaml.safe_load((tmp_path / "run.yaml").read_text())
        assert not [name for name in options if name.startswith("lab_")]
        parsed = get_train_args({**options, "output_dir": str(tmp_path / "out"), "use_cpu": True})
        assert parsed[3].ogpsa_enabled == options["stage"].startswith("ogpsa_")
        taken.add(run.folder)
    assert len(taken) > 25


def test_weights_go_when_no_run_needs_them(plan, tmp_path):
    point = next(p for p in plan.comparison if p.pipeline == "SFT → DPO" and p.method == "naive tuning")
    sft, dpo = point.runs
    for run in (sft, dpo):
        (tmp_path / run.folder / "train").mkdir(parents=True)
        (tmp_path / run.model / "model.safetensors").write_text("weights")
    runs = list(plan.runs.values())
    others = {run.folder for run in runs} - {sft.folder}
    remove_models(runs, others, tmp_path)
    assert (tmp_path / sft.model / "model.safetensors").exists()  # the DPO after it starts from it
    remove_models(runs, set(), tmp_path)
    assert not list(tmp_path.glob("runs/*/train/*.safetensors"))


def test_a_run_whose_weights_are_gone_is_made_again_only_where_it_is_needed(plan, tmp_path):
    runs = list(plan.runs.values())
    for run in runs:
        (tmp_path / run.folder).mkdir(parents=True)
        (tmp_path / run.folder / "result.json").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("weights")
    assert find_waiting(runs, tmp_path) == []
    point = next(p for p in plan.comparison if p.pipeline == "SFT → DPO" and p.method == "LoRA")
    (tmp_path / point.runs[1].folder / "result.json").unlink()
    assert find_waiting(runs, tmp_path) == list(point.runs)
    (tmp_path / point.runs[0].model).mkdir()
    (tmp_path / point.runs[0].model / "model.safetensors").write_text("weights")
    assert find_waiting(runs, tmp_path) == [point.runs[1]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A lab of two steps on the small language's untrained model, from nothing to the report."""
    folder = tmp_path_factory.mktemp("real")
    tiny_model.main([str(folder / "model")])
    spec = yaml.safe_load(METHODS.read_text())
    spec["model"]["source"] = str(folder / "model")
    entries = {
        "safety_sft": "safety_sft",
        "general_helpful": "general_helpful",
        "general_truthful": "general_truthful",
    }
    for kind in ("harmful", "benign", "general"):
        entries[f"heldout_{kind}"] = f"heldout_{kind}"
    sets = {name: {"file": f"{file}.json", "count": 24} for name, file in entries.items()}
    spec["data"] = {"own": {"folder": str(ROOT / "data" / "tiny"), "sets": sets}}
    spec["common"] = {"template": "chatml", "cutoff_len": 64, "use_cpu": True, "save_strategy": "no"}
    spec["stages"]["sft"] |= {"max_steps": 2}
    spec |= {"pipelines": {"SFT": ["sft"]}, "seeds": [1]}
    names = ["naive tuning", "merged with the base", "OSF", "conflict, scope global, few samples"]
    spec["methods"] = {name: spec["methods"][name] for name in names}
    (folder / "lab.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    command = [sys.executable, "-m", "lab", "--real", "--plan", str(folder / "lab.yaml")]
    command += ["--lab-dir", str(folder / "lab"), "--output", str(folder / "out")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return folder


def of(folder, word):
    """Read the result of the run whose name has a word."""
    (path,) = (folder / "lab" / "runs").glob(f"*{word}*/result.json")
    return json.loads(path.read_text())


@pytest.mark.cli
def test_a_small_lab_writes_its_report(small):
    text = (small / "out" / "results-real.md").read_text()
    for method in ("base model", "naive tuning", "merged with the base", "OSF", "conflict, scope global, few samples"):
        assert f"| {method} |" in text
    assert (small / "out" / "images" / "lab_real.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "| not measured |" in text
    shares = of(small, "base-seed")["scores"]["shares"]
    assert shares.keys() == {"harmful", "benign", "general"}
    assert not list((small / "lab" / "runs").glob("*/*/*.safetensors"))


@pytest.mark.cli
def test_osf_changes_the_model_and_not_as_naive_tuning_does(small):
    losses = [of(small, word)["scores"]["losses"]["general"] for word in ("base-seed", "sft-osf", "sft-naive")]
    assert len(set(losses)) == 3


# Instructions that every answer follows, and none.
PROMPTS = [
    {"key": 1, "prompt": "Say these words again: stone.", "instruction_id_list": ["length_constraints:number_words"]},
    {"key": 2, "prompt": "What is 1 plus 2?", "instruction_id_list": ["length_constraints:number_words"]},
]
PROMPTS[0]["kwargs"] = [{"relation": "less than", "num_words": 1000}]
PROMPTS[1]["kwargs"] = [{"relation": "at least", "num_words": 1000}]


def test_the_first_prompts_of_ifeval_are_taken_where_the_file_is_there(tmp_path):
    entry = write_raw(tmp_path, "raw.jsonl", "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS)) | {"count": 1}
    assert ifeval.read_prompts(entry, tmp_path) == json.dumps(PROMPTS[0]) + "\n"
    assert ifeval.read_prompts(entry | {"file": "nowhere.jsonl"}, tmp_path) is None
    punkt = PROMPTS[0] | {"instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{}]}
    entry = write_raw(tmp_path, "raw.jsonl", "".join(json.dumps(prompt) + "\n" for prompt in (punkt, *PROMPTS)))
    entry |= {"count": 1}
    assert ifeval.read_prompts(entry, tmp_path) == json.dumps(PROMPTS[0]) + "\n"
    with pytest.raises(ValueError, match="asks for 3 prompts; .* has 2"):
        ifeval.read_prompts(entry | {"count": 3}, tmp_path)
    with pytest.raises(ValueError, match="needed are file and count"):
        ifeval.read_prompts({"file": "raw.jsonl"}, tmp_path)
    for line in ('{"prompt": "Hi"}', "{", "[]"):
        (tmp_path / "raw.jsonl").write_text(f"{json.dumps(PROMPTS[0])}\n{line}\n")
        with pytest.raises(ValueError, match="line 2, is not a prompt"):
            ifeval.read_prompts(entry, tmp_path)


def test_what_ifeval_lacks_is_named(tmp_path, monkeypatch, capsys):
    assert ifeval.measure(tmp_path / "model", tmp_path) is None
    assert "IFEval is not measured: its prompts" in capsys.readouterr().out
    (tmp_path / ifeval.FILE).write_text(json.dumps(PROMPTS[0]))
    monkeypatch.setattr(ifeval, "PACKAGES", ("no_such_package",))
    assert ifeval.measure(tmp_path / "model", tmp_path) is None
    assert "the package no_such_package" in capsys.readouterr().out


@pytest.mark.cli
def test_ifeval_scores_a_model_by_the_harness(tmp_path):
    for name in ifeval.PACKAGES:
        pytest.importorskip(name, reason="needs lm_eval[hf,ifeval]")
    tiny_model.main([str(tmp_path / "model")])
    (tmp_path / ifeval.FILE).write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    assert ifeval.measure(tmp_path / "model", tmp_path, max_new_tokens=8) == 0.5
