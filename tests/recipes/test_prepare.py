"""`llamafactory-ogpsa prepare`: from raw files to files that LLaMA-Factory reads, or one sentence that says why not."""

import errno
import json
import os
import random
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from raw_records import make_binarized, make_halueval, make_pku, make_ultrafeedback, pku_record, write_lines

from llamafactory_ogpsa.cli import main
from llamafactory_ogpsa.recipes.refusal_rule import is_refusal
from llamafactory_ogpsa.recipes.refusals import TEMPLATE_FILE
from llamafactory_ogpsa.recipes.samples import prompt_key


ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
HALUEVAL = DATA / "halueval_qa.jsonl"
TRANSCRIPTS = DATA / "real" / "hh_harmless_test.jsonl"
INSTRUCTIONS = DATA / "real" / "safety_tuned_llamas.json"
RAW = {
    "safety": make_pku,
    "helpful": make_ultrafeedback,
    "truthful": make_halueval,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the datasets library that ends with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw")
    return {name: write_lines(path / f"{name}.jsonl", make(80)) for name, make in RAW.items()}


def prepare(recipe, source, output, *options):
    return main(["prepare", recipe, "--from", str(source), "--output", str(output), *options])


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def names_of(recipe):
    return [f"{recipe}_{kind}{suffix}" for suffix in ("", "_heldout") for kind in ("sft", "dpo")]


@pytest.mark.parametrize("recipe", RAW)
def test_the_files_hold_the_same_prompts_in_both_forms_and_none_in_both_splits(raw, recipe, tmp_path, capsys):
    assert prepare(recipe, raw[recipe], tmp_path, "--num-samples", "20") == 0
    sft, dpo, sft_held, dpo_held = (read(tmp_path, name) for name in names_of(recipe))
    assert (len(sft), len(sft_held)) == (20, 2)
    for plain, ranking in [(sft, dpo), (sft_held, dpo_held)]:
        assert [(r["instruction"], r["input"], r["output"]) for r in plain] == [
            (r["instruction"], r["input"], r["chosen"]) for r in ranking
        ]
        assert all(r["chosen"] != r["rejected"] and r["rejected"] for r in ranking)
    keys = [{prompt_key(record["instruction"]) for record in records} for records in (sft, sft_held)]
    assert not keys[0] & keys[1]
    assert len(keys[0]) == 20

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 80 records")
    counted = sum(int(line.split()[0]) for line in lines[1:-1] if "_dpo" not in line)
    assert counted == 80


@pytest.mark.parametrize("recipe", RAW)
def test_llamafactory_loads_what_was_written(raw, recipe, tmp_path):
    from llamafactory.data.parser import get_dataset_list

    prepare(recipe, raw[recipe], tmp_path)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert list(info) == names_of(recipe)
    for name, attributes in zip(info, get_dataset_list(list(info), str(tmp_path)), strict=True):
        record = read(tmp_path, name)[0]
        columns = [attributes.prompt, attributes.query]
        columns += [attributes.chosen, attributes.rejected] if attributes.ranking else [attributes.response]
        assert sorted(columns) == sorted(record)
        assert attributes.ranking is ("_dpo" in name)


def test_the_binarized_form_of_ultrafeedback_is_taken_by_its_split(tmp_path):
    for split in ("train_sft", "test_prefs", "train_prefs"):
        write_lines(tmp_path / "raw" / f"{split}.jsonl", make_binarized(4, seed=len(split)))
    (tmp_path / "raw" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in ("test_prefs", "train_sft", "train_prefs"))
        + "---\n"
    )
    assert prepare("helpful", tmp_path / "raw", tmp_path / "out") == 0
    prompts = {r["prompt"] for r in make_binarized(4, seed=len("train_prefs"))}
    written = read(tmp_path / "out", "helpful_dpo") + read(tmp_path / "out", "helpful_dpo_heldout")
    assert {r["instruction"] for r in written} == prompts
    assert all(r["chosen"].startswith("good") and r["rejected"].startswith("bad") for r in written)


