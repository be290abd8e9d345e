"""What needs no browser: a LlamaBoard that the plugin does not know, the options, the texts, the logs of a run."""

import re
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import pytest

from llamafactory_ogpsa.run.log import append_row


pytest.importorskip("gradio", reason="LlamaBoard needs gradio")


@pytest.fixture(scope="module")
def board():
    from llamafactory_ogpsa.plugin import board

    return board


@pytest.fixture
def interface(tmp_path, monkeypatch):
    """LlamaBoard's own module; what it writes goes to a folder of the test's."""
    import llamafactory.webui.interface as interface

    monkeypatch.chdir(tmp_path)
    return interface


def labels_of(ui):
    """Return the stages that a LlamaBoard offers, and the number of its accordions."""
    components = ui.get_config_file()["components"]
    stages = next(
        [label for label, _ in item["props"]["choices"]]
        for item in components
        if item["type"] == "dropdown"
        and any("Supervised Fine-Tuning" in choice for choice in item["props"]["choices"])
    )
    return stages, sum(item["type"] == "accordion" for item in components)


def test_the_hook_has_patched_the_interface(interface):
    assert interface.create_ui.__wrapped__.__module__ == interface.__name__


def test_an_unknown_tab_gives_the_stock_board_and_says_so(interface, board, monkeypatch, capsys):
    from llamafactory.extras.constants import STAGES_USE_PAIR_DATA, TRAINING_STAGES
    from llamafactory.webui.locales import LOCALES

    stages, accordions = labels_of(interface.create_ui())
    assert "DPO (OGPSA)" in stages
    assert not capsys.readouterr().err
    board.remove_entries()
    tables = (dict(TRAINING_STAGES), set(STAGES_USE_PAIR_DATA), dict(LOCALES))
    create_train_tab = interface.create_train_tab

    def other_train_tab(engine):
        elems = create_train_tab(engine)
        return {name: elem for name, elem in elems.items() if name != "apollo_tab"}

    def deaf_train_tab(engine):
        engine.manager.get_base_elems = type(engine.manager).get_base_elems.__get__(engine.manager)
        return create_train_tab(engine)

    for tab, message in [(other_train_tab, "missing: ['apollo_tab']"), (deaf_train_tab, "inputs: []")]:
        monkeypatch.setattr(interface, "create_train_tab", tab)
        ui = interface.create_ui()
        assert labels_of(ui) == ([stage for stage in stages if "OGPSA" not in stage], accordions - 1)
        assert (TRAINING_STAGES, STAGES_USE_PAIR_DATA, LOCALES) == tables
        assert interface.create_train_tab is tab
        error = capsys.readouterr().err
        assert "OGPSA is not available in this web UI" in error
        assert message in error


def test_an_unknown_runner_or_interface_is_left_alone(interface, board, monkeypatch):
    from llamafactory.webui.runner import Runner

    create_ui = interface.create_ui.__wrapped__
    module = SimpleNamespace(create_ui=create_ui, create_train_tab=interface.create_train_tab)
    with pytest.raises(AttributeError, match="llamafactory-cli webui"):
        board.patch(SimpleNamespace())
    with pytest.raises(TypeError, match="create_train_tab has the parameters"):
        board.patch(SimpleNamespace(create_ui=create_ui, create_train_tab=lambda: None))
    with monkeypatch.context() as patched:
        patched.setattr(Runner, "monitor", lambda self, data: None)
        with pytest.raises(TypeError, match=r"Runner.monitor has the parameters \['self', 'data'\]"):
            board.patch(module)
    with monkeypatch.context() as patched:
        patched.setitem(board.TRAINING_STAGES, "DPO", "other")
        with pytest.raises(ValueError, match="the training stages are"):
            board.patch(module)
    assert module.create_ui is create_ui
    board.patch(module)
    assert module.create_ui.__wrapped__ is create_ui


PANEL = {
    "ogpsa_dataset": ["helpful", "truthful"],
    "ogpsa_num_samples": 200,
    "ogpsa_update_interval": 30,
    "ogpsa_rank": 0,
    "ogpsa_scope": "parameter",
    "ogpsa_method": "orthogonal",
    "ogpsa_loss": "auto",
    "ogpsa_basis_device": "auto",
    "ogpsa_save_state": True,
}


def test_every_element_is_an_option_with_its_default(board):
    import gradio as gr

    from llamafactory_ogpsa.options import OPTIONS
    from llamafactory_ogpsa.plugin.board_locales import LOCALES

    with gr.Blocks():
        tab = board.create_ogpsa_tab()
    assert set(tab) == set(LOCALES)
    assert set(tab) - {"ogpsa_tab"} <= set(OPTIONS)
    assert {name: elem.value for name, elem in tab.items() if name in PANEL} == {**PANEL, "ogpsa_dataset": []}


