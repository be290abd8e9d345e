"""How reference sets are read: packed as the stage packs, under a heading of their own, with a warning of unseen text."""

import pytest
from conftest import OGPSA, read_rows, run_here


TEXT = {"stage": "ogpsa_pt", "dataset": "safety_text", "ogpsa_dataset": "helpful_text,truthful_text"}


@pytest.fixture
def read_sets(monkeypatch):
    """Return the reference sets that runs have read, by name."""
    from llamafactory_ogpsa.plugin import workflow

    sets, load = {}, workflow.load_reference_sets

    def load_reference_sets(*args, **kwargs):
        loaded = load(*args, **kwargs)
        sets.update({reference.name: reference.samples for reference in loaded})
        return loaded

    monkeypatch.setattr(workflow, "load_reference_sets", load_reference_sets)
    return sets


def test_the_sets_of_a_preference_stage_are_not_packed(base_args, read_sets):
    # Stock ignores `packing` in these stages; of it there remains that cutoff_len is one less.
    change = {"stage": "ogpsa_dpo", "dataset": "safety_pairs", "ogpsa_loss": "sft", "max_steps": 1}
    losses = []
    for packing, cutoff_len in [(True, 64), (False, 63)]:
        run_here(
            {
                **base_args,
                **OGPSA,
                **change,
                "packing": packing,
                "cutoff_len": cutoff_len,
                "overwrite_output_dir": True,
            }
        )
        assert {name: len(samples) for name, samples in read_sets.items()} == {"helpful": 13, "truthful": 10}
        losses.append(read_rows(base_args["output_dir"])[1][-1]["reference_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("neat", [False, True])
def test_the_sets_of_sft_are_packed_as_its_training_set_is(base_args, read_sets, neat):
    run_here({**base_args, **OGPSA, "packing": True, "neat_packing": neat, "max_steps": 1})
    for name, records in [("helpful", 13), ("truthful", 10)]:
        assert 0 < len(read_sets[name]) < records
        assert ("packing_params" in read_sets[name].column_names) is neat


def test_reference_examples_have_a_heading_of_their_own(base_args, capsys):
    run_here({**base_args, **OGPSA, "max_steps": 1})
    headings = [
        line for line in capsys.readouterr().out.splitlines() if line.endswith(" example:") or " example of " in line
    ]
    assert headings == ["reference example of helpful:", "reference example of truthful:", "training example:"]


@pytest.mark.parametrize(
    ("sets", "warned"),
    [("helpful_text,truthful_text", []), ("helpful_text,truthful", ["10 of the first 10 records of 'truthful'"])],
)
def test_answers_that_pt_does_not_see_are_warned_of(base_args, said, sets, warned):
    run_here({**base_args, **OGPSA, **TEXT, "ogpsa_dataset": sets, "packing": False, "max_steps": 1})
    warnings = [message for message in said() if "which stage pt does not see" in message]
    assert [message.partition(" in `ogpsa")[0] for message in warnings] == warned


@pytest.mark.parametrize(
    ("record", "unseen"),
    [
        ({"_prompt": [{"content": "text"}], "_response": []}, False),
        ({"_prompt": [{"content": "text"}], "_response": [{"content": ""}]}, False),
        ({"_prompt": [{"content": "text"}], "_response": [{"content": "answer"}]}, True),
        ({"_prompt": [{"content": "a"}, {"content": "b"}, {"content": "c"}], "_response": []}, True),
    ],
)
def test_what_pt_does_not_see_of_a_record(record, unseen):
    from llamafactory_ogpsa.plugin.datasets import has_unseen_text

    assert has_unseen_text(record) is unseen
