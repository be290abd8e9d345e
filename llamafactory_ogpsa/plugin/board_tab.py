"""LlamaBoard's accordion "OGPSA configurations": its elements and their events."""

import json
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import TRAINING_STAGES
from llamafactory.webui.common import get_save_dir, load_dataset_info
from llamafactory.webui.control import change_stage

from ..options import OPTIONS, PREFIX, Option
from .board_plot import show_figure
from .reference_info import check_datasets


SUFFIX = " (OGPSA)"
PANEL = {name: option for name, option in OPTIONS.items() if option.panel}


def is_ogpsa(training_stage: str) -> bool:
    """Return whether an entry of the stage list is one of OGPSA's."""
    return training_stage.endswith(SUFFIX)


def stock_stage(training_stage: str) -> str:
    """Return the entry of the stage list that an OGPSA entry extends; a stock entry comes back as it is."""
    return training_stage.removesuffix(SUFFIX)


def make_element(option: Option) -> Component:
    """Create the element of an option, with the default of a supervised stage."""
    if option.type is list:
        return gr.Dropdown(multiselect=True, allow_custom_value=True, scale=2)
    if option.type is int:
        # Not a slider, for which gradio has its own error, in English and without the element's name.
        # 0 means a default that is not a number.
        return gr.Number(value=option.default or 0, precision=0)
    if option.type is bool:
        return gr.Checkbox(value=option.default)
    return gr.Dropdown(choices=list(option.choices), value=option.default)


def create_ogpsa_tab() -> dict[str, Component]:
    """Create the accordion (`ogpsa_tab`), one row for each group of options; the elements have the options' names."""
    elems = {}
    with gr.Accordion(open=False) as ogpsa_tab:
        for group in dict.fromkeys(option.group for option in PANEL.values()):
            with gr.Row():
                elems |= {name: make_element(option) for name, option in PANEL.items() if option.group == group}
    return {"ogpsa_tab": ogpsa_tab, **elems}


def connect(elems: dict[str, Component], model_name: Component, finetuning_type: Component) -> None:
    """Connect the accordion and the plot to the other elements of the Train tab."""
    stage = elems["training_stage"]
    stage.change(lambda name: gr.Accordion(open=is_ogpsa(name)), [stage], [elems["ogpsa_tab"]], queue=False)
    # `input`, not `change`: loading a file must not set defaults.
    stage.input(
        change_defaults,
        [stage],
        [elems[name] for name in ("ogpsa_dataset", "ogpsa_update_interval", "dataset", "packing")],
        queue=False,
    )
    elems["ogpsa_dataset"].focus(
        list_general_sets, [elems["dataset_dir"], stage, elems["ogpsa_loss"]], [elems["ogpsa_dataset"]], queue=False
    )
    elems["output_dir"].input(
        show_run, [model_name, finetuning_type, elems["output_dir"]], [elems["loss_viewer"]], concurrency_limit=None
    )


def change_defaults(training_stage: str) -> tuple[Any, ...]:
    """Set a stage's defaults after the user has changed the training stage.

    Inputs: train.training_stage
    Outputs: train.ogpsa_dataset, train.ogpsa_update_interval, train.dataset, train.packing
    """
    name = stock_stage(training_stage)
    interval = OPTIONS["ogpsa_update_interval"].default_of(TRAINING_STAGES[name])
    stock = change_stage(name) if is_ogpsa(training_stage) else (gr.update(), gr.update())
    return [], interval, *stock


def fits(name: str, info: dict[str, Any], stage: str, loss: str) -> bool:
    """Return whether a dataset is of the kind that the reference loss needs."""
    try:
        check_datasets(SimpleNamespace(stage=stage, ogpsa_loss=loss, ogpsa_dataset=[name]), info)
    except ValueError:
        return False
    return True


def list_general_sets(dataset_dir: str, training_stage: str, loss: str) -> gr.Dropdown:
    """List the datasets that the reference loss can take.

    Inputs: train.dataset_dir, train.training_stage, train.ogpsa_loss
    Outputs: train.ogpsa_dataset
    """
    info = load_dataset_info(dataset_dir)
    stage = TRAINING_STAGES[stock_stage(training_stage)]
    return gr.Dropdown(choices=[name for name in info if fits(name, info, stage, loss)])


def show_run(model_name: str | None, finetuning_type: str, output_dir: str | None) -> gr.Plot:
    """Show the plot of a run that is chosen by its output directory; any other directory leaves the plot as it is.

    Inputs: top.model_name, top.finetuning_type, train.output_dir
    Outputs: train.loss_viewer
    """
    if not model_name or not output_dir:
        return gr.Plot()
    return show_figure(get_save_dir(model_name, finetuning_type, output_dir))


def options_of(panel: dict[str, Any]) -> dict[str, Any]:
    """Return the OGPSA options of a training command from the values of the accordion's elements."""
    options = {}
    for name, value in panel.items():
        option = PANEL[name]
        if option.type is list:
            options[name] = ",".join(value or [])
        elif option.type is bool:
            options |= {name: _as_text(value)} if value != option.default else {}
        elif value or option.default is not None:
            options[name] = value
    return options


def extra_options(extra_args: str) -> dict[str, Any]:
    """Return what the extra arguments set in place of the accordion and the stage list; null counts as not given."""
    given = {name: value for name, value in dict(json.loads(extra_args)).items() if value is not None}
    return {name: _as_text(value) for name, value in given.items() if name == "stage" or name.startswith(PREFIX)}


def _as_text(value: Any) -> Any:
    """Return a bool as text, because LlamaBoard leaves False out of its commands; other values stay as they are."""
    return str(value).lower() if isinstance(value, bool) else value
