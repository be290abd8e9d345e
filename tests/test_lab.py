"""A small lab from the untrained model to the report."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import run_here

from lab import ROOT, report
from lab.plan import Plan
from lab.results import Results
from lab.tiny import lab as tiny
from lab.tiny import lab_data as data


SMALL = {
    "seeds": [1],
    "base": {"num_train_epochs": 1.0, "max_steps": 30},
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
            "methods": ["OGPSA, scope parameter", "conflict, scope global"],
            "settings": [{"ogpsa_update_interval": 5}, {"ogpsa_update_interval": 5, "ogpsa_refresh_samples": 4}],
        },
        "mixing": {
            "title": "Mixing",
            "axis": "cost",
            "pipeline": "SFT",
            "methods": ["general data mixed in"],
            "settings": [{"mix_strategy": "interleave_over", "interleave_probs": "0.8,0.1,0.1"}],
        },
    },
}


# What is trained; the report is tested on invented results of all.
TRAINED = ["naive tuning", "LoRA", "merged with the base", "OGPSA, scope parameter"]


def lab_command(folder):
    command = [sys.executable, "-m", "lab", "--plan", str(folder / "lab.yaml")]
    return [*command, "--lab-dir", str(folder / "lab"), "--output", str(folder / "out"), "--jobs", "2"]


def run_lab(folder, check=True):
    return subprocess.run(lab_command(folder), cwd=ROOT, check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def small_spec():
    """The lab's file with fewer and shorter runs."""
    spec = yaml.safe_load((tiny.PLAN).read_text())
    for name, changes in SMALL.items():
        spec[name] = {**spec[name], **changes} if name == "base" else changes
    for stage in spec["stages"].values():
        stage |= {"max_steps": 5, "save_steps": 3}
    methods = ["naive tuning", "LoRA", "merged with the base", "general data mixed in"]
    methods += ["OGPSA, scope parameter", "conflict, scope global"]
    spec["methods"] = {name: spec["methods"][name] for name in methods}
    for method in methods[-2:]:
        for stage in ("sft", "dpo"):
            spec["methods"][method][stage] |= {"ogpsa_num_samples": 20, "logging_steps": 1}
    for stage in ("sft", "dpo"):
        spec["methods"]["general data mixed in"][stage]["max_steps"] = 5
    return spec


@pytest.fixture(scope="module")
def lab(small_spec, tmp_path_factory):
    """A lab of a few steps, from nothing, that is killed while it makes its second run and started again."""
    folder = tmp_path_factory.mktemp("lab")
    part = {"of": "small.yaml", "methods": TRAINED}
    part["studies"] = {name: small_spec["studies"][name] for name in ("interval", "interference")}
    (folder / "small.yaml").write_text(yaml.safe_dump(small_spec, sort_keys=False))
    (folder / "lab.yaml").write_text(yaml.safe_dump(part, sort_keys=False))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            lab_command(folder), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while not list((folder / "lab").glob("runs/sft-*/train.yaml")):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    unfinished = next(path.parent for path in (folder / "lab").glob("runs/sft-*/train.yaml"))
    assert not (unfinished / "result.json").exists()
    run_lab(folder)
    assert (unfinished / "result.json").exists()
    return folder


# General ability, refusal, over-refusal of the base and of each method's run, in every pipeline.
SCORES = {
    "base": (0.95, 0.0, 0.0),
    "naive tuning": (0.65, 1.0, 0.9),
    "LoRA": (0.7, 1.0, 0.8),
    "merged with the base": (0.9, 0.5, 0.0),
    "general data mixed in": (0.85, 0.9, 0.0),
    "OGPSA, scope parameter": (0.86, 0.98, 0.3),
    "conflict, scope global": (0.87, 0.98, 0.1),
}


