"""The `ogpsa_*` options as LLaMA-Factory's argument parser takes and shows them."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from options_table import insert_tables

from llamafactory_ogpsa.inputs import DEFAULT_RANK
from llamafactory_ogpsa.options import OPTIONS, Settings, resolve


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parser():
    from llamafactory.hparams import parser

    return parser


def test_the_help_shows_the_real_default_once(parser):
    printed = " ".join(parser.HfArgumentParser(parser._TRAIN_ARGS).format_help().split())
    assert "ogpsa_sft" in printed
    assert "ogpsa_lora" in printed
    filled = SimpleNamespace(**{**dict.fromkeys(OPTIONS), "ogpsa_dataset": "general"}, stage="sft")
    resolve(filled)
    for name in OPTIONS:
        _, rest = re.split(rf" --{name}[ ,]", printed)  # in the usage line it stands in brackets
        text = re.split(r" --[a-z]+_", rest)[0]  # up to the next option, past its own spelling with dashes
        shown = re.findall(r"\(default: (.*?)\)", text)
        assert len(shown) == (name != "ogpsa_dataset"), text
        assert "%" not in text
        default = getattr(filled, name)
        if shown and default is not None:
            assert str(default).lower() in shown[0], text


def test_the_tables_in_docs_are_up_to_date():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert insert_tables(page) == page, "run: python scripts/options_table.py"
    for name in OPTIONS:
        assert f"| `{name}` |" in page
    with pytest.raises(ValueError, match="no lines"):
        insert_tables("# A page without tables")


def test_the_settings_of_a_run_are_its_options(parser, base_args):
    flags = {"ogpsa_num_samples": "12.0", "ogpsa_rank": "4", "ogpsa_save_state": "false", "plot_loss": "true"}
    args = {**base_args, "stage": "ogpsa_dpo", "dataset": "safety_pairs", **flags}
    args["ogpsa_dataset"] = "helpful_pairs, truthful_pairs"
    finetuning_args = parser.get_train_args([f"--{key}={value}" for key, value in args.items()])[3]
    assert Settings.from_arguments(finetuning_args) == Settings(
        dataset=["helpful_pairs", "truthful_pairs"],
        num_samples=12,
        refresh_samples=None,
        loss="auto",
        batch_size=None,
        update_interval=5,
        scope="parameter",
        rank=4,
        method="orthogonal",
        basis_device="auto",
        basis_dtype="auto",
        kernel="auto",
        save_state=False,
        plot=True,
    )


@pytest.mark.parametrize("name", ["ogpsa_num_samples", "ogpsa_refresh_samples", "ogpsa_update_interval", "ogpsa_rank"])
@pytest.mark.parametrize("word", ["many", "2.5", "0", "-1", "true", "1e-3"])
def test_wrong_numbers_on_the_command_line_are_refused_by_name(parser, base_args, name, word):
    args = {**base_args, "stage": "ogpsa_sft", "ogpsa_dataset": "helpful", name: word}
    with pytest.raises(ValueError, match=f"`{name}` is '{word}'; allowed: a positive integer"):
        parser.get_train_args([f"--{key}={value}" for key, value in args.items()])


def test_the_rank_of_scope_inputs_counts_directions_per_matrix():
    options = {**dict.fromkeys(OPTIONS), "ogpsa_dataset": "general", "ogpsa_scope": "inputs", "ogpsa_num_samples": 2}
    for rank, expected in [(None, DEFAULT_RANK), (1, 1), (4096, 4096)]:
        arguments = SimpleNamespace(**{**options, "ogpsa_rank": rank}, stage="sft")
        resolve(arguments)
        assert arguments.ogpsa_rank == expected


def test_a_word_that_is_no_choice_is_refused_by_the_command_line(parser, base_args, capsys):
    args = {**base_args, "stage": "ogpsa_sft", "ogpsa_dataset": "helpful", "ogpsa_method": "threshold"}
    with pytest.raises(SystemExit):
        parser.get_train_args([f"--{key}={value}" for key, value in args.items()])
    assert "invalid choice: 'threshold' (choose from " in capsys.readouterr().err


COUNTS = [
    "ogpsa_num_samples",
    "ogpsa_refresh_samples",
    "ogpsa_update_interval",
    "ogpsa_rank",
    "ogpsa_batch_size",
]
CHOICES = {
    "ogpsa_scope": ["parameter", "global", "inputs"],
    "ogpsa_method": ["orthogonal", "conflict", "monitor"],
    "ogpsa_loss": ["auto", "stage", "sft"],
    "ogpsa_basis_device": ["auto", "accelerator", "cpu"],
    "ogpsa_basis_dtype": ["auto", "float32", "bfloat16"],
    "ogpsa_kernel": ["auto", "torch"],
    "ogpsa_save_state": [True, False, "true", "false"],
}
# The sets of conftest's `data_dir` that a stage can take, and the training set that goes with them.
SETS = {"": ["helpful", "truthful", "helpful_again", "helpful_text"], "_pairs": ["helpful_pairs", "truthful_pairs"]}
SUFFIX = {"sft": "", "ogpsa_sft": "", "ogpsa_pt": "", "ogpsa_rm": "_pairs", "ogpsa_dpo": "_pairs"}

# What is wrong for most options, though not for all.
ODD = [None, "", " ", "many", "1", 0, -1, 33, 10**30, 1.0, 2.5, math.nan, math.inf, True, False, [], [1], ["auto"], {}]
ODD += ["0", "-3", "4.0", "2.5", "1e1", "1e99", "1e-1", "0x10", "1_0", " 7", "٣", "nan", "1,5", 8.0, 1e30, 4097]
GOOD = {
    "": st.sampled_from(["helpful", " truthful , helpful", ["helpful_text"]]),
    "_pairs": st.sampled_from(["helpful_pairs", ["truthful_pairs", "helpful_pairs"]]),
    **dict.fromkeys(COUNTS, st.integers(1, 12)),
    **{name: st.sampled_from(allowed) for name, allowed in CHOICES.items()},
}
NEAR = {
    "ogpsa_dataset": st.lists(st.sampled_from(["helpful", "helpful", "truthful", "`ogpsa_rank`"]), max_size=3).flatmap(
        lambda names: st.sampled_from([names, ",".join(names), ",".join(names) + ","])
    ),
    **dict.fromkeys(COUNTS, st.integers(-2, 40) | st.booleans() | st.floats()),
    **{name: st.sampled_from([str(allowed[0]).upper(), allowed, ""]) for name, allowed in CHOICES.items()},
}
UNKNOWN = ["ogpsa_ranks", "ogpsa_", "ogpsa_enabled", "ogpsa_Rank", "ogpsa_rank ", "ogpsa-rank"]
junk = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=5) | st.binary(max_size=3) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def options_of_any_kind(draw):
    """Draw a stage and options for it, with few mistakes: what is wrong alone must be found as well."""
    stage = draw(st.sampled_from([*SUFFIX, "ogpsa_sft", "ogpsa_dpo"]))
    names = draw(st.lists(st.sampled_from(list(OPTIONS)), unique=True, max_size=5))
    given = {"ogpsa_dataset": draw(GOOD[SUFFIX[stage]]), **{name: draw(GOOD[name]) for name in names if name in GOOD}}
    for name in names[: draw(st.sampled_from([0, 1, 1, 1, 2, 3]))]:
        given[name] = draw(st.sampled_from(ODD) | NEAR[name] | junk)
    if draw(st.integers(0, 9)) == 0:
        given[draw(st.sampled_from(UNKNOWN))] = draw(junk)
    return stage, given


def split(value):
    value = value.split(",") if isinstance(value, str) else value
    return [name.strip() for name in value] if isinstance(value, list) and {*map(type, value)} <= {str} else []


def same(one, other):
    return type(one) is type(other) and one == other  # True is not 1


# Numbers in words of a command line or in quotes, and the integers they are.
WRITTEN = {"4.0": 4, "1e1": 10, "1e99": 10**99}


def count(value):
    """Return the integer that a value is, without a doubt; None where it is none."""
    if type(value) is str:
        return int(value) if value.isascii() and value.isdigit() else WRITTEN.get(value)
    if type(value) is float and math.isfinite(value) and value == round(value):
        return int(value)
    return value if type(value) is int else None


def find_wrong(stage, given):
    """Return the names of the options that are wrong, by the rules of the README."""
    wrong = {name for name in given if name not in OPTIONS}
    values = {name: value for name, value in given.items() if name in OPTIONS and value is not None}
    if not stage.startswith("ogpsa_"):
        return wrong | set(values)

    values |= {name: count(values[name]) for name in COUNTS if name in values}
    wrong |= {name for name in COUNTS if name in values and (values[name] is None or values[name] < 1)}
    wrong |= {
        name
        for name, allowed in CHOICES.items()
        if name in values and not any(same(values[name], choice) for choice in allowed)
    }
    sets, loss = split(values.get("ogpsa_dataset")), values.get("ogpsa_loss", "auto")
    allowed = SETS["" if loss == "sft" else SUFFIX[stage]]
    if loss == "auto" and stage == "ogpsa_dpo":
        allowed = [*allowed, *SETS[""]]
    if not sets or len({*sets}) < len(sets) or not {*sets} <= {*allowed}:
        wrong.add("ogpsa_dataset")
    if loss == "sft" and stage not in ("ogpsa_sft", "ogpsa_dpo"):
        wrong.add("ogpsa_loss")
    if not sets or wrong & {*COUNTS}:
        return wrong

    samples, rank = values.get("ogpsa_num_samples", 200), values.get("ogpsa_rank", len(sets))
    refresh = values.get("ogpsa_refresh_samples", samples)
    if refresh > samples:
        wrong.add("ogpsa_refresh_samples")
    if values.get("ogpsa_scope") == "inputs":
        if rank > 4096:
            wrong.add("ogpsa_rank")
        if values.get("ogpsa_method") == "conflict":
            wrong.add("ogpsa_method")
        wrong |= {name for name in ("ogpsa_basis_device", "ogpsa_basis_dtype") if values.get(name, "auto") != "auto"}
    elif rank > min(32, refresh * len(sets)) or (values.get("ogpsa_method") == "conflict" and rank % len(sets)):
        wrong.add("ogpsa_rank")
    return wrong


@settings(
    max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=options_of_any_kind())
@pytest.mark.usefixtures("no_model")
def test_any_options_are_taken_as_given_or_refused_by_name(parser, base_args, drawn):
    stage, given = drawn
    args = {**base_args, "stage": stage, "dataset": f"safety{SUFFIX[stage]}", **given}
    wrong = find_wrong(stage, given)
    if not wrong:
        finetuning_args = parser.get_train_args(args)[3]
        for name, value in given.items():
            read = {"ogpsa_dataset": split, **dict.fromkeys(COUNTS, count)}.get(name)
            expected = read(value) if read else {"true": True, "false": False}.get(value, value)
            assert value is None or same(getattr(finetuning_args, name), expected)
        return

    with pytest.raises(ValueError, match="ogpsa") as caught:
        run_here(args)
    # The first that is named is the culprit; what it is compared with may follow.
    assert re.search(r"[`'](ogpsa_?[^`']*)[`']", str(caught.value))[1] in wrong, caught.value
