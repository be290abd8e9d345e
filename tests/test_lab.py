"""The alignment-tax lab: its data, its list of runs, and a small lab from the untrained model to the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.alignment_tax import HERE, data, report  # noqa: E402
from benchmarks.alignment_tax.plan import Plan, reference_samples, write_yaml  # noqa: E402
from benchmarks.alignment_tax.results import Results  # noqa: E402


@pytest.fixture(scope="module")
def sets():
    return data.build_sets()


@pytest.fixture(scope="module")
def plan():
    return Plan(HERE / "lab.yaml", "a key")


def prompts(records):
    return {rec["conversations"][0]["value"] if "chosen" in rec else rec["instruction"] for rec in records}


def test_no_held_out_prompt_is_trained_on(sets):
    trained = set().union(*(prompts(records) for name, records in sets.items() if not name.startswith("heldout")))
    for name in ("general", "harmful", "benign"):
        held_out = sets[f"heldout_{name}"]
        assert len(prompts(held_out)) == len(held_out)
        assert not prompts(held_out) & trained


def test_safety_training_sees_plain_wordings_alone(sets):
    unseen = [form.split("{}")[0] for form in data.REPHRASED_FORMS + data.ROLE_PLAY_FORMS]
    for name in ("safety_sft", "safety_dpo"):
        assert not [p for p in prompts(sets[name]) if p.startswith(tuple(unseen))]
    kinds = {rec["task"] for rec in sets["heldout_harmful"]}
    assert kinds == {"harmful", "harmful_rephrased", "harmful_role_play"}


def test_reference_sets_have_the_same_size_and_lack_what_they_say(sets):
    names = [name for name in sets if name.startswith(("general_helpful", "general_truthful"))]
    assert {len(sets[name]) for name in names} == {200}
    for name in names:
        if "_without_" in name:
            assert name.split("_without_")[1] not in {rec["task"] for rec in sets[name]}


def test_a_wrong_answer_is_wrong(sets):
    pairs = sets["general_helpful_pairs"] + sets["general_truthful_pairs"]
    differing = [rec for rec in pairs if rec["chosen"] != rec["rejected"]]
    assert len(differing) > 0.97 * len(pairs)  # a list of words may be its own reverse, or in order already


def test_parents_come_first_and_equal_runs_are_one(plan):
    seen = set()
    for run in plan.runs.values():
        assert all(parent.folder in seen for parent in run.parents)
        assert run.folder not in seen
        seen.add(run.folder)
    compared = {point.runs[-1].folder for point in plan.comparison}
    same = [
        point.runs[-1].folder for point in plan.studies["interval"] if point.setting == (("ogpsa_update_interval", 5),)
    ]
    assert len(same) == len(plan.spec["seeds"])
    assert compared.issuperset(same)


def test_a_changed_definition_is_another_run_and_so_is_what_starts_from_it(tmp_path):
    spec = yaml.safe_load((HERE / "lab.yaml").read_text())
    spec["stages"]["sft"]["max_steps"] += 1
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    before, after = Plan(HERE / "lab.yaml", "a key"), Plan(path, "a key")
    for old, new in zip(before.comparison, after.comparison, strict=True):
        assert (old.runs[-1].folder == new.runs[-1].folder) == (old.pipeline == "DPO")
    assert not {run.folder for run in before.runs.values()} & {
        run.folder for run in Plan(HERE / "lab.yaml", "other data").runs.values()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, "Unknown section 'sedes'"),
        ({"studies": {"a": {"pipeline": "KTO", "methods": ["LoRA"], "settings": [{}]}}}, "Unknown pipeline 'KTO'"),
        ({"studies": {"a": {"pipeline": "SFT", "methods": ["lora"], "settings": [{}]}}}, "Unknown method 'lora'"),
        ({"studies": {"a": {"pipeline": "SFT", "method": ["LoRA"]}}}, "Unknown key of a study 'method'"),
    ],
)
def test_unknown_names_are_refused(change, message, tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((HERE / "lab.yaml").read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Plan(path, "")


def test_llamafactory_takes_the_options_of_every_run(plan, tmp_path, monkeypatch):
    from llamafactory.hparams import get_train_args

    taken = set()
    for run in plan.runs.values():
        if run.options is None:
            continue
        write_yaml(run, "outputs/lab", tmp_path / "run.yaml")
        options = yaml.safe_load((tmp_path / "run.yaml").read_text())
        key = json.dumps({k: v for k, v in run.options.items() if k != "seed"}, sort_keys=True)
        if key not in taken:
            parsed = get_train_args({**options, "use_cpu": True, "output_dir": str(tmp_path / "out")})
            assert parsed[3].ogpsa_enabled == options["stage"].startswith("ogpsa_")
            taken.add(key)
    assert len(taken) > 50


def test_reference_samples_are_counted():
    options = {"stage": "ogpsa_sft", "ogpsa_dataset": "a,b", "ogpsa_num_samples": 200, "ogpsa_update_interval": 30}
    assert reference_samples({**options, "max_steps": 200}) == 7 * 400  # before steps 1, 31, …, 181
    assert reference_samples({**options, "max_steps": 60, "ogpsa_refresh_samples": 50}) == 2 * 100
    assert reference_samples({"stage": "sft", "max_steps": 60}) == 0


SMALL = {
    "seeds": [1],
    "base": {"num_train_epochs": 1.0, "max_steps": 30},
    "curves": {"sft": 2},
    "pipelines": {"SFT": ["sft"], "SFT → DPO": ["sft", "dpo"]},
    "studies": {
        "interval": {
            "title": "K",
            "axis": "ogpsa_update_interval",
            "pipeline": "SFT",
            "methods": ["OGPSA, scope parameter"],
            "settings": [{"ogpsa_update_interval": 2}, {"ogpsa_update_interval": 5}],
        },
        "interference": {
            "title": "Watched",
            "axis": "ogpsa_method",
            "pipeline": "SFT",
            "methods": ["OGPSA, scope parameter"],
            "settings": [{"ogpsa_method": "monitor"}],
        },
        "frontier": {
            "title": "Frontier",
            "axis": "cost",
            "pipeline": "SFT",
            "methods": ["OGPSA, scope parameter"],
            "settings": [{"ogpsa_update_interval": 5}, {"ogpsa_update_interval": 5, "ogpsa_refresh_samples": 4}],
        },
    },
}


def run_lab(folder, check=True):
    command = [sys.executable, "-m", "benchmarks.alignment_tax", "--plan", str(folder / "lab.yaml")]
    command += ["--lab-dir", str(folder / "lab"), "--output", str(folder / "out"), "--jobs", "2"]
    return subprocess.run(command, cwd=ROOT, check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def small_spec():
    """The lab's file with fewer and shorter runs."""
    spec = yaml.safe_load((HERE / "lab.yaml").read_text())
    for name, changes in SMALL.items():
        spec[name] = {**spec[name], **changes} if name == "base" else changes
    for stage in spec["stages"].values():
        stage["max_steps"] = 5
    methods = ["naive tuning", "LoRA", "merged with the base", "OGPSA, scope parameter"]
    spec["methods"] = {name: spec["methods"][name] for name in methods}
    for stage in ("sft", "dpo"):
        spec["methods"]["OGPSA, scope parameter"][stage] |= {"ogpsa_num_samples": 20, "logging_steps": 1}
    return spec


