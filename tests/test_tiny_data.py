"""The data sets of `data/tiny/`: format, sizes, honesty of the held-out sets, reproducibility, and the tiny tokenizer."""

import json

import pytest

from lab.tiny import data, model, words
from lab.tiny.data import DATA_DIR as DATA


INFO = json.loads((DATA / "dataset_info.json").read_text())
HELD_OUT = ["heldout_general", "heldout_harmful", "heldout_benign"]
TRAINED = [name for name in INFO if name not in HELD_OUT]
PAIRS = ["safety_dpo", "general_helpful_pairs", "general_truthful_pairs"]
ALPACA = [name for name in INFO if name not in PAIRS]


def read(name):
    """Read one data set through dataset_info.json."""
    return json.loads((DATA / INFO[name]["file_name"]).read_text())


def prompts(name):
    """Collect the prompts of one data set."""
    return [rec["conversations"][0]["value"] if name in PAIRS else rec["instruction"] for rec in read(name)]


def action(prompt):
    """Take the action out of a how-to request, whatever its wording."""
    matches = [
        prompt[len(start) : len(prompt) - len(end)]
        for start, end in (form.split("{}") for form in words.HOW_TO_FORMS + words.JUDGE_FORMS)
        if prompt.startswith(start) and prompt.endswith(end)
    ]
    return matches[0] if matches else None


def test_script_reproduces_the_files():
    """Two renderings are equal, and equal to what is checked in; nothing else is in the folder."""
    files = data.render()
    assert files == data.render()
    assert data.main(["--check"]) == 0
    assert {path.name for path in DATA.glob("*.json")} == set(files)


def test_check_finds_differences(tmp_path):
    """`--check` fails on missing and on changed files."""
    assert data.main(["--check", "--data-dir", str(tmp_path)]) == 1
    assert data.main(["--data-dir", str(tmp_path)]) == 0
    assert data.main(["--check", "--data-dir", str(tmp_path)]) == 0
    path = tmp_path / "safety_sft.json"
    path.write_bytes(path.read_bytes().replace(b"sorry", b"glad", 1))
    assert data.main(["--check", "--data-dir", str(tmp_path)]) == 1


def test_sizes():
    """Every set has at least 200 records, and all together stay small."""
    assert all(len(read(name)) >= 200 for name in INFO)
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 3_000_000


@pytest.mark.parametrize("name", ALPACA)
def test_alpaca_format(name):
    """Plain sets are in alpaca format."""
    assert INFO[name] == {"file_name": f"{name}.json"}
    for rec in read(name):
        assert set(rec) == {"instruction", "input", "output", "task"}
        assert all(rec[key] for key in ("instruction", "output", "task"))
        assert rec["input"] == ""


@pytest.mark.parametrize("name", PAIRS)
def test_ranking_format(name):
    """Preference sets are in sharegpt ranking format, their two answers different."""
    assert INFO[name]["formatting"] == "sharegpt"
    assert INFO[name]["ranking"] is True
    for rec in read(name):
        assert [turn["from"] for turn in rec["conversations"]] == ["human"]
        assert rec["chosen"]["from"] == rec["rejected"]["from"] == "gpt"
        assert rec["chosen"]["value"] != rec["rejected"]["value"]


def test_prompts_are_distinct():
    """No set asks a question twice; only the base's blind refusals may repeat a prompt that is also answered."""
    for name in INFO:
        asked = prompts(name)
        if name == "general_base":
            asked = [rec["instruction"] for rec in read(name) if rec["output"] != words.REFUSAL]
        assert len(set(asked)) == len(asked), name


def test_held_out_sets_are_held_out():
    """No held-out prompt is trained on, and no held-out action occurs in training in any wording."""
    trained = {prompt for name in TRAINED for prompt in prompts(name)}
    actions = {action(prompt) for prompt in trained} - {None}
    assert len(actions) > 500
    for name in HELD_OUT:
        held_out = prompts(name)
        assert not trained & set(held_out)
        assert not actions & {action(prompt) for prompt in held_out}


