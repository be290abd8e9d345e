"""What becomes of raw records: every one is kept or counted, no prompt is there twice, the right answers are taken."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_records import binarized_record, make_pku, pku_record, ultrafeedback_record

from llamafactory_ogpsa.recipes import helpful, safety, transcripts, truthful
from llamafactory_ogpsa.recipes.errors import RecipeError
from llamafactory_ogpsa.recipes.refusals import TEMPLATE_FILE, make_label
from llamafactory_ogpsa.recipes.samples import BEYOND, Sample, collect, prompt_key, split


texts = st.one_of(st.none(), st.text(alphabet="aB \n", max_size=4))
marks = st.sampled_from([True, False, None])
severities = st.sampled_from([0, 1, 2, 3, None])
pku_records = st.builds(
    pku_record,
    texts,
    st.tuples(texts, texts),
    st.tuples(marks, marks),
    st.tuples(severities, severities),
    st.sampled_from([0, 1, None]),
)


def read_pku(records, refusals="templates", seed=0):
    drops = Counter()
    samples = safety.make_pku_samples(records, drops)
    return safety.refuse(samples, drops, make_label(str(refusals), seed)), drops


@given(st.lists(pku_records, max_size=12))
def test_every_record_is_kept_or_counted_and_the_worst_answer_is_rejected(records):
    samples, drops = read_pku(records)
    assert len(samples) + drops.total() == len(records)
    keys = [prompt_key(sample.prompt) for sample in samples]
    assert len(set(keys)) == len(keys)
    for sample in samples:
        unsafe = [
            (record[f"response_{i}_severity_level"], record[f"response_{i}"].strip())
            for record in records
            for i in (0, 1)
            if prompt_key(record["prompt"] or "") == prompt_key(sample.prompt)
            and (record[f"response_{i}"] or "").strip()
            and record[f"is_response_{i}_safe"] is False
            and record[f"response_{i}_severity_level"] is not None
        ]
        assert sample.rejected in {answer for severity, answer in unsafe if severity == max(unsafe)[0]}
        assert sample.answer


def test_records_of_one_prompt_join_their_answers():
    samples, drops = read_pku(
        [
            pku_record("How to  Rob?", ("mild", "kind"), (False, True), (1, 0), 1),
            pku_record("how to rob?", ("cruel", "rude"), (False, False), (3, 2), 1),
            pku_record("How to rob? ", ("late", "later"), (False, False), (3, 3), 0),
        ]
    )
    # "later" is as severe as "cruel", and the less safe of its record like it: the first stays.
    assert [(sample.prompt, sample.rejected) for sample in samples] == [("How to  Rob?", "cruel")]
    assert drops == {"same prompt as an earlier record, whose answers it joined": 2}


def test_of_two_answers_as_severe_the_one_that_is_not_safer_is_rejected():
    for safer, rejected in [(0, "right"), (1, "left")]:
        samples, _ = read_pku([pku_record("p", ("left", "right"), (False, False), (2, 2), safer)])
        assert samples[0].rejected == rejected


def test_prompts_that_nothing_shows_to_be_harmful_are_counted_and_dropped():
    samples, drops = read_pku([pku_record("p", safe=(True, True), severity=(0, 0)), pku_record("q", ("", " "))])
    assert samples == []
    assert drops == {"no answer marked unsafe, with its severity": 1, "empty answers": 1}


def test_templates_are_varied_and_name_the_topic():
    records = [pku_record(f"prompt {i}", topics=["White-Collar Crime"]) for i in range(200)]
    samples, _ = read_pku(records)
    answers = Counter(sample.answer for sample in samples)
    assert len(answers) > 25
    assert max(answers.values()) < 30
    named = sum("white-collar crime" in sample.answer for sample in samples)
    assert 60 < named < 140
    assert not any("{" in sample.answer for sample in samples)
    templates = TEMPLATE_FILE.read_text().splitlines()
    assert len(set(templates)) == len(templates) >= 30


def test_a_refusal_depends_on_the_seed_and_the_prompt_alone():
    records = make_pku(30)
    by_prompt = {sample.prompt: sample.answer for sample in read_pku(records)[0]}
    assert by_prompt == {sample.prompt: sample.answer for sample in read_pku(records[::-1])[0]}
    assert by_prompt != {sample.prompt: sample.answer for sample in read_pku(records, seed=1)[0]}


def test_the_category_is_the_topic_and_no_category_is_fine():
    records = [pku_record(f"prompt {i}") for i in range(40)]
    for record in records[:20]:
        record["response_0_harm_category"] = {"Time Travel": True}
        del record["response_1_harm_category"]
    for record in records[20:]:
        del record["response_0_harm_category"]
    answers = [sample.answer for sample in read_pku(records)[0]]
    assert any("time travel" in answer for answer in answers[:20])
    assert not any("{" in answer for answer in answers)


def test_the_datasets_own_safe_answers_are_refusals_where_there_are_any():
    records = [
        pku_record("p", ("unsafe", "a safe answer")),
        pku_record("q", ("u", "v"), (False, False), (1, 1)),
        pku_record("r", ("same", "same")),
    ]
    samples, drops = read_pku(records, "dataset")
    assert [(sample.prompt, sample.answer) for sample in samples] == [("p", "a safe answer")]
    assert drops == {"no refusal for the prompt": 1, "refusal and unsafe answer are the same": 1}


def test_the_users_refusals_are_taken_line_by_line(tmp_path):
    file = tmp_path / "refusals.txt"
    file.write_text("No.\n\n  Not about {topic}, café.  \n", encoding="utf-8")
    records = [pku_record(f"p {i}", topics=["Violence"]) for i in range(30)] + [pku_record("without topic")]
    answers = {sample.prompt: sample.answer for sample in read_pku(records, file)[0]}
    assert set(answers.values()) == {"No.", "Not about violence, café."}
    assert answers["without topic"] == "No."


def test_the_users_refusals_are_taken_by_prompt(tmp_path):
    file = tmp_path / "refusals.jsonl"
    file.write_text(json.dumps({"prompt": "The  Prompt", "refusal": "Never."}) + "\n")
    samples, drops = read_pku([pku_record("the prompt"), pku_record("another")], file)
    assert [(sample.prompt, sample.answer) for sample in samples] == [("the prompt", "Never.")]
    assert drops == {"no refusal for the prompt": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, "cannot be used (FileNotFoundError("),
        ("latin.txt", "café".encode("latin-1"), "cannot be used (UnicodeDecodeError("),
        ("empty.txt", b"\n\n", "no line for prompts whose topic is not known"),
        ("topics.txt", b"Not {topic}.\n", "no line for prompts whose topic is not known"),
        (
            "a.jsonl",
            b'{"prompt": "p", "refusal": "r"}\n{"prompt": "p"}\n',
            "cannot be used (KeyError('refusal'))",
        ),
        ("b.jsonl", b"[1]\n", "cannot be used (TypeError("),
        ("c.jsonl", b'{"prompt": "p", \n', "cannot be used (JSONDecodeError("),
    ],
)
def test_a_bad_file_of_refusals_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match="--refusals") as caught:
        make_label(str(tmp_path / name), 0)
    assert message in str(caught.value)
    assert "; allowed: templates, dataset, a UTF-8 file with one refusal a line, at least one" in str(caught.value)


def read_helpful(records, binarized=False):
    drops = Counter()
    return collect(records, drops, helpful.make_binarized if binarized else helpful.make_raw), drops


def test_the_best_completion_is_chosen_and_the_worst_rejected():
    samples, drops = read_helpful(
        [
            ultrafeedback_record("q", ["bad", " best ", "worst", ""], [5.0, 9.5, 2.0, 10.0]),
            ultrafeedback_record(" Q", ["x", "y"], [1.0, 2.0]),
            ultrafeedback_record("tie", ["x", "y"], [4.0, 4.0]),
            ultrafeedback_record("same", ["x", "x "], [4.0, 5.0]),
            ultrafeedback_record("one", ["x", "y"], [4.0, None]),
            ultrafeedback_record("none", [], []),
            ultrafeedback_record("", ["x", "y"], [1.0, 2.0]),
        ]
    )
    assert samples == [Sample("q", "best", "worst")]
    assert drops == {
        "same prompt as an earlier record": 1,
        "all answers have the same score": 1,
        "good and bad answer are the same": 1,
        "fewer than two answers with text and score": 2,
        "empty prompt": 1,
    }


def test_the_binarized_form_is_read_turn_by_turn():
    long = binarized_record("long", "x", "y")
    long["chosen"] = long["chosen"] * 2
    samples, drops = read_helpful(
        [binarized_record("p", "good", "bad"), long, binarized_record("e", " ", "y"), binarized_record("s", "x", "x")],
        binarized=True,
    )
    assert samples == [Sample("p", "good", "bad")]
    assert drops == {"more than one turn": 1, "empty answer": 1, "good and bad answer are the same": 1}


def test_columns_that_hold_something_else_are_refused():
    renamed = ultrafeedback_record("q", ["x", "y"], [1.0, 2.0])
    renamed["completions"] = [{"response": "x", "score": 1.0}]
    with pytest.raises(RecipeError, match=r"\[overall_score\] are missing; found: \[response, score\]"):
        read_helpful([renamed])
    with pytest.raises(RecipeError, match="completions has another schema: it holds no list"):
        read_helpful([{"instruction": "q", "completions": 7}])
    with pytest.raises(RecipeError, match="chosen has another schema"):
        read_helpful([{"prompt": "p", "chosen": "text", "rejected": "text"}], binarized=True)


def test_halueval_questions_keep_their_text():
    record = {"knowledge": "k", "question": "Q?", "right_answer": "r", "hallucinated_answer": "h"}
    bad = [{**record, "question": " "}, {**record, "right_answer": None}, {**record, "hallucinated_answer": "r"}]
    drops = Counter()
    samples = collect([record, {**record, "question": "q?"}, *bad], drops, truthful.make_sample)
    assert samples == [Sample("Q?", "r", "h", "k")]
    assert drops.total() == 4
    assert len(drops) == 4


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_transcripts_give_the_last_request_its_two_answers_and_the_turns_before():
    good = {"chosen": transcript("q", " good\n\nmore "), "rejected": transcript("q", "bad")}
    long = {"chosen": transcript("a", "b", "c", "d", "e", "f"), "rejected": transcript("a", "b", "c", "d", "e", "g")}
    bad = [
        {**good, "rejected": transcript("q", "good\n\nmore")},
        {**good, "rejected": transcript("other", "bad")},
        {**good, "rejected": transcript("q", "bad", "a request without an answer")},
        {**good, "chosen": "no speaker"},
        {**good, "chosen": "before" + transcript("q", "good")},
        {**good, "chosen": None},
        {**good, "rejected": transcript("q", "")},
        {**good, "rejected": transcript("q", "bad  Human: really?")},
        {**good, "rejected": "\n\nHuman: q\n\nHuman: q\n\nAssistant: bad\n\nAssistant: bad"},
        {"chosen": transcript("Q ", "x"), "rejected": transcript("q", "y")},
        *({kind: transcript(*turns, "q", kind) for kind in good} for turns in [("", "b"), ("a", " \n")]),
    ]
    drops = Counter()
    assert collect([good, long, *bad], drops, transcripts.make_sample) == [
        Sample("q", "good\n\nmore", "bad"),
        Sample("e", "f", "g", history=(("a", "b"), ("c", "d"))),
    ]
    assert drops == {
        "good and bad answer are the same": 1,
        "chosen and rejected do not answer the same request": 2,
        "turns of Human and Assistant do not alternate": 5,
        "empty answer": 1,
        "a turn holds another turn": 1,
        "an earlier turn is empty": 2,
    }


def test_the_same_last_request_after_other_turns_is_another_prompt():
    rows = [
        {"chosen": transcript(first, "b", "q", "x"), "rejected": transcript(first, "b", "q", "y")}
        for first in ("a", "c", "a")
    ]
    drops = Counter()
    assert len(collect(rows, drops, transcripts.make_sample)) == 2
    assert drops == {"same prompt as an earlier record": 1}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_the_split_loses_nothing_and_shares_nothing(count, num_samples, seed):
    samples, drops = [Sample(str(i), "a", "b") for i in range(count)], Counter()
    train, held_out = split(samples, num_samples, seed, drops)
    assert len(train) + len(held_out) + drops[BEYOND] == count
    assert not {sample.prompt for sample in train} & {sample.prompt for sample in held_out}
    assert 1 <= len(train) <= num_samples
    assert len(held_out) >= (count > 1)
    assert len(held_out) <= max(1, len(train) // 10)
    assert split(samples, num_samples, seed, Counter()) == (train, held_out)


def test_the_split_depends_on_the_seed():
    samples = [Sample(str(i), "a", "b") for i in range(50)]
    assert split(samples, 20, 0, Counter()) != split(samples, 20, 1, Counter())
