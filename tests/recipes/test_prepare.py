"""`llamafactory-ogpsa prepare`: from raw files to files that LLaMA-Factory reads, or one sentence that says why not."""

import errno
import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from raw_records import make_binarized, make_halueval, make_pku, make_ultrafeedback, pku_record, write_lines

from llamafactory_ogpsa.cli import main
from llamafactory_ogpsa.recipes.refusals import TEMPLATE_FILE
from llamafactory_ogpsa.recipes.samples import prompt_key


ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("count", [1, 40])
def test_a_second_dataset_that_gives_fewer_sets_stops_before_any_file(raw, count, tmp_path, capsys):
    """40 instructions have no bad answers, so there is no ranking set; of one alone none is held out either."""
    assert prepare("safety", raw["safety"], tmp_path / "out") == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    records = [{"instruction": f"p {i}", "input": "", "output": "no"} for i in range(count)]
    assert prepare("safety", write_lines(tmp_path / "other.jsonl", records), tmp_path / "out") == 2
    stale = [name for name in names_of("safety") if "_dpo" in name or (count == 1 and "_heldout" in name)]
    assert f"dataset_info.json has {', '.join(stale)}, which this run does not write" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


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


def test_a_write_that_fails_leaves_the_folder_as_it_was(raw, tmp_path, monkeypatch, capsys):
    assert prepare("safety", raw["safety"], tmp_path, "--seed", "1") == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    stock = Path.write_text
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        for count in (1, 2, 3, 4, 5):
            written = []

            def fail(path, text, error=error, count=count, written=written, **options):
                stock(path, text, **options)
                written.append(path)
                if len(written) == count:
                    raise error

            with monkeypatch.context() as patch:
                patch.setattr(Path, "write_text", fail)
                if isinstance(error, KeyboardInterrupt):
                    with pytest.raises(KeyboardInterrupt):
                        prepare("safety", raw["safety"], tmp_path, "--seed", "2")
                else:
                    assert prepare("safety", raw["safety"], tmp_path, "--seed", "2") == 2
                    told = f"cannot write to {tmp_path}: [Errno 28] No space left on device."
                    assert told in capsys.readouterr().err
            assert len(written) == count
            assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    assert prepare("safety", raw["safety"], tmp_path, "--seed", "2") == 0
    assert (tmp_path / "safety_sft.json").read_bytes() != before["safety_sft.json"]


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


def test_refusals_that_are_given_empty_are_no_default(raw, tmp_path, capsys):
    assert prepare("safety", raw["safety"], tmp_path, "--refusals", "") == 2
    assert "--refusals '' cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_num_samples_must_be_positive(value, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["prepare", "safety", "--num-samples", value])
    assert exit.value.code == 2
    assert f"--num-samples: {value!r} is not a positive integer" in capsys.readouterr().err


def test_the_wheel_has_the_templates_and_the_console_script_is_the_command_line():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert TEMPLATE_FILE.name in config["options.package_data"]["llamafactory_ogpsa.recipes"].split()
    script = config["options.entry_points"]["console_scripts"].strip()
    assert script == f"llamafactory-ogpsa = {main.__module__}:{main.__name__}"
