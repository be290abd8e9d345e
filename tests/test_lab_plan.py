"""The lab's list of runs: what is run, what is refused, and what LLaMA-Factory gets."""

import json

import pytest
import yaml

from lab.plan import Plan, write_yaml
from lab.results import count_samples
from lab.tiny import lab as tiny
from lab.tiny import lab_data as data
from lab.train import count_reference_samples


@pytest.fixture(scope="module")
def plan():
    return Plan(tiny.PLAN, "a key")


def test_parents_come_first_and_equal_runs_are_one(plan):
    seen = set()
    for run in plan.runs.values():
        assert all(parent.folder in seen for parent in run.parents)
        assert run.folder not in seen
        seen.add(run.folder)
    compared = {point.runs[-1].folder for point in plan.comparison}
    same_sets = {"ogpsa_dataset": "general_helpful,general_truthful"}
    for study, setting in (("interval", {"ogpsa_update_interval": 5}), ("reference_loss", same_sets)):
        same = [point.runs[-1].folder for point in plan.studies[study] if dict(point.setting) == setting]
        assert same
        assert compared.issuperset(same)


def test_a_changed_definition_is_another_run_and_so_is_what_starts_from_it(tmp_path):
    spec = yaml.safe_load((tiny.PLAN).read_text())
    spec["stages"]["sft"]["warmup_ratio"] = 0.2
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    before, after = Plan(tiny.PLAN, "a key"), Plan(path, "a key")
    for old, new in zip(before.comparison, after.comparison, strict=True):
        assert (old.runs[-1].folder == new.runs[-1].folder) == (old.pipeline == "DPO")
    assert not {run.folder for run in before.runs.values()} & {
        run.folder for run in Plan(tiny.PLAN, "other data").runs.values()
    }


def test_a_part_of_a_plan_has_some_of_its_runs():
    path = tiny.PLAN.with_name("inputs.yaml")
    whole, part = Plan(tiny.PLAN, "a key"), Plan(path, "a key")
    assert part.runs.keys() < whole.runs.keys()
    methods = {point.method for point in part.comparison}
    assert len(methods) == 9
    assert methods == set(yaml.safe_load(path.read_text())["methods"])


def test_a_part_names_what_the_plan_lacks(tmp_path):
    (tmp_path / "lab.yaml").write_text((tiny.PLAN).read_text())
    (tmp_path / "part.yaml").write_text("{of: lab.yaml, methods: [LoRa]}")
    with pytest.raises(ValueError, match="Unknown method 'LoRa'"):
        Plan(tmp_path / "part.yaml", "")


STUDY = {"title": "A", "axis": "cost", "pipeline": "SFT", "methods": ["LoRA"], "settings": [{}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, "Unknown section 'sedes'"),
        ({"seeds": None}, "Missing section 'seeds'"),
        ({"reference": "naive"}, "Unknown method 'naive'"),
        ({"studies": {"a": STUDY | {"pipeline": "KTO"}}}, "Unknown pipeline 'KTO'"),
        ({"studies": {"a": STUDY | {"settings": [{"learning_rate": 1.0}], "methods": ["lora"]}}}, "method 'lora'"),
        ({"studies": {"a": STUDY | {"method": ["LoRA"]}}}, "Unknown key of a study 'method'"),
        ({"studies": {"a": {key: STUDY[key] for key in ("title", "axis")}}}, "Missing key of a study 'methods'"),
        ({"studies": {"a": STUDY | {"axis": "learning_rate"}}}, "Unknown option varied by a study 'learning_rate'"),
        ({"studies": {"a": STUDY | {"seeds": [4]}}}, "Unknown seed 4"),
        ({"methods": {"naive tuning": {"sft": {}}}, "studies": {}}, "Missing stage of a method 'dpo'"),
        (
            {"studies": {"a": STUDY | {"methods": ["merged with the base"], "settings": [{"learning_rate": 1.0e-5}]}}},
            "Unknown option of a merging 'learning_rate'",
        ),
    ],
)
def test_a_list_of_runs_with_a_mistake_is_refused(change, message, tmp_path):
    spec = yaml.safe_load((tiny.PLAN).read_text()) | change
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump({name: section for name, section in spec.items() if section is not None}))
    with pytest.raises(ValueError, match=message):
        Plan(path, "")


def test_llamafactory_takes_the_options_of_every_run(plan, tmp_path):
    from llamafactory.hparams import get_train_args

    (tmp_path / "data").mkdir()
    for name, text in data.render().items():
        (tmp_path / "data" / name).write_text(text)
    taken = set()
    for run in plan.runs.values():
        if run.options is None:
            continue
        write_yaml(run, str(tmp_path), tmp_path / "run.yaml")
        options = yaml.safe_load((tmp_path / "run.yaml").read_text())
        key = json.dumps({k: v for k, v in run.options.items() if k != "seed"}, sort_keys=True)
        if key not in taken:
            parsed = get_train_args({**options, "output_dir": str(tmp_path / "out")})
            assert parsed[3].ogpsa_enabled == options["stage"].startswith("ogpsa_")
            taken.add(key)
    assert len(taken) > 50


def test_safety_and_general_samples_are_counted():
    def result(reference_samples, *sizes):
        return {"train_samples": 240, "reference_samples": reference_samples, "dataset_sizes": sizes}

    assert count_samples(None, {}) == (0, 0)
    assert count_samples({}, result(0, 800)) == (240, 0)
    assert count_samples({}, result(400, 800)) == (240, 400)
    assert count_samples({}, result(0, 800, 200, 200)) == (160, 80)
    assert count_samples({"interleave_probs": "0.5,0.25,0.25"}, result(0, 800, 200, 200)) == (120, 120)


@pytest.mark.parametrize(("options", "expected"), [({"ogpsa_num_samples": 3}, 5), ({"ogpsa_refresh_samples": 1}, 2)])
def test_a_set_counts_with_no_more_samples_than_it_has(options, expected, tmp_path):
    for name, size in {"many": 4, "few": 2}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{}] * size))
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "refresh": true}\n{"step": 1, "loss": 2.0}\n')
    assert count_reference_samples(options | {"ogpsa_dataset": "many,few"}, log, tmp_path) == expected
