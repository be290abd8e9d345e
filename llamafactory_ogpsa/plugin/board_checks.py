"""The checks before LlamaBoard starts an OGPSA run: those of the command line, on the arguments that it will get."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llamafactory.extras.misc import get_current_device
from llamafactory.hparams import parser
from llamafactory.hparams.training_args import TrainingArguments
from llamafactory.webui.common import _clean_cmd
from transformers import HfArgumentParser

from .backends import is_set, refuse_given, refuse_trainers
from .board_locales import alert, label
from .board_tab import PANEL
from .distributed import check_deepspeed
from .parser import check_run


class GivenArguments(TrainingArguments):
    """The training arguments of a run that another process will start.

    LLaMA-Factory's own class sets up devices, DeepSpeed and environment variables in the process that makes it. Here
    that process is LlamaBoard, which must go on to chat and to start other runs.
    """

    def __post_init__(self) -> None:
        with named("fsdp_config", self.fsdp_config):
            config = read_json(self.fsdp_config or {})
            # The Trainer takes both `version` and `fsdp_version`.
            self.fsdp_config = {name.removeprefix("fsdp_"): value for name, value in config.items()}

    @property
    def device(self) -> torch.device:
        """The device that the run will take."""
        return torch.device("cpu") if self.use_cpu else get_current_device()


def read_json(given: Any) -> Any:
    """Read a configuration that may be given by its file or as text."""
    if not isinstance(given, str):
        return given
    if given.startswith("{"):
        return json.loads(given)
    with open(given, encoding="utf-8") as f:
        return json.load(f)


@contextmanager
def named(option: str, given: Any) -> Iterator[None]:
    """Turn the error of a configuration that cannot be read, or is not a dict, into one that names the option."""
    try:
        yield
    except (AttributeError, OSError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise ValueError(
            f"`{option}` is {given!r}, which cannot be read ({err}); allowed: a JSON file of settings by name."
        ) from err


def check_arguments(args: dict[str, Any]) -> None:
    """Make the checks that `plugin.parser` makes in the process of the run.

    Raises:
        ValueError, RuntimeError: as there. LLaMA-Factory's own arguments may raise anything.
    """
    refuse_given(args)
    kinds = [GivenArguments if kind is TrainingArguments else kind for kind in parser._TRAIN_ARGS]
    parsed = HfArgumentParser(kinds).parse_dict(args, allow_extra_keys=is_set("ALLOW_EXTRA_ARGS"))
    model_args, data_args, training_args, finetuning_args = parsed[:4]
    refuse_trainers(model_args, training_args)
    if training_args.deepspeed:
        with named("deepspeed", training_args.deepspeed):
            check_deepspeed(read_json(training_args.deepspeed))
    check_run(data_args, training_args, finetuning_args)


def find_error(args: dict[str, Any], lang: str) -> str:
    """Return, in the language `lang`, what is wrong with an OGPSA run's training arguments; empty if nothing is."""
    if not args["ogpsa_dataset"]:
        return alert("err_ogpsa_no_dataset", lang)
    for name, option in PANEL.items():
        value = args.get(name, option.default)
        if option.type is int and option.default is not None and (value is None or is_below(value, 1)):
            return alert("err_ogpsa_count", lang, label(name, lang))
    if is_below(args.get("ogpsa_rank"), 0):
        return alert("err_ogpsa_rank", lang, label("ogpsa_rank", lang))

    try:
        check_arguments(_clean_cmd(args))
    except Exception as err:  # whatever it is, it would stop the run too
        return alert("err_ogpsa_options", lang, err if isinstance(err, ValueError) else f"{type(err).__name__}: {err}")
    return ""


def is_below(value: Any, least: int) -> bool:
    """Return whether a value is a number below another; texts in the extra arguments are left to other checks."""
    return isinstance(value, int) and value < least
