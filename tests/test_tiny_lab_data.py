"""The lab's data sets: what is held out, and what each set has and lacks."""

import re

import pytest

from lab.tiny import lab_data as data


@pytest.fixture(scope="module")
def sets():
    return data.build_sets()


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
            whole, task = name.split("_without_")
            assert task not in {rec["task"] for rec in sets[name]}
            assert {rec["instruction"] for rec in sets[whole] if rec["task"] != task} < prompts(sets[name])


def test_held_out_sums_are_asked_in_no_order(sets):
    def addends(name):
        found = [re.findall(r"\d+", rec["instruction"]) for rec in sets[name] if rec["task"] == "add"]
        return {tuple(sorted(map(int, numbers))) for numbers in found}

    assert len(addends("heldout_general")) == data.HELD_OUT["add"]
    assert not addends("heldout_general") & (addends("general_base") | addends("general_truthful"))


def test_a_wrong_answer_is_wrong(sets):
    pairs = sets["general_helpful_pairs"] + sets["general_truthful_pairs"]
    differing = [rec for rec in pairs if rec["chosen"] != rec["rejected"]]
    assert len(differing) > 0.97 * len(pairs)  # a list of words may be its own reverse, or in order already