@pytest.mark.parametrize("save_state", [True, False])
def test_the_options_of_the_accordion_are_those_of_the_run(base_args, save_state):
    """Through LlamaBoard's own files and commands, which leave out what is False."""
    import yaml
    from llamafactory.hparams.parser import get_train_args
    from llamafactory.webui.common import gen_cmd, save_cmd

    from llamafactory_ogpsa.plugin.board_tab import options_of

    options = options_of({**PANEL, "ogpsa_save_state": save_state})
    args = {**base_args, "stage": "ogpsa_sft", **options}
    with open(save_cmd(args), encoding="utf-8") as f:
        from_file = get_train_args(yaml.safe_load(f))[3]
    words = gen_cmd(args).replace("\\\n", " ").split()
    from_command = get_train_args(words[words.index("train") + 1 : words.index("```")])[3]
    for arguments in (from_file, from_command):
        assert arguments.ogpsa_save_state is save_state
        assert arguments.ogpsa_dataset == PANEL["ogpsa_dataset"]
        assert arguments.ogpsa_rank is None
        for name in set(PANEL) - {"ogpsa_dataset", "ogpsa_rank", "ogpsa_save_state"}:
            assert getattr(arguments, name) == PANEL[name]


def test_every_text_is_there_in_every_language_of_llamaboard():
    from llamafactory.webui.locales import LOCALES as STOCK

    from llamafactory_ogpsa.plugin.board_locales import ALERTS, LOCALES, add_locales

    languages = set(STOCK["galore_tab"])
    assert {"en", "ru", "zh", "ko", "ja"} <= languages
    for texts in LOCALES.values():
        assert set(texts) == languages
        assert len({frozenset(text) for text in texts.values()}) == 1
    for texts in ALERTS.values():
        assert set(texts) == languages
        assert len({sum(field is not None for _, field, *_ in Formatter().parse(t)) for t in texts.values()}) == 1

    table = {"galore_tab": {"en": {}, "eo": {}}}
    add_locales(table)
    assert table["ogpsa_rank"]["eo"]["label"] == "OGPSA rank"


def test_the_fields_in_docs_are_those_of_the_accordion():
    from llamafactory_ogpsa.options import OPTIONS
    from llamafactory_ogpsa.plugin.board_locales import LOCALES

    page = (Path(__file__).resolve().parents[2] / "docs" / "webui.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `(ogpsa_\w+)` \| ([^|:;]+)", page, re.MULTILINE)
    assert {name: label for label, name, _ in rows} == {
        name: texts["en"]["label"] for name, texts in LOCALES.items() if name != "ogpsa_tab"
    }
    for _, name, first in rows:
        default = OPTIONS[name].default
        expected = "on" if default is True else str(default if default is not None else 0)
        assert first.strip() == ("none" if name == "ogpsa_dataset" else expected), name


def test_a_refresh_is_running_from_its_line_until_its_row(tmp_path):
    from llamafactory_ogpsa.plugin.board_plot import find_refresh

    log, out = str(tmp_path / "ogpsa_log.jsonl"), str(tmp_path)
    assert find_refresh("", out) is None
    running_log = "[INFO] OGPSA is on\n[INFO] OGPSA refresh at step 0.\n"
    assert find_refresh(running_log, out) == 0
    append_row(log, {"step": 0, "refresh": True, "reference_loss": {}})
    assert find_refresh(running_log, out) is None
    running_log += "[INFO] OGPSA refresh at step 30.\n"
    append_row(log, {"step": 30, "removed": 0.1})
    assert find_refresh(running_log, out) == 30
    append_row(log, {"step": 30, "refresh": True, "reference_loss": {}})
    assert find_refresh(running_log, out) is None


def test_the_figure_has_three_panels_and_survives_odd_logs(tmp_path, capsys):
    from llamafactory_ogpsa.plugin.board_plot import make_figure

    assert make_figure(str(tmp_path)) is None
    log = tmp_path / "ogpsa_log.jsonl"
    append_row(str(log), {"step": 0, "refresh": True, "reference_loss": {"a": 1.0, "b": 2.0}})
    append_row(str(log), {"step": 1, "removed": None})
    append_row(str(log), {"step": 2, "removed": 0.25})
    append_row(str(tmp_path / "trainer_log.jsonl"), {"current_steps": 1, "loss": 3.0})
    with open(log, "a") as f:
        f.write('{"step": 3, "re')
    loss, removed, reference = make_figure(str(tmp_path)).axes
    assert list(loss.lines[0].get_ydata()) == [3.0]
    assert list(removed.lines[0].get_xdata()) == [1, 2]
    assert removed.lines[0].get_ydata()[1] == 25.0
    assert [line.get_label() for line in reference.lines] == ["a", "b"]
    log.write_text("not json\n{}\n")
    assert make_figure(str(tmp_path)) is None
    assert "is not JSON" in capsys.readouterr().err