@pytest.fixture(scope="module")
def lab(small_spec, tmp_path_factory):
    """A lab of a few steps, from nothing."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab.yaml").write_text(yaml.safe_dump(small_spec, sort_keys=False))
    run_lab(folder)
    return folder


# General ability, refusal, over-refusal of the base and of each method's run, in every pipeline.
SCORES = {
    "base": (0.95, 0.0, 0.0),
    "naive tuning": (0.65, 1.0, 0.9),
    "LoRA": (0.7, 1.0, 0.8),
    "merged with the base": (0.9, 0.5, 0.0),
    "OGPSA, scope parameter": (0.86, 0.98, 0.3),
}


def invent_results(plan, folder):
    """Write results as runs would leave them, of known scores."""
    methods = {point.runs[-1].folder: point for point in (*plan.studies["frontier"], *plan.comparison)}
    for run in plan.runs.values():
        point = methods.get(run.folder)
        general, refusal, over_refusal = SCORES["base" if point is None else point.method]
        samples = reference_samples(run.options) if run.options and "max_steps" in run.options else 0
        if point is not None and ("ogpsa_refresh_samples", 4) in point.setting:
            general -= 0.004  # cheaper, and nearly as good
        scores = {"general": general, "refusal": refusal, "over_refusal": over_refusal, "tasks": {"add": general}}
        scores["refusal_kinds"] = dict.fromkeys(data.HELD_OUT_HARMFUL, refusal)
        scores["over_refusal_kinds"] = {"kind": over_refusal}
        result = {"scores": scores, "seconds": 10.0 + samples / 100, "memory": 2**30 + samples, "curve": []}
        result |= {"train_samples": 80 if run.options else 0, "reference_samples": samples, "dataset_sizes": [800]}
        path = folder / run.folder / "train"
        path.mkdir(parents=True)
        (path.parent / "result.json").write_text(json.dumps(result))
        row = {"step": 5, "cosine": {"a": -0.5, "b": 0.1}, "projected_cosine": {"a": 0.0, "b": 0.0}}
        (path / "ogpsa_log.jsonl").write_text(json.dumps(row) + "\n")


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_report_judges_by_the_means_and_finds_the_cheapest_setting(small_spec, tmp_path, monkeypatch):
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(small_spec | {"curves": {}}, sort_keys=False))
    plan = Plan(tmp_path / "lab.yaml", "a key")
    invent_results(plan, tmp_path / "lab")
    text = report.write(plan, tmp_path / "lab", tmp_path / "out").read_text()
    ogpsa = lines_of(text, "| OGPSA, scope parameter | 0.860 | 70% |")  # (0.86 - 0.65) / (0.95 - 0.65)
    assert len(ogpsa) == len(small_spec["pipelines"])
    assert lines_of(text, "| naive tuning | 0.650 |  | 1.000 | 0.900 |")
    assert lines_of(text, "- OGPSA, scope parameter: met")
    cheapest = next(line for line in text.splitlines() if line.startswith("The cheapest setting"))
    assert "update interval 5, refresh samples 4**, 0.10 reference samples" in cheapest

    monkeypatch.setitem(SCORES, "OGPSA, scope parameter", (0.79, 0.96, 0.46))
    invent_results(plan, tmp_path / "worse")
    text = report.write(plan, tmp_path / "worse", tmp_path / "out").read_text()
    assert lines_of(text, "- OGPSA, scope parameter: **missed: general, refusal, over-refusal**")


@pytest.mark.cli
def test_the_report_tells_what_the_runs_left(lab):
    plan = Plan(lab / "lab.yaml", (lab / "lab" / "data_key.txt").read_text())
    text = (lab / "out" / "results.md").read_text()
    results = Results(plan, lab / "lab")
    assert len(results.comparison) == 2 * 4
    ogpsa = results.comparison.query("method == 'OGPSA, scope parameter' and pipeline == 'SFT'").iloc[0]
    assert ogpsa.cost == 1 * 40 / (5 * 16)
    log = results.log(ogpsa.point.runs[-1])
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert [entry["step"] for entry in results.read(ogpsa.point.runs[-1])["curve"]] == [2, 4]
    for name in ("comparison", "curves", "interval", "cosine", "frontier"):
        assert (lab / "out" / "images" / f"lab_{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"images/lab_{name}.png" in text


@pytest.mark.cli
def test_merged_weights_lie_between(lab):
    from safetensors.torch import load_file

    plan = Plan(lab / "lab.yaml", (lab / "lab" / "data_key.txt").read_text())
    merged = next(run for run in plan.runs.values() if run.options is None)
    base, tuned, between = (
        load_file(lab / "lab" / run.model / "model.safetensors") for run in (*merged.parents, merged)
    )
    for name, weight in between.items():
        assert weight.equal(base[name].lerp(tuned[name], 0.5))
    assert any(not weight.equal(base[name]) for name, weight in between.items())


@pytest.mark.cli
def test_a_run_by_hand_and_a_repeated_one_give_the_same_and_finished_ones_stay(lab, tmp_path):
    run = next((lab / "lab" / "runs").glob("sft-ogpsa*/train.yaml"))
    options = yaml.safe_load(run.read_text()) | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    command = [str(Path(sys.executable).with_name("llamafactory-cli")), "train", str(tmp_path / "run.yaml")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first = (run.parent / "train" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first

    result = run.parent / "result.json"
    scores = json.loads(result.read_text())["scores"]
    result.unlink()  # as an interruption leaves it
    others = {path: path.stat().st_mtime_ns for path in (lab / "lab" / "runs").glob("*/result.json")}
    run_lab(lab)
    assert json.loads(result.read_text())["scores"] == scores
    assert (run.parent / "train" / "model.safetensors").read_bytes() == first
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


@pytest.mark.cli
def test_a_run_that_fails_is_named_and_not_taken_for_finished(lab):
    run = next((lab / "lab" / "runs").glob("sft-lora*"))
    (run / "result.json").unlink()
    hidden = (lab / "lab" / "data" / "safety_sft.json").rename(lab / "lab" / "data" / "hidden.json")
    try:
        process = run_lab(lab, check=False)
    finally:
        hidden.rename(lab / "lab" / "data" / "safety_sft.json")
    assert process.returncode != 0
    assert f"{run.name} failed" in process.stderr
    assert "run.log" in process.stderr
    assert not (run / "result.json").exists()
