"""OGPSA in LlamaBoard, in a real browser, on the real `llamafactory-cli webui`."""

import json
from contextlib import contextmanager

import llamaboard as board
import psutil
import pytest
import yaml
from conftest import KTO_COLUMNS, RANKING_COLUMNS, make_records, read_rows

from llamafactory_ogpsa.plugin.board_locales import ALERTS, LOCALES


pytestmark = pytest.mark.webui

GENERAL = ("helpful", "truthful")
STAGES = [
    "Supervised Fine-Tuning",
    "Reward Modeling",
    "PPO",
    "DPO",
    "KTO",
    "Pre-Training",
    "Supervised Fine-Tuning (OGPSA)",
    "Reward Modeling (OGPSA)",
    "DPO (OGPSA)",
    "KTO (OGPSA)",
    "Pre-Training (OGPSA)",
]
STOCK_STAGES = {
    "Pre-Training": ("pt", "safety"),
    "DPO": ("dpo", "safety_pairs"),
    "Reward Modeling": ("rm", "safety_pairs"),
    "KTO": ("kto", "safety_kto"),
    "Supervised Fine-Tuning": ("sft", "safety"),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Sets of every kind; the general ones big enough for a refresh to take seconds."""
    path = tmp_path_factory.mktemp("data")
    info = {}
    for seed, (name, count) in enumerate([("safety", 24), ("helpful", 600), ("truthful", 600)]):
        for suffix, kind in [("", "alpaca"), ("_pairs", "ranking"), ("_kto", "kto")]:
            (path / f"{name}{suffix}.json").write_text(json.dumps(make_records(seed, count, kind)))
            info[name + suffix] = {"file_name": f"{name}{suffix}.json"}
        info[f"{name}_pairs"] |= {"ranking": True, "columns": RANKING_COLUMNS}
        info[f"{name}_kto"]["columns"] = KTO_COLUMNS
    (path / "dataset_info.json").write_text(json.dumps(info))
    return str(path)


@pytest.fixture(scope="module")
def context():
    chromium, playwright = board.find_chromium()
    with board.browse(playwright, chromium) as context:
        yield context


@pytest.fixture(scope="module")
def server(context, tmp_path_factory):
    folder = tmp_path_factory.mktemp("webui")
    with board.serve(folder) as url:
        yield url, folder


@pytest.fixture
def page(context, server):
    url, folder = server
    (folder / "llamaboard_cache" / "user_config.yaml").unlink(missing_ok=True)
    page = board.open_board(context, url)
    yield page
    page.close()


def test_the_stages_list_their_datasets_and_set_their_options(page, model_dir, data_dir):
    board.choose_model(page, model_dir)
    board.fill(page, "Data dir", data_dir)
    board.set_extra(page)
    board.offers(page, "Stage", STAGES)
    pairs = ["safety_pairs", "helpful_pairs", "truthful_pairs"]
    tagged = ["safety_kto", "helpful_kto", "truthful_kto"]
    plain = [name for pair in zip(("safety", "helpful", "truthful"), tagged, strict=True) for name in pair]
    every = [name for three in zip(plain[::2], pairs, tagged, strict=True) for name in three]

    assert not board.field(page, "General sets").is_visible()
    for stage, own, general, interval in [
        ("DPO (OGPSA)", pairs, every, "5"),  # the reference loss follows each set
        ("Reward Modeling (OGPSA)", pairs, pairs, "30"),
        ("KTO (OGPSA)", plain, plain, "5"),
        ("Supervised Fine-Tuning (OGPSA)", plain, plain, "30"),
        ("Pre-Training (OGPSA)", plain, plain, "30"),
    ]:
        board.choose_stage(page, stage)
        board.field(page, "General sets").wait_for()
        board.wait_for_value(page, "Update interval", interval)
        board.offers(page, "Dataset", own)
        board.offers(page, "General sets", general)

    board.choose(page, "Dataset", "safety")
    board.choose(page, "General sets", "helpful")
    command = board.parse(board.preview(page, "ogpsa_pt"))
    assert command["packing"] == "True"

    board.choose_stage(page, "DPO (OGPSA)")
    board.wait_for_value(page, "Update interval", "5")
    board.choose(page, "Reference loss", "stage")
    board.offers(page, "General sets", pairs)
    board.choose(page, "Reference loss", "sft")
    board.offers(page, "General sets", plain)
    board.choose(page, "Dataset", "safety_pairs")
    board.choose(page, "General sets", *GENERAL)
    page.get_by_text("RLHF configurations").click()
    board.fill(page, "Beta value", "0.25")
    command = board.parse(board.preview(page, "ogpsa_dpo"))
    assert {key: value for key, value in command.items() if key.startswith(("ogpsa", "pref"))} == {
        "pref_beta": "0.25",
        "pref_ftx": "0",
        "pref_loss": "sigmoid",
        "ogpsa_dataset": "helpful,truthful",
        "ogpsa_num_samples": "200",
        "ogpsa_update_interval": "5",
        "ogpsa_scope": "parameter",
        "ogpsa_method": "orthogonal",
        "ogpsa_loss": "sft",
        "ogpsa_basis_device": "auto",
    }

    board.choose_stage(page, "DPO")
    board.field(page, "General sets").wait_for(state="hidden")


@contextmanager
def paused(output_dir):
    """Stop the processes of a run, which would be over before another page is open."""
    runs = [process for process in psutil.process_iter() if any(output_dir in word for word in words_of(process))]
    assert runs, "the run is over"
    for process in runs:
        process.suspend()
    try:
        yield
    finally:
        for process in runs:
            process.resume()


def words_of(process):
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def test_a_run_is_followed_finished_and_reloaded(context, server, page, model_dir, data_dir):
    url, folder = server
    board.prepare(page, model_dir, data_dir, general=GENERAL)
    board.fill(page, "Samples per set", 500)
    board.fill(page, "Update interval", 4)
    board.fill(page, "OGPSA rank", 4)
    board.choose(page, "Scope", "global")
    board.choose(page, "Method", "conflict")
    command = board.parse(board.preview(page, "ogpsa_sft"))
    options = {
        "ogpsa_dataset": "helpful,truthful",
        "ogpsa_num_samples": "500",
        "ogpsa_update_interval": "4",
        "ogpsa_rank": "4",
        "ogpsa_scope": "global",
        "ogpsa_method": "conflict",
        "ogpsa_loss": "auto",
        "ogpsa_basis_device": "auto",
    }
    assert {key: value for key, value in command.items() if key.startswith("ogpsa")} == options
    output_dir = folder / command["output_dir"]

    board.press(page, "Start")
    page.get_by_text("Refreshing the OGPSA subspace at step").wait_for()
    board.plot(page).wait_for()
    live = board.plot(page).get_attribute("src")

    # Someone who opens LlamaBoard while the run goes on sees it, with its options.
    with paused(command["output_dir"]):
        other = board.open_board(context, url)
        board.plot(other).wait_for()
        assert board.field(other, "Stage").input_value() == "Supervised Fine-Tuning (OGPSA)"
        assert [name.strip() for name in board.chosen(other, "General sets")] == list(GENERAL)
        assert board.field(other, "OGPSA rank").input_value() == "4"
        other.close()
    page.bring_to_front()

    page.get_by_text("Finished.", exact=True).first.wait_for()
    page.wait_for_function(
        "live => document.querySelector('[data-testid=matplotlib] img')?.getAttribute('src') !== live", arg=live
    )
    size = board.plot(page).evaluate("img => [img.naturalWidth, img.naturalHeight]")
    assert size[1] > 1.5 * size[0], "the plot has three panels"
    steps, refreshes = read_rows(output_dir)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in refreshes] == [0, 4, 8]
    assert all(row["rank"] <= 4 for row in refreshes)
    arguments = yaml.safe_load((output_dir / "training_args.yaml").read_text())
    assert {key: str(value) for key, value in arguments.items() if key.startswith("ogpsa")} == options

    # In a new window, choosing the finished run's directory brings back its options and its plot.
    later = board.open_board(context, url)
    board.wait_for_value(later, "Model name", "Custom")
    board.choose(later, "Finetuning method", "full")
    board.choose(later, "Output dir", output_dir.name)
    board.wait_for_toast(later, "Output dir already exists")
    board.plot(later).wait_for()
    board.wait_for_value(later, "Stage", "Supervised Fine-Tuning (OGPSA)")
    board.wait_for_value(later, "Update interval", "4")
    assert [name.strip() for name in board.chosen(later, "General sets")] == list(GENERAL)
    assert [name.strip() for name in board.chosen(later, "Dataset")] == ["safety"]
    assert board.field(later, "Method").input_value() == "conflict"
    assert board.plot(later).get_attribute("src") == board.plot(page).get_attribute("src")
    later.close()


def test_a_run_can_be_stopped(server, page, model_dir, data_dir):
    board.prepare(page, model_dir, data_dir, general=GENERAL, max_steps=100000, save_steps=10**9)
    output_dir = server[1] / board.parse(board.preview(page, "ogpsa_sft"))["output_dir"]
    board.press(page, "Start")
    board.plot(page).wait_for()
    board.press(page, "Abort")
    page.get_by_text("Finished.", exact=True).first.wait_for()
    steps, _ = read_rows(output_dir)
    assert 0 < len(steps) < 100000


def test_arguments_are_saved_and_loaded(context, server, page, model_dir, data_dir):
    board.prepare(page, model_dir, data_dir, general=GENERAL)
    board.fill(page, "Samples per set", 77)
    board.choose(page, "Basis device", "cpu")
    page.get_by_label("Save OGPSA state").uncheck()
    board.fill(page, "Config path", "mine.yaml")
    page.keyboard.press("Enter")
    before = board.parse(board.preview(page, "ogpsa_sft"))
    assert before["ogpsa_save_state"] == "false"
    board.press(page, "Save arguments")
    page.get_by_text("Arguments have been saved at").wait_for()

    other = board.open_board(context, server[0])
    board.fill(other, "Config path", "mine.yaml")
    other.keyboard.press("Enter")
    board.press(other, "Load arguments")
    other.get_by_text("Arguments have been restored.").wait_for()
    board.field(other, "General sets").wait_for()
    board.wait_for_value(other, "Samples per set", "77")
    board.fill(other, "Model path", model_dir)
    after = board.parse(board.preview(other, "ogpsa_sft"))
    assert {**after, "output_dir": None} == {**before, "output_dir": None}
    other.close()


def test_labels_follow_the_language(page):
    board.choose_stage(page, "Supervised Fine-Tuning (OGPSA)")
    board.field(page, "General sets").wait_for()
    title = "Language"
    for lang in ("zh", "ru", "ko", "ja", "en"):
        board.choose(page, title, lang)
        for name, texts in LOCALES.items():
            page.get_by_text(texts[lang]["label"], exact=True).filter(visible=True).first.wait_for()
            if "info" in texts[lang]:
                assert page.get_by_text(texts[lang]["info"]).filter(visible=True).count() == 1, (name, lang)
        title = {"zh": "语言", "ru": "Язык", "ko": "언어", "ja": "言語", "en": "Language"}[lang]


def test_wrong_input_is_refused_in_the_chosen_language(server, page, model_dir, data_dir):
    board.prepare(page, model_dir, data_dir)
    board.choose(page, "Language", "zh")
    page.get_by_role("button", name="开始", exact=True).filter(visible=True).wait_for()
    output_dir = server[1] / "saves" / "Custom" / "full" / board.field(page, "输出目录").input_value()

    def refused(alert, *values):
        board.press(page, "开始")
        board.wait_for_toast(page, ALERTS[alert]["zh"].format(*values))

    refused("err_ogpsa_no_dataset")
    board.choose(page, "通用数据集", "helpful")
    board.fill(page, "更新间隔", 0)
    refused("err_ogpsa_count", "更新间隔")
    board.fill(page, "更新间隔", 5)
    board.fill(page, "OGPSA 秩", -1)
    refused("err_ogpsa_rank", "OGPSA 秩")
    board.fill(page, "OGPSA 秩", 1000)
    refused("err_ogpsa_options", "`ogpsa_rank` is 1000; allowed: at most 32 (the samples")
    board.fill(page, "OGPSA 秩", 0)
    board.fill(page, "通用数据集", "nowhere")
    page.keyboard.press("Enter")
    refused("err_ogpsa_options", "`ogpsa_dataset` has 'nowhere', which is not in dataset_info.json")
    assert not output_dir.exists()


def preview_stock_stages(page, model_dir, data_dir):
    """Return the command of every stock stage, and leave saved arguments behind."""
    page.bring_to_front()
    board.choose_model(page, model_dir)
    board.fill(page, "Data dir", data_dir)
    board.set_extra(page)
    for label, text in [("Output dir", "same"), ("Config path", "same.yaml")]:
        board.fill(page, label, text)
        page.keyboard.press("Enter")

    commands = {}
    for label, (stage, dataset) in STOCK_STAGES.items():
        board.choose_stage(page, label)
        board.choose(page, "Dataset", dataset)
        commands[stage] = board.preview(page, stage)
    board.press(page, "Save arguments")
    page.get_by_text("Arguments have been saved at").wait_for()
    return commands


def test_a_stock_stage_is_what_it_is_without_the_plugin(context, server, page, tmp_path, model_dir, data_dir):
    commands = preview_stock_stages(page, model_dir, data_dir)
    with board.serve(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0") as url:
        without = board.open_board(context, url)
        board.offers(without, "Stage", [stage for stage in STAGES if "OGPSA" not in stage])
        assert commands == preview_stock_stages(without, model_dir, data_dir)
        without.close()
    assert not any("ogpsa" in command for command in commands.values())
    files = [folder / "llamaboard_config" / "same.yaml" for folder in (server[1], tmp_path)]
    assert files[0].read_text() == files[1].read_text()
