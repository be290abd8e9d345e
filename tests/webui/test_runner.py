"""The commands that LlamaBoard puts together and starts, also with DeepSpeed; no browser."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import read_rows
from llamaboard import parse


gr = pytest.importorskip("gradio", reason="LlamaBoard needs gradio")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install '.[deepspeed]'")
EXTRA = {"preprocessing_num_workers": 1, "use_cpu": True, "logging_steps": 1, "max_steps": 3}


@pytest.fixture
def fill(tmp_path, monkeypatch, model_dir, data_dir):
    """A LlamaBoard's runner, and a function that fills in the inputs of an OGPSA run."""
    import llamafactory.webui.interface as interface

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    engines = []

    class Engine(interface.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

    monkeypatch.setattr(interface, "Engine", Engine)
    interface.create_ui()
    manager = engines[0].manager

    def fill(**changes):
        elems = [elem for _, elem in manager.get_elem_iter() if isinstance(elem, gr.components.Component)]
        data = {elem: elem.value for elem in elems}
        given = {
            "top.lang": "en",
            "top.model_name": "Custom",
            "top.model_path": model_dir,
            "top.finetuning_type": "full",
            "top.template": "default",
            "train.training_stage": "Supervised Fine-Tuning (OGPSA)",
            "train.dataset_dir": data_dir,
            "train.dataset": ["safety"],
            "train.compute_type": "fp32",
            "train.output_dir": "out",
            "train.extra_args": json.dumps(EXTRA),
            "train.ogpsa_dataset": ["helpful", "truthful"],
            "train.ogpsa_update_interval": 2,
        }
        for name, value in {**given, **changes}.items():
            data[manager.get_elem_by_id(name)] = value
        return data

    return engines[0].runner, fill


def shown(runner, updates):
    """Return the last text that an action has put into the output box."""
    box = runner.manager.get_elem_by_id("train.output_box")
    return [update[box] for update in updates if box in update][-1]


@needs_deepspeed
@pytest.mark.cli
def test_a_run_with_deepspeed_is_started_and_finishes(fill, tmp_path):
    runner, fill = fill
    text = shown(runner, runner.run_train(fill(**{"train.ds_stage": "3"})))
    assert "Finished" in text, text
    output_dir = tmp_path / "saves" / "Custom" / "full" / "out"
    arguments = yaml.safe_load((output_dir / "training_args.yaml").read_text())
    assert arguments["deepspeed"].endswith("ds_z3_config.json")
    steps, refreshes = read_rows(output_dir)
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["step"] for row in refreshes] == [0, 2]
    assert all(row["residual"] < 1e-5 for row in steps)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_command_with_deepspeed_is_shown(fill, stage, offload):
    runner, fill = fill
    command = shown(runner, runner.preview_train(fill(**{"train.ds_stage": stage, "train.ds_offload": offload})))
    assert f"ds_z{stage}_{'offload_' if offload else ''}config.json" in command
    assert "--stage ogpsa_sft" in command


def test_what_the_plugin_refuses_under_deepspeed_is_refused_in_its_words(fill):
    runner, fill = fill
    config = Path("llamaboard_cache/ds_z2_config.json")
    config.write_text(config.read_text().replace('"stage": 2', '"stage": 0'))
    error = shown(runner, runner.run_train(fill(**{"train.ds_stage": "2"})))
    assert error.endswith("`zero_optimization.stage` of `deepspeed` is 0 under OGPSA; allowed: 1, 2, 3.")
    assert not Path("saves").exists()


def test_what_is_written_into_the_extra_arguments_wins(fill):
    runner, fill = fill
    given = {"ogpsa_dataset": "truthful", "ogpsa_num_samples": 5, "ogpsa_scope": "global", "ogpsa_rank": 2}
    given |= {"ogpsa_kernel": "torch", "ogpsa_save_state": False, "ogpsa_method": None, "stage": "ogpsa_pt"}
    data = fill(**{"train.ogpsa_rank": 9, "train.extra_args": json.dumps({**EXTRA, **given})})
    command = parse(shown(runner, runner.preview_train(data)))
    expected = {**given, "ogpsa_save_state": "false", "ogpsa_method": "orthogonal", "ogpsa_update_interval": 2}
    assert {name: command.get(name) for name in expected} == {name: str(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ogpsa_num_samples": "many"}, "`ogpsa_num_samples` is 'many'; allowed: a positive integer."),
        ({"ogpsa_update_interval": 0}, "Update interval must be a positive integer."),
        ({"ogpsa_rank": 0}, "`ogpsa_rank` is 0; allowed: a positive integer."),
        ({"ogpsa_rank": False}, "`ogpsa_rank` is 'false'; allowed: a positive integer."),
        ({"ogpsa_dataset": []}, "Please choose at least one general set for OGPSA."),
        ({"ogpsa_sope": "inputs"}, "which OGPSA does not have; did you mean `ogpsa_scope`?"),
        ({"stage": "sft"}, "or remove `ogpsa_dataset`"),
        ({"use_kt": True}, "`use_kt` is True"),
    ],
)
def test_what_is_wrong_in_the_extra_arguments_is_found_before_the_start(fill, given, message):
    runner, fill = fill
    error = shown(runner, runner.run_train(fill(**{"train.extra_args": json.dumps({**EXTRA, **given})})))
    assert message in error
    assert not Path("saves").exists()
