"""Writing samples and their entries: whole files or none, and nothing of anybody else's."""

import json
import signal
import subprocess
import sys

import pytest
from test_prepare import names_of

from llamafactory_ogpsa.recipes.errors import RecipeError
from llamafactory_ogpsa.recipes.output import merge, read_info


WRITE = """
import os, signal, sys
from pathlib import Path
from llamafactory_ogpsa.recipes import output
from llamafactory_ogpsa.recipes.samples import Sample

owner, call = (os, "replace") if sys.argv[2] == "replace" else (Path, "write_text")
stock, left = getattr(owner, call), [int(sys.argv[3])]

def dying(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(*args, **options)

setattr(owner, call, dying)
samples = [Sample(f"new {i}", "a", "b") for i in range(5)]
output.write(Path(sys.argv[1]), "safety", samples[:4], samples[4:])
"""


@pytest.mark.parametrize("call", ["write", "replace"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_kill_at_any_moment_leaves_whole_files(tmp_path, call, count):
    before = {"mine": {"file_name": "mine.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(before))
    command = [sys.executable, "-c", WRITE, str(tmp_path), call]
    assert subprocess.run([*command, str(count)]).returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "dataset_info.json").read_text()) == before
    written = list(tmp_path.glob("safety_*.json"))
    assert len(written) == (0 if call == "write" else count - 1)
    for file in written:
        assert [record["instruction"][:3] for record in json.loads(file.read_text())] in (["new"] * 4, ["new"])

    assert subprocess.run([*command, "99"]).returncode == 0
    assert list(json.loads((tmp_path / "dataset_info.json").read_text())) == ["mine", *names_of("safety")]
    assert {file.stem for file in tmp_path.iterdir()} == {"dataset_info", *names_of("safety")}


def test_merging_replaces_nothing(tmp_path):
    ours, other = {"file_name": "x.json"}, {"file_name": "y.json"}
    assert merge({"a": other, "b": [1]}, {"c": ours}, "safety") == {"a": other, "b": [1], "c": ours}
    assert merge({"a": ours}, {"a": ours}, "safety") == {"a": ours}
    for info in ({"a": other}, {"a": {**ours, "ranking": True}}, {"b": ours}):
        with pytest.raises(RecipeError, match="has another entry"):
            merge(info, {"a": ours}, "safety")
    assert read_info(tmp_path / "nowhere.json") == {}


@pytest.mark.parametrize("stale", [["safety_dpo"], ["safety_sft_heldout"], ["safety_dpo", "safety_dpo_heldout"]])
def test_a_set_of_the_recipe_that_would_stay_from_another_dataset_is_refused(stale):
    ours, others = {"file_name": "x.json"}, {name: {"file_name": f"{name}.json"} for name in stale}
    with pytest.raises(RecipeError, match=f"has {', '.join(stale)}, which this run does not write; choose another"):
        merge(others, {"safety_sft": ours}, "safety")
    assert set(merge(others, {"helpful_sft": ours}, "helpful")) == {*stale, "helpful_sft"}
