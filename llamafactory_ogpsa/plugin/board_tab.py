"""The accordion "OGPSA configurations" of LlamaBoard: its elements, what they react to, what is wrong with them."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr
from llamafactory.extras.constants import TRAINING_STAGES
from llamafactory.webui.common import get_save_dir, load_dataset_info
from llamafactory.webui.control import change_stage

from .arguments import OPTIONS, refuse_backends, resolve
from .board_locales import alert, label
from .board_plot import show_figure
from .parser import check_datasets, known_datasets


if TYPE_CHECKING:
    from gradio.components import Component


SUFFIX = " (OGPSA)"


def is_ogpsa(training_stage: str) -> bool:
    """Tell whether an entry of the stage list is one of OGPSA's."""
    return training_stage.endswith(SUFFIX)


def stock_stage(training_stage: str) -> str:
    """Return the entry of the stage list that an OGPSA entry extends; a stock entry comes back as it is."""
    return training_stage.removesuffix(SUFFIX)


def create_ogpsa_tab() -> dict[str, "Component"]:
    """Create the accordion in the block that is open, with the defaults of a supervised stage.

    Returns:
        the accordion as `ogpsa_tab`, and the element of each option under the option's name.
    """
    with gr.Accordion(open=False) as ogpsa_tab:
        with gr.Row():
            ogpsa_dataset = gr.Dropdown(multiselect=True, allow_custom_value=True, scale=2)
            # Not sliders: gradio refuses what is out of a slider's range itself, in English and without saying where.
            ogpsa_num_samples = gr.Number(value=200, precision=0)
            ogpsa_update_interval = gr.Number(value=30, precision=0)
            ogpsa_rank = gr.Number(value=0, precision=0)

        with gr.Row():
            ogpsa_scope = gr.Dropdown(choices=["parameter", "global"], value="parameter")
            ogpsa_method = gr.Dropdown(choices=["orthogonal", "conflict", "monitor"], value="orthogonal")
            ogpsa_loss = gr.Dropdown(choices=["stage", "sft"], value="stage")
            ogpsa_basis_device = gr.Dropdown(choices=["auto", "accelerator", "cpu"], value="auto")
            ogpsa_save_state = gr.Checkbox(value=True)

    return dict(
        ogpsa_tab=ogpsa_tab,
        ogpsa_dataset=ogpsa_dataset,
        ogpsa_num_samples=ogpsa_num_samples,
        ogpsa_update_interval=ogpsa_update_interval,
        ogpsa_rank=ogpsa_rank,
        ogpsa_scope=ogpsa_scope,
        ogpsa_method=ogpsa_method,
        ogpsa_loss=ogpsa_loss,
        ogpsa_basis_device=ogpsa_basis_device,
        ogpsa_save_state=ogpsa_save_state,
    )


def connect(elems: dict[str, "Component"], model_name: "Component", finetuning_type: "Component") -> None:
    """Let the accordion, and the plot, follow the rest of the Train tab.

    Args:
        elems: the elements of the Train tab, OGPSA's included.
        model_name: `top.model_name`.
        finetuning_type: `top.finetuning_type`.
    """
    stage = elems["training_stage"]
    stage.change(lambda name: gr.Accordion(open=is_ogpsa(name)), [stage], [elems["ogpsa_tab"]], queue=False)
    # `input`, not `change`: what is loaded from a file must stay.
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
    """Modify states after the user has changed the training stage.

    Inputs: train.training_stage
    Outputs: train.ogpsa_dataset, train.ogpsa_update_interval, train.dataset, train.packing
    """
    name = stock_stage(training_stage)
    interval = 5 if TRAINING_STAGES[name] in ("dpo", "kto") else 30
    stock = change_stage(name) if is_ogpsa(training_stage) else (gr.update(), gr.update())
    return [], interval, *stock


def fits(name: str, info: dict[str, Any], stage: str, loss: str) -> bool:
    """Tell whether a dataset is of the kind that the reference loss needs."""
    try:
        check_datasets(SimpleNamespace(stage=stage, ogpsa_loss=loss, ogpsa_dataset=[name]), info)
    except ValueError:
        return False
    return True


def list_general_sets(dataset_dir: str, training_stage: str, loss: str) -> "gr.Dropdown":
    """List the datasets that the reference loss can take.

    Inputs: train.dataset_dir, train.training_stage, train.ogpsa_loss
    Outputs: train.ogpsa_dataset
    """
    info = load_dataset_info(dataset_dir)
    stage = TRAINING_STAGES[stock_stage(training_stage)]
    return gr.Dropdown(choices=[name for name in info if fits(name, info, stage, loss)])


def show_run(model_name: str | None, finetuning_type: str, output_dir: str | None) -> "gr.Plot":
    """Show the plot of a run that is chosen by its output directory; any other directory leaves the plot as it is.

    Inputs: top.model_name, top.finetuning_type, train.output_dir
    Outputs: train.loss_viewer
    """
    if not model_name or not output_dir:
        return gr.Plot()
    return show_figure(get_save_dir(model_name, finetuning_type, output_dir))


def options_of(panel: dict[str, Any]) -> dict[str, Any]:
    """Return the OGPSA options of a training command.

    Args:
        panel: the values of the accordion's elements, by option.
    """
    # "false" as a word: LlamaBoard leaves a False out of its commands, and what is left out is true.
    options = {**panel, "ogpsa_dataset": ",".join(panel["ogpsa_dataset"] or []), "ogpsa_save_state": "false"}
    if not panel["ogpsa_rank"]:
        del options["ogpsa_rank"]
    if panel["ogpsa_save_state"]:
        del options["ogpsa_save_state"]
    return options


def find_error(panel: dict[str, Any], training_stage: str, dataset_dir: str, use_badam: bool, lang: str) -> str:
    """Say in the chosen language what is wrong with the options of an OGPSA run, as far as it shows before the start.

    Args:
        panel: the values of the accordion's elements, by option.
        training_stage: the entry of the stage list.
        dataset_dir: where the datasets are.
        use_badam: whether BAdam is on.
        lang: the language.

    Returns:
        the message; empty where nothing is wrong.
    """
    names, loss = panel["ogpsa_dataset"], panel["ogpsa_loss"]
    stage = TRAINING_STAGES[stock_stage(training_stage)]
    if not names:
        return alert("err_ogpsa_no_dataset", lang)

    for option in ("ogpsa_num_samples", "ogpsa_update_interval"):
        if not panel[option] or panel[option] < 1:
            return alert("err_ogpsa_count", lang, label(option, lang))
    if panel["ogpsa_rank"] is not None and panel["ogpsa_rank"] < 0:
        return alert("err_ogpsa_rank", lang, label("ogpsa_rank", lang))

    options = SimpleNamespace(**{**dict.fromkeys(OPTIONS), **options_of(panel)}, stage=stage, use_badam=use_badam)
    try:
        refuse_backends(options)
        resolve(options)
        info = known_datasets(dataset_dir)
    except ValueError as err:
        return alert("err_ogpsa_options", lang, err)

    if info is None:
        return ""
    unknown = [name for name in names if name not in info]
    if unknown:
        return alert("err_ogpsa_unknown", lang, ", ".join(unknown))
    unfit = [name for name in names if not fits(name, info, stage, loss)]
    if unfit:
        needs = {"dpo": "ranking", "rm": "ranking", "kto": "tags"}.get(stage if loss == "stage" else "sft", "plain")
        return alert(f"err_ogpsa_needs_{needs}", lang, ", ".join(unfit))
    return ""
