"""The seam `llamafactory.webui.interface`: OGPSA's stages and options in LlamaBoard.

While LlamaBoard's own functions build it, the Train tab gets one more accordion. Its elements are inputs of everything
that reads or restores the options; `board_runner` makes a command from them. If anything is not as expected,
LlamaBoard is built again without OGPSA, and an error is printed.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import STAGES_USE_PAIR_DATA, TRAINING_STAGES
from llamafactory.webui.engine import Engine
from llamafactory.webui.locales import LOCALES as STOCK_LOCALES

from ..autoload import STAGES
from ..options import PREFIX
from .board_locales import LOCALES, add_locales
from .board_runner import check_runner, hook_runner
from .board_tab import SUFFIX, connect, create_ogpsa_tab, is_ogpsa


# The elements of the Train tab that OGPSA reads, listens to or writes to.
_ELEMENTS = {
    "training_stage",
    "dataset_dir",
    "dataset",
    "packing",
    "apollo_tab",
    "output_dir",
    "output_box",
    "progress_bar",
    "loss_viewer",
}


def patch(module: ModuleType) -> None:
    """Wrap the function of the executed module that builds LlamaBoard.

    Raises:
        AttributeError, TypeError, ValueError: the web UI does not look as expected; it is left as it was.
    """
    if not hasattr(module, "create_ui"):
        raise AttributeError("create_ui is not there; start the web UI with `llamafactory-cli webui`")
    check_layout(module)
    create_ui = module.create_ui

    @functools.wraps(create_ui)
    def create_ui_with_ogpsa(*args, **kwargs):
        try:
            with ogpsa_names(module):
                add_entries()
                return create_ui(*args, **kwargs)
        except Exception as err:
            remove_entries()
            print(f"llamafactory-ogpsa: OGPSA is not available in this web UI: {err}", file=sys.stderr)
            return create_ui(*args, **kwargs)

    module.create_ui = create_ui_with_ogpsa


def check_layout(module: ModuleType) -> None:
    """Check what can be checked of LlamaBoard before it is built.

    Raises:
        AttributeError, TypeError, ValueError: it does not look as expected; says what was looked for.
    """
    check_runner()
    parameters = list(inspect.signature(module.create_train_tab).parameters)
    if parameters != ["engine"]:
        raise TypeError(f"create_train_tab has the parameters {parameters}, not ['engine']")
    if not set(STAGES) <= set(TRAINING_STAGES.values()) or not isinstance(STAGES_USE_PAIR_DATA, set):
        raise ValueError(f"the training stages are {TRAINING_STAGES}, those with pairs {STAGES_USE_PAIR_DATA}")
    if "galore_tab" not in STOCK_LOCALES:
        raise ValueError("the GaLore accordion has no labels")


def add_entries() -> None:
    """Add OGPSA to the tables in which LlamaBoard looks up stages and labels."""
    for label, stage in list(TRAINING_STAGES.items()):
        if stage in STAGES:
            TRAINING_STAGES[label + SUFFIX] = PREFIX + stage
    STAGES_USE_PAIR_DATA.update(PREFIX + stage for stage in STAGES if stage in STAGES_USE_PAIR_DATA)
    add_locales(STOCK_LOCALES)


def remove_entries() -> None:
    """Undo `add_entries`, even if it failed halfway."""
    for label in [label for label in TRAINING_STAGES if is_ogpsa(label)]:
        del TRAINING_STAGES[label]
    STAGES_USE_PAIR_DATA.difference_update(PREFIX + stage for stage in STAGES)
    for name in LOCALES:
        STOCK_LOCALES.pop(name, None)


@contextmanager
def ogpsa_names(module: ModuleType) -> Iterator[None]:
    """Replace the functions that LlamaBoard's builders look up while the context is open."""
    train = importlib.import_module("llamafactory.webui.components.train")
    create_train_tab, change_stage = module.create_train_tab, train.change_stage

    @functools.wraps(change_stage)
    def change_stage_with_ogpsa(training_stage):
        # LlamaBoard empties the dataset list whenever the stage changes, also after loading both from a file. OGPSA's
        # stages are never the default, so loading one always changes the stage. For changes by the user,
        # `change_defaults` empties the list.
        return (gr.update(), gr.update()) if is_ogpsa(training_stage) else change_stage(training_stage)

    module.create_train_tab = functools.partial(create_train_tab_with_ogpsa, create_train_tab)
    train.change_stage = change_stage_with_ogpsa
    try:
        yield
    finally:
        module.create_train_tab, train.change_stage = create_train_tab, change_stage


def create_train_tab_with_ogpsa(
    create_train_tab: Callable[[Engine], dict[str, Component]], engine: Engine
) -> dict[str, Component]:
    """Create LlamaBoard's Train tab by its own function, with OGPSA's accordion in it; return all elements.

    Raises:
        RuntimeError: the tab does not look as expected.
    """
    manager = engine.manager
    tab = create_ogpsa_tab()
    base_elems = manager.get_base_elems()
    base_elems.update(elem for name, elem in tab.items() if name != "ogpsa_tab")
    asked = []
    # Preview, start and save read the base elements; load and reload write them.
    manager.get_base_elems = lambda: asked.append(True) or set(base_elems)
    hook_runner(engine.runner)
    try:
        elems = create_train_tab(engine)
    finally:
        del manager.get_base_elems

    missing = _ELEMENTS - elems.keys()
    if missing or not asked:
        raise RuntimeError(f"the Train tab does not look as expected (missing: {sorted(missing)}, inputs: {asked})")
    move_behind(tab["ogpsa_tab"], elems["apollo_tab"])
    connect({**elems, **tab}, manager.get_elem_by_id("top.model_name"), manager.get_elem_by_id("top.finetuning_type"))
    return {**elems, **tab}


def move_behind(block: Any, other: Any) -> None:
    """Move a block of the layout behind one of its siblings.

    Raises:
        RuntimeError: the two are not siblings.
    """
    if block.parent is not other.parent:
        raise RuntimeError("the accordions are not where they are expected")
    siblings = block.parent.children
    siblings.remove(block)
    siblings.insert(siblings.index(other) + 1, block)