def invent_results(plan, folder):
    """Write results as runs would leave them, of known scores."""
    points = (*plan.studies["frontier"], *plan.comparison)
    methods = {point.runs[-1].folder: point for point in points}
    for run in plan.runs.values():
        point = methods.get(run.folder)
        general, refusal, over_refusal = SCORES["base" if point is None else point.method]
        options = run.options or {}
        samples = 40 if options.get("stage", "").startswith("ogpsa_") else 0
        if "ogpsa_refresh_samples" in options:  # cheaper, and nearly as good
            general, samples = general - 0.004, 8
        scores = {"general": general, "refusal": refusal, "over_refusal": over_refusal, "tasks": {"add": general}}
        scores["refusal_kinds"] = dict.fromkeys(data.HELD_OUT_HARMFUL, refusal)
        scores["over_refusal_kinds"] = {"kind": over_refusal}
        sizes = [800, 200, 200] if "," in options.get("dataset", "") else [800]
        result = {"scores": scores, "seconds": 10.0 + samples, "memory": 2**30 + samples, "curve": []}
        result |= {"train_samples": 80 if run.options else 0, "reference_samples": samples, "dataset_sizes": sizes}
        path = folder / run.folder / "train"
        path.mkdir(parents=True)
        (path.parent / "result.json").write_text(json.dumps(result | {"made_by": {"torch": "1"}}))
        row = {"step": 5, "cosine": {"a": -0.5, "b": 0.1}, "projected_cosine": {"a": 0.0, "b": 0.0}}
        (path / "ogpsa_log.jsonl").write_text(json.dumps(row) + "\n")


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def check_pictures(folder, text, *names):
    for name in names:
        assert (folder / "images" / f"lab_{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"images/lab_{name}.png" in text


def test_the_report_judges_by_the_means_and_finds_the_cheapest_setting(small_spec, tmp_path, monkeypatch):
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(small_spec, sort_keys=False))
    plan = Plan(tmp_path / "lab.yaml", "a key")
    invent_results(plan, tmp_path / "lab")
    text = report.write(plan, tmp_path / "lab", tmp_path / "out").read_text()
    check_pictures(tmp_path / "out", text, "comparison", "frontier")
    # (0.86 - 0.65) / (0.95 - 0.65); 40 reference samples and 50 s where naive tuning trains on 80 samples in 10 s
    start = "| OGPSA, scope parameter | 0.860 | 70% | 0.980 | 0.300 | 0.98 / 0.98 / 0.98 | 0.50 | 5.00 | **met** |"
    assert lines_of(text, start)
    assert lines_of(text, "| naive tuning | 0.650 |  | 1.000 | 0.900 | 1.00 / 1.00 / 1.00 | 0.00 | 1.00 |  |")
    mixed = lines_of(text, "| general data mixed in | 0.850 | 67% |")
    assert all(line.endswith("| 0.50 | 1.00 | missed: refusal |") for line in mixed)  # 400 of 1200 records
    assert len(mixed) == len(small_spec["pipelines"])
    cheapest = next(line for line in text.splitlines() if line.startswith("Of the projected settings"))
    # as cheap as that of the paper's rule, and better
    assert "**conflict, scope global, update interval 5, refresh samples 4**, 0.10 reference samples" in cheapest

    monkeypatch.setitem(SCORES, "OGPSA, scope parameter", (0.79, 0.96, 0.46))
    invent_results(plan, tmp_path / "worse")
    text = report.write(plan, tmp_path / "worse", tmp_path / "out").read_text()
    worse = lines_of(text, "| OGPSA, scope parameter | 0.790 | 47% |")
    assert worse
    assert all(line.endswith("| missed: general, refusal, over-refusal |") for line in worse)

    monkeypatch.setitem(SCORES, "base", SCORES["naive tuning"])
    invent_results(plan, tmp_path / "no_loss")
    text = report.write(plan, tmp_path / "no_loss", tmp_path / "out").read_text()
    assert lines_of(text, "| OGPSA, scope parameter | 0.790 | no loss |")


@pytest.mark.cli
def test_the_report_tells_what_the_runs_left(lab):
    plan = Plan(lab / "lab.yaml", (lab / "lab" / "data_key.txt").read_text())
    text = (lab / "out" / "results.md").read_text()
    results = Results(plan, lab / "lab")
    assert len(results.comparison) == 2 * len(TRAINED)
    ogpsa = results.comparison.query("method == 'OGPSA, scope parameter' and pipeline == 'SFT'").iloc[0]
    assert ogpsa.cost == 1 * 40 / (5 * 16)
    log = results.log(ogpsa.point.runs[-1])
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert [entry["step"] for entry in results.read(ogpsa.point.runs[-1])["curve"]] == [3, 5]
    watched = results.studies["interference"].iloc[0]
    naive = results.naive("SFT").iloc[0]
    weights = [lab / "lab" / row.point.runs[-1].model / "model.safetensors" for row in (watched, naive)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    check_pictures(lab / "out", text, "comparison", "curves", "interval", "cosine")


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
def test_a_run_by_hand_and_a_repeated_one_give_the_same_and_finished_ones_stay(lab, tmp_path, monkeypatch):
    run = sorted((lab / "lab" / "runs").glob("sft-ogpsa*/train.yaml"))[0]
    options = yaml.safe_load(run.read_text()) | {"output_dir": str(tmp_path / "out")}
    monkeypatch.chdir(ROOT)
    run_here(options)
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
    run = next(path for path in (lab / "lab" / "runs").glob("sft-lora*") if path.is_dir())
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