def test_the_configuration_is_taken_where_there_are_several(tmp_path, capsys):
    folder = tmp_path / "raw"
    write_lines(folder / "qa.jsonl", make_halueval(5))
    write_lines(folder / "dialogue.jsonl", [{"dialogue_history": "x"}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: data\n    path: {name}.jsonl\n"
        for name in ("dialogue", "qa")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert prepare("truthful", folder, tmp_path / "out") == 0
    assert len(read(tmp_path / "out", "truthful_sft")) == 4
    assert prepare("helpful", folder, tmp_path / "out") == 2
    assert "has no configuration default; found: dialogue, qa" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl.gz"])
def test_other_kinds_of_file_are_read_alike(raw, kind, tmp_path):
    import gzip

    import pandas as pd

    records = make_pku(30)
    source = tmp_path / f"raw.{kind}"
    if kind == "parquet":
        pd.DataFrame(records).to_parquet(source)
    elif kind == "json":
        source.write_text(json.dumps(records))
    else:
        source.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    assert prepare("safety", source, tmp_path / "out") == 0
    assert prepare("safety", write_lines(tmp_path / "raw.jsonl", records), tmp_path / "plain") == 0
    for name in names_of("safety"):
        assert read(tmp_path / "out", name) == read(tmp_path / "plain", name)


def test_a_file_is_found_from_the_current_folder(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(raw["safety"]).parent)
    assert prepare("safety", "safety.jsonl", tmp_path / "out") == 0
    assert prepare("safety", "nowhere/../safety.jsonl", tmp_path / "out") == 2  # no such folder
    assert len(read(tmp_path / "out", "safety_sft")) > 20


@pytest.mark.parametrize("name", ["link.jsonl", "raw[1].jsonl", "data[1]/raw.jsonl"])
def test_links_and_names_that_are_patterns_are_files(name, raw, tmp_path):
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    if name.startswith("link"):
        (tmp_path / "blob").write_bytes(Path(raw["safety"]).read_bytes())
        source.symlink_to("blob")  # as the hub's cache has them
    else:
        source.write_bytes(Path(raw["safety"]).read_bytes())
    assert prepare("safety", source, tmp_path / "out") == 0
    assert prepare("safety", raw["safety"], tmp_path / "plain") == 0
    assert read(tmp_path / "out", "safety_dpo") == read(tmp_path / "plain", "safety_dpo")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(raw, tmp_path):
    for folder, seed in [("a", "3"), ("b", "3"), ("c", "4")]:
        prepare("safety", raw["safety"], tmp_path / folder, "--seed", seed)
    prepare("safety", raw["safety"], tmp_path / "a", "--seed", "3")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert (tmp_path / "a" / "safety_sft.json").read_bytes() != (tmp_path / "c" / "safety_sft.json").read_bytes()


def test_other_entries_stay_as_they_are(raw, tmp_path):
    others = {"mine": {"file_name": "mine.json", "größe": [1, 2.50, None]}, "hub": {"hf_hub_url": "a/b", "x": {}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(others))
    for recipe in RAW:
        assert prepare(recipe, raw[recipe], tmp_path) == 0
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    assert list(info) == ["mine", "hub"] + [name for recipe in RAW for name in names_of(recipe)]
    assert {name: info[name] for name in others} == others


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ('{"safety_sft": {"file_name": "safety_sft.json"}}', "has another entry safety_sft"),
        ('{"mine": {"file_name": "safety_dpo_heldout.json"}}', "has another entry mine"),
        ('{"mine": {"file_name": "./safety_sft.json"}}', "has another entry mine"),
        ('{"mine": ', "is not a JSON object"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_a_dataset_info_that_is_not_ours_to_change_stops_before_any_file(raw, info, message, tmp_path, capsys):
    (tmp_path / "dataset_info.json").write_text(info)
    assert prepare("safety", raw["safety"], tmp_path) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "dataset_info.json").read_text() == info
    assert [file.name for file in tmp_path.iterdir()] == ["dataset_info.json"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"prompt": "p", "response_a": "x"}\n', ["is_response_0_safe", "are missing; found: [prompt, response_a]"]),
        (json.dumps(pku_record("p")).encode()[:-9], ["raw.jsonl cannot be read", "cut off: JSON parse error"]),
        (json.dumps(pku_record("p")).encode() + b'\n{"prompt": "q"\n{}\n', ["raw.jsonl cannot be read", "in row 1."]),
        (b'[{"prompt": "p"}, ', ["raw.jsonl cannot be read", "cut off"]),
        (b"", ["raw.jsonl is empty"]),
        (bytes(range(128, 192)), ["raw.jsonl cannot be read", "in row 0."]),
        (
            json.dumps(pku_record("p", safe=(True, True))).encode(),
            ["none of the 1 records can be used (1 × no answer marked unsafe, with its severity)"],
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_sentence(tmp_path, capfd, content, told):
    source = tmp_path / "raw.jsonl"
    source.write_bytes(content)
    assert prepare("safety", source, tmp_path / "out") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("Generating", "\r"))]
    assert len([line for line in lines if line.startswith("llamafactory-ogpsa: ")]) == 1
    assert "Traceback" not in "".join(lines)
    assert all(part in lines[-1] for part in told), lines
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_dataset_on_the_hub_is_named_after_it(tmp_path, monkeypatch):
    import datasets

    records = [
        {"chosen": f"\n\nHuman: {i}\n\nAssistant: a", "rejected": f"\n\nHuman: {i}\n\nAssistant: b"} for i in "xyz"
    ]
    asked = []

    def load_dataset(name, config, data_dir=None):
        asked.append((name, config, data_dir))
        return {"train": datasets.Dataset.from_list(records)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    assert prepare("safety", "Anthropic/hh-rlhf/harmless-base", tmp_path) == 0
    assert prepare("safety", "Anthropic/hh-rlhf", tmp_path) == 0
    assert asked == [("Anthropic/hh-rlhf", "default", folder) for folder in ("harmless-base", None)]


def test_a_renamed_column_is_told_for_each_recipe(raw, tmp_path, capsys):
    for recipe, source, told in [
        (
            "helpful",
            raw["truthful"],
            "[instruction, completions] or [prompt, chosen, rejected] or [chosen, rejected] are missing",
        ),
        ("truthful", raw["helpful"], "[knowledge, question, right_answer, hallucinated_answer] are missing"),
    ]:
        assert prepare(recipe, source, tmp_path) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "found: [" in error


def test_records_that_are_not_utf8_are_counted_and_dropped(tmp_path, capsys):
    lines = [json.dumps(record).encode() for record in make_pku(30)]
    lines[4] = json.dumps(pku_record("cafX")).encode().replace(b"cafX", b"caf\xe9")
    (tmp_path / "raw.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert prepare("safety", tmp_path / "raw.jsonl", tmp_path / "out") == 0
    assert "1  dropped: text that is not UTF-8" in capsys.readouterr().out
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join(lines[:4] + lines[5:]) + b"\n")
    assert prepare("safety", tmp_path / "clean.jsonl", tmp_path / "clean") == 0
    assert read(tmp_path / "out", "safety_sft") == read(tmp_path / "clean", "safety_sft")


def test_what_is_nowhere_is_told_without_a_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert main(["prepare", "safety", "--output", "out"]) == 2
    assert "PKU-Alignment/PKU-SafeRLHF is no local file or folder, and the hub" in capsys.readouterr().err


@pytest.mark.skipif(not HALUEVAL.is_file(), reason="no ../shared/data/halueval_qa.jsonl beside the checkout")
def test_real_halueval_records(tmp_path, capsys):
    assert prepare("truthful", HALUEVAL, tmp_path) == 0
    published = {r["question"].strip(): r for r in map(json.loads, HALUEVAL.read_text(encoding="utf-8").splitlines())}
    written = read(tmp_path, "truthful_dpo") + read(tmp_path, "truthful_dpo_heldout")
    assert len(written) > 450
    for record in written:
        original = published[record["instruction"]]
        assert record["chosen"] == original["right_answer"].strip()
        assert record["rejected"] == original["hallucinated_answer"].strip()
        assert record["input"] == original["knowledge"].strip()


@pytest.mark.parametrize("recipe", ["safety", "helpful"])
@pytest.mark.skipif(not TRANSCRIPTS.is_file(), reason="no ../shared/data/real/hh_harmless_test.jsonl")
def test_real_transcripts_reach_llamafactory_turn_by_turn(recipe, tmp_path, capsys):
    """Put together again, what LLaMA-Factory reads is what was published, but for the white space around turns."""
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list

    def bare(text):
        return "".join(text.split())

    pairs = [json.loads(line) for line in TRANSCRIPTS.read_text(encoding="utf-8").splitlines()]
    published = {kind: {bare(pair[kind]) for pair in pairs} for kind in ("chosen", "rejected")}
    assert prepare(recipe, TRANSCRIPTS, tmp_path, "--num-samples", "5000") == 0
    report = capsys.readouterr().out
    counted = sum(int(line.split()[0]) for line in report.splitlines()[1:-1] if "_dpo" not in line)
    assert counted == len(pairs) == 2312

    (attributes,) = get_dataset_list([f"{recipe}_dpo"], str(tmp_path))
    convert = get_dataset_converter("alpaca", attributes, None)
    records = read(tmp_path, f"{recipe}_dpo")
    # The figures of docs/recipes.md.
    samples = records + read(tmp_path, f"{recipe}_dpo_heldout")
    assert (len(samples), sum(is_refusal(sample["chosen"]) for sample in samples)) == (2253, 188)
    for record in records:
        read_back = convert(record)
        speakers = [f"{ {'user': 'Human', 'assistant': 'Assistant'}[turn['role']] }:" for turn in read_back["_prompt"]]
        turns = [speaker + turn["content"] for speaker, turn in zip(speakers, read_back["_prompt"], strict=True)]
        for kind, answer in zip(("chosen", "rejected"), read_back["_response"], strict=True):
            assert bare("".join([*turns, "Assistant:", answer["content"]])) in published[kind]


@pytest.mark.skipif(not INSTRUCTIONS.is_file(), reason="no ../shared/data/real/safety_tuned_llamas.json")
def test_real_unsafe_instructions_have_no_ranking(tmp_path, capsys):
    published = {(r["instruction"].strip(), r["output"].strip()) for r in json.loads(INSTRUCTIONS.read_text("utf-8"))}
    assert prepare("safety", INSTRUCTIONS, tmp_path / "own", "--num-samples", "2000") == 0
    assert list(read(tmp_path / "own", "dataset_info")) == ["safety_sft", "safety_sft_heldout"]
    written = read(tmp_path / "own", "safety_sft") + read(tmp_path / "own", "safety_sft_heldout")
    assert len(written) == 2200
    assert {(record["instruction"], record["output"]) for record in written} <= published

    assert prepare("safety", INSTRUCTIONS, tmp_path / "ours", "--num-samples", "2000", "--refusals", "templates") == 0
    refused = read(tmp_path / "ours", "safety_sft")
    assert [record["instruction"] for record in refused] == [r["instruction"] for r in written[:2000]]
    assert all(is_refusal(record["output"]) and "{" not in record["output"] for record in refused)
    assert prepare("helpful", INSTRUCTIONS, tmp_path / "other") == 2
    assert "has another schema" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_write_that_fails_leaves_the_folder_as_it_was(raw, tmp_path, monkeypatch, capsys, error, count):
    assert prepare("safety", raw["safety"], tmp_path, "--seed", "1") == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    stock, written = Path.write_text, []

    def fail(path, text, **options):
        stock(path, text, **options)
        written.append(path)
        if len(written) == count:
            raise error

    monkeypatch.setattr(Path, "write_text", fail)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            prepare("safety", raw["safety"], tmp_path, "--seed", "2")
    else:
        assert prepare("safety", raw["safety"], tmp_path, "--seed", "2") == 2
        assert f"cannot write to {tmp_path}: [Errno 28] No space left on device." in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    monkeypatch.undo()
    assert prepare("safety", raw["safety"], tmp_path, "--seed", "2") == 0
    assert (tmp_path / "safety_sft.json").read_bytes() != before["safety_sft.json"]


MEASURE = """
import resource, sys
from llamafactory_ogpsa.cli import main

code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def test_100_000_records_take_less_than_2_gib(tmp_path):
    rng = random.Random(0)
    text = " ".join(f"w{rng.randrange(5000):04}" for _ in range(5000))
    source = tmp_path / "raw.jsonl"
    with open(source, "w") as f:
        for index in range(100_000):
            starts = (rng.randrange(len(text) - 600) for _ in range(3))
            prompt, *answers = (
                text[start : start + size] for start, size in zip(starts, (120, 600, 600), strict=True)
            )
            f.write(json.dumps(pku_record(f"{prompt} {index}", answers)) + "\n")
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, "prepare", "safety", "--from", str(source), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert process.returncode == 0, process.stderr
    assert "100000 records" in process.stdout
    assert "10000  in safety_sft" in process.stdout
    assert int(process.stdout.split()[-1]) < 2 * 2**30


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from llamafactory_ogpsa.cli import main\n"
        "try: main(['prepare', 'safety', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'datasets', 'llamafactory') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
    assert all(option in printed for option in ("--from", "--output", "--seed", "--num-samples", "--refusals"))


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_num_samples_must_be_positive(value, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["prepare", "safety", "--num-samples", value])
    assert exit.value.code == 2
    assert "--num-samples" in capsys.readouterr().err


def test_the_wheel_has_the_templates_and_the_console_script_is_the_command_line():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert TEMPLATE_FILE.name in config["options.package_data"]["llamafactory_ogpsa.recipes"].split()
    script = config["options.entry_points"]["console_scripts"].strip()
    assert script == f"llamafactory-ogpsa = {main.__module__}:{main.__name__}"