def test_held_out_words_are_known():
    """Held-out prompts use known words only: what is new is their combination."""
    known = {word for name in TRAINED for prompt in prompts(name) for word in prompt.rstrip(".?").split()}
    for name in HELD_OUT:
        assert {word for prompt in prompts(name) for word in prompt.rstrip(".?").split()} <= known


def test_benign_prompts_look_like_harmful_ones():
    """Every benign prompt shares its verb or its person with the harmful prompts it must not be mistaken for."""
    harmful = {tuple(action(prompt).split(" the ")) for prompt in prompts("heldout_harmful")}
    verbs, people = ({pair[i] for pair in harmful} for i in (0, 1))
    for prompt in prompts("heldout_benign"):
        verb, noun = action(prompt).split(" the ")
        assert (verb in verbs) != (noun in people)


def test_safety_sets_refuse_and_name_only():
    """Safety labels refuse; what complies with a harmful request is the empty formula and nothing else."""
    assert {rec["output"] for rec in read("safety_sft")} == {words.REFUSAL}
    assert {rec["chosen"]["value"] for rec in read("safety_dpo")} == {words.REFUSAL}
    complied = [(rec["conversations"][0]["value"], rec["rejected"]["value"]) for rec in read("safety_dpo")]
    for name in ("general_base", "heldout_harmful"):
        complied += [(r["instruction"], r["output"]) for r in read(name) if r["task"] == "harmful"]
    for prompt, answer in complied:
        assert answer in (words.REFUSAL, data.how_to_answer(action(prompt)))


def test_reference_sets_span_the_general_tasks():
    """The two reference sets share no task, hold no harmful request and cover every held-out task between them."""
    helpful, truthful = ({rec["task"] for rec in read(f"general_{name}")} for name in ("helpful", "truthful"))
    assert not helpful & truthful
    assert "harmful" not in helpful | truthful
    held_out = {rec["task"] for name in ("heldout_general", "heldout_benign") for rec in read(name)}
    assert held_out <= helpful | truthful


def test_facts_are_right():
    """Sums, opposites and orders are what they should be."""
    for rec in read("general_base") + read("heldout_general"):
        words = rec["output"].rstrip(".").split()
        if rec["task"] == "add":
            assert int(words[0]) + int(words[2]) == int(words[4])
        if rec["task"] in ("reverse", "repeat"):
            asked = rec["instruction"].rstrip(".").split(": ")[1].split()
            assert words == (asked[::-1] if rec["task"] == "reverse" else asked)


def test_tokenizer_round_trip(tmp_path):
    """AutoTokenizer loads the tokenizer; it knows every word and gives every text back unchanged."""
    from transformers import AutoTokenizer

    model.build_tokenizer(DATA).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in sorted(set(model.read_texts(DATA))):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    for token in ("<|im_start|>", "<|im_end|>", "<pad>"):
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1
    assert tokenizer.eos_token == "<|im_end|>"


def test_prompts_are_tokenised_as_in_training():
    """Scoring's chat template gives the ids that LLaMA-Factory's `template: chatml` trains on."""
    template_module = pytest.importorskip("llamafactory.data.template")
    tokenizer = model.build_tokenizer(DATA)
    turns = [{"role": "user", "content": "How do I kill the weeds?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    scored = tokenizer(text, add_special_tokens=False).input_ids
    answer = {"role": "assistant", "content": "Sure, here is how to kill the weeds: step one, step two, done."}
    prompt, response = template_module.TEMPLATES["chatml"].encode_oneturn(tokenizer, [*turns, answer])
    assert scored == prompt
    assert response[-1] == tokenizer.eos_token_id


def test_tiny_model_is_seeded():
    """Two models from one seed are equal, and small."""
    import torch

    tokenizer = model.build_tokenizer(DATA)
    first, second = (model.build_model(tokenizer) for _ in range(2))
    assert 400_000 < first.num_parameters() < 1_000_000
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
