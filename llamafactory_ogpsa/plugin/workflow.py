"""The seam `llamafactory.train.<stage>.workflow`: a stage's `run_*`, and the names that it looks up in an OGPSA run.

`run_*` is wrapped for good. Only while it executes a run that asks for OGPSA are two names replaced: `get_dataset`
also reads the reference sets (it is called before the model is loaded), and the trainer class projects its gradients.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from .. import TESTED_WITH
from .datasets import load_reference_sets
from .replace import replaced
from .trainer import with_ogpsa


# The trainer class of each stage, by the name that its workflow looks up.
TRAINERS = {
    "pt": "CustomTrainer",
    "sft": "CustomSeq2SeqTrainer",
    "rm": "PairwiseTrainer",
    "dpo": "CustomDPOTrainer",
    "kto": "CustomKTOTrainer",
}

_GET_DATASET_PARAMETERS = ["template", "model_args", "data_args", "training_args", "stage", "tokenizer", "processor"]


def patch(module: ModuleType) -> None:
    """Wrap the `run_*` of a workflow module that has just been executed.

    Raises:
        AttributeError: the module does not have its `run_*`; it is left as it was.
    """
    stage = module.__name__.split(".")[-2]
    run = getattr(module, f"run_{stage}")

    @functools.wraps(run)
    def run_stage(model_args, data_args, training_args, finetuning_args, *args, **kwargs):
        asked = getattr(finetuning_args, "ogpsa_enabled", False) and training_args.do_train
        with ogpsa_names(stage, finetuning_args) if asked else nullcontext():
            return run(model_args, data_args, training_args, finetuning_args, *args, **kwargs)

    run_stage.ogpsa_stage = stage
    setattr(module, f"run_{stage}", run_stage)


def _modules(stage: str) -> list[ModuleType]:
    """Return the modules in which a workflow may look its names up: itself, and the trainer's (imported on call)."""
    return [importlib.import_module(f"llamafactory.train.{stage}.{name}") for name in ("workflow", "trainer")]


def check_seam(stage: str) -> None:
    """Check that LLaMA-Factory looks as the plugin expects where a run of this stage will be patched.

    Raises:
        RuntimeError: it does not; says what was looked for, and that stock runs are not affected.
    """
    problems = []
    workflow, trainer = _modules(stage)
    if getattr(getattr(workflow, f"run_{stage}", None), "ogpsa_stage", None) != stage:
        problems.append(f"run_{stage} is not patched")
    get_dataset = getattr(workflow, "get_dataset", None)
    if get_dataset is None or list(inspect.signature(get_dataset).parameters) != _GET_DATASET_PARAMETERS:
        problems.append("get_dataset has other parameters")
    trainer_class = getattr(trainer, TRAINERS[stage], None)
    for method in (
        "training_step",
        "compute_loss",
        "log",
        "add_callback",
        "_save_optimizer_and_scheduler",
        "_load_optimizer_and_scheduler",
    ):
        if not callable(getattr(trainer_class, method, None)):
            problems.append(f"{TRAINERS[stage]} has no {method}")
    if problems:
        from llamafactory.extras.env import VERSION

        raise RuntimeError(
            f"OGPSA does not know LLaMA-Factory {VERSION} (stage {stage}: {'; '.join(problems)}). Use a version that "
            f"it is tested with, {TESTED_WITH}; stock stages are not affected."
        )


@contextmanager
def ogpsa_names(stage: str, finetuning_args: Any) -> Iterator[None]:
    """Replace `get_dataset` and the trainer class of a stage while the context is open.

    Raises:
        RuntimeError: see `check_seam`.
    """
    check_seam(stage)
    modules = _modules(stage)
    stock_get_dataset = modules[0].get_dataset
    loaded: dict[str, Any] = {}

    @functools.wraps(stock_get_dataset)
    def get_dataset(*args, **kwargs):
        call = inspect.signature(stock_get_dataset).bind(*args, **kwargs)
        call.apply_defaults()
        # The reference sets come first, so that an error in them shows at once and not after hours of tokenising the
        # training set.
        loaded.update(sets=load_reference_sets(stock_get_dataset, finetuning_args, call.arguments), **call.arguments)
        return stock_get_dataset(*args, **kwargs)

    names = {"get_dataset": get_dataset}
    names[TRAINERS[stage]] = with_ogpsa(getattr(modules[1], TRAINERS[stage]), stage, finetuning_args, loaded)
    with replaced(modules, names):
        yield
