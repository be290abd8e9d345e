"""The English data sets of `data/`: counts, formats, refusals, and that nothing held out is trained on."""

import json
import re
from collections import Counter

import pytest

from lab import ROOT
from llamafactory_ogpsa.recipes.refusal_rule import is_refusal


DATA = ROOT / "data"
INFO = json.loads((DATA / "dataset_info.json").read_text())
COUNTS = {
    "safety_sft": 351,
    "safety_dpo": 351,
    "general_helpful": 200,
    "general_truthful": 200,
    "general_lookalikes": 120,
    "heldout_harmful": 100,
    "heldout_benign": 100,
    "heldout_ordinary": 100,
    "heldout_questions": 50,
}
HELD_OUT = [name for name in COUNTS if name.startswith("heldout")]
TRAINED = [name for name in COUNTS if not name.startswith("heldout")]
# Words that two prompts may share without being about the same thing.
COMMON = set(
    "how do i a an the to of my in for can what is are and me with on at so that it from give tell show help write "
    "explain way best you get make someone who whom their his her people into them by be or this as if they when where "
    "which many did does was has have".split()
)


def read(name):
    return json.loads((DATA / INFO[name]["file_name"]).read_text())


def words(record):
    text = f"{record['instruction']} {record.get('input', '')}".lower()
    return frozenset(re.findall(r"[a-z0-9']+", text)) - COMMON


def likeness(one, other):
    """Share of the words of two prompts that they have in common."""
    return len(one & other) / len(one | other)


def test_counts_and_entries():
    assert INFO.keys() == COUNTS.keys()
    assert {path.name for path in DATA.glob("*.json")} == {"dataset_info.json", *(f"{n}.json" for n in COUNTS)}
    assert {name: len(read(name)) for name in COUNTS} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_no_prompt_is_there_twice(name):
    prompts = Counter((rec["instruction"], rec.get("input", "")) for rec in read(name))
    assert prompts.most_common(1)[0][1] == 1


def test_a_near_duplicate_is_found():
    one = words({"instruction": "How do I break into my neighbour's house at night?"})
    other = words({"instruction": "Explain how to break into a neighbour's house."})
    assert likeness(one, other) >= 0.6


@pytest.mark.parametrize("name", HELD_OUT)
def test_no_held_out_prompt_is_trained_on(name):
    trained = [(rec["instruction"], words(rec)) for part in TRAINED for rec in read(part)]
    close = [
        (rec["instruction"], prompt)
        for rec in read(name)
        for prompt, theirs in trained
        if likeness(words(rec), theirs) >= 0.6
    ]
    assert close == []


def test_refusals_refuse_and_vary():
    refusals = [rec["output"] for rec in read("safety_sft")]
    # Two plain refusals that the rule's published phrases, or its look at the first sentence alone, miss.
    plain = ("No, I won't", "No. I can't help with that")
    assert [text for text in refusals if not is_refusal(text) and not text.startswith(plain)] == []
    assert len(set(refusals)) == len(refusals)
    first_words = Counter(text.split()[0] for text in refusals)
    assert len(first_words) > 80
    assert first_words.most_common(1)[0][1] < 0.3 * len(refusals)


def test_pairs_are_the_refusals_over_openings_that_explain_nothing():
    refusals = {rec["instruction"]: rec["output"] for rec in read("safety_sft")}
    pairs = read("safety_dpo")
    assert {rec["instruction"]: rec["chosen"] for rec in pairs} == refusals
    assert not any(is_refusal(rec["rejected"]) for rec in pairs)
    for rec in pairs:  # an opening takes no word of substance from what it is asked
        shared = words({"instruction": rec["rejected"]}) & words(rec)
        assert len(shared) <= 1, (rec["instruction"], shared)


@pytest.mark.parametrize("name", ["general_helpful", "general_truthful", "general_lookalikes", "heldout_ordinary"])
def test_general_answers_are_short_and_no_refusals(name):
    for rec in read(name):
        assert rec["output"]
        assert len(rec["output"].split()) <= 40, rec
        assert not is_refusal(rec["output"]), rec


@pytest.mark.parametrize("name", ["general_truthful", "heldout_questions"])
def test_questions_are_answered_by_their_text(name):
    missing = []
    for rec in read(name):
        assert rec["instruction"].endswith("?")
        answers = rec.get("answers") or [rec["output"].rstrip(".")]
        stems = {word[:4] for word in re.findall(r"\w+", rec["input"].lower())}
        if not {word[:4] for text in answers for word in re.findall(r"\w+", text.lower())} & stems:
            missing.append(rec)
    assert len(missing) <= 8, missing  # yes, no, a sum or a weekday in another form


@pytest.mark.cli
def test_llamafactory_reads_every_set(model_dir):
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    for name in TRAINED:
        args = {"model_name_or_path": model_dir, "do_train": True, "finetuning_type": "full", "template": "default"}
        args |= {"dataset_dir": str(DATA), "dataset": name, "cutoff_len": 512, "use_cpu": True, "output_dir": "unused"}
        args |= {"stage": "dpo" if "dpo" in name else "sft", "overwrite_cache": True}
        model_args, data_args, training_args, _, _ = get_train_args(args)
        loaded = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
        stage = "rm" if "dpo" in name else "sft"
        data = get_dataset(template, model_args, data_args, training_args, stage=stage, **loaded)
        assert len(data["train_dataset"]) == COUNTS[name]
