"""OGPSA in LlamaBoard's runner, which checks, starts, saves and follows runs."""

import functools
import inspect

import gradio as gr
from llamafactory.extras.constants import TRAINING_STAGES
from llamafactory.webui.common import get_save_dir
from llamafactory.webui.runner import Runner

from .board_checks import find_error
from .board_locales import LOCALES
from .board_plot import make_figure, show_figure, show_refresh
from .board_tab import PANEL, extra_options, is_ogpsa, options_of, stock_stage


# The methods of LlamaBoard's runner that are wrapped, with their parameters.
_RUNNER = {
    "_initialize": ["self", "data", "do_train", "from_preview"],
    "_parse_train_args": ["self", "data"],
    "_build_config_dict": ["self", "data"],
    "monitor": ["self"],
}


def check_runner() -> None:
    """Check that LlamaBoard's runner looks as expected.

    Raises:
        AttributeError, TypeError: it does not; says what was looked for.
    """
    for name, expected in _RUNNER.items():
        parameters = list(inspect.signature(getattr(Runner, name)).parameters)
        if parameters != expected:
            raise TypeError(f"Runner.{name} has the parameters {parameters}, not {expected}")


def hook_runner(runner: Runner) -> None:
    """Wrap a runner's methods for OGPSA runs; other runs are handled as before."""
    initialize, parse_train_args = runner._initialize, runner._parse_train_args
    build_config_dict, monitor = runner._build_config_dict, runner.monitor

    def elem(name):
        return runner.manager.get_elem_by_id(name)

    def asks_for_ogpsa(data):
        # The Evaluate tab has no stage among its inputs.
        return is_ogpsa(data.get(elem("train.training_stage")) or "")

    def initialize_with_ogpsa(data, do_train, from_preview):
        error = initialize(data, do_train, from_preview)
        if error or not do_train or not asks_for_ogpsa(data):
            return error

        return find_error(parse_train_args_with_ogpsa(data), data[elem("top.lang")])

    def parse_train_args_with_ogpsa(data):
        if not asks_for_ogpsa(data):
            return parse_train_args(data)

        stage = data[elem("train.training_stage")]
        args = parse_train_args({**data, elem("train.training_stage"): stock_stage(stage)})
        panel = options_of({name: data[elem(f"train.{name}")] for name in PANEL})
        return {**args, "stage": TRAINING_STAGES[stage], **panel, **extra_options(data[elem("train.extra_args")])}

    def build_config_dict_with_ogpsa(data):
        config = build_config_dict(data)
        if asks_for_ogpsa(data):
            return config
        # LlamaBoard without the plugin must be able to load the file of a stock run.
        return {name: value for name, value in config.items() if name not in {f"train.{key}" for key in LOCALES}}

    @functools.wraps(monitor)
    def monitor_with_ogpsa():
        data = runner.running_data
        if not runner.do_train or not asks_for_ogpsa(data):
            yield from monitor()
            return

        names = ("top.model_name", "top.finetuning_type", "train.output_dir")
        output_path = get_save_dir(*(data[elem(name)] for name in names))
        viewer, progress_bar, output_box = (
            elem(f"train.{name}") for name in ("loss_viewer", "progress_bar", "output_box")
        )
        for update in monitor():
            if runner.running and not runner.aborted:
                figure = make_figure(output_path)
                progress = show_refresh(update[output_box], output_path, data[elem("top.lang")])
                shown = {} if figure is None else {viewer: gr.Plot(figure)}
                update = {**update, **shown, progress_bar: progress or update[progress_bar]}
            yield update
        # LlamaBoard's last update is up to two seconds before the end of the run.
        yield {viewer: show_figure(output_path)}

    runner._initialize = initialize_with_ogpsa
    runner._parse_train_args = parse_train_args_with_ogpsa
    runner._build_config_dict = build_config_dict_with_ogpsa
    runner.monitor = monitor_with_ogpsa
