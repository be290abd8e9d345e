"""The seam `llamafactory.hparams.parser`: OGPSA's options are parsed with LLaMA-Factory's own.

It also makes the checks that need more than the finetuning arguments, before any model is loaded.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from ..kernels import triton_obstacle
from .arguments import extend
from .backends import refuse_given, refuse_parser, refuse_trainers
from .distributed import check_distributed
from .reference_info import check_datasets


def patch(module: Any) -> None:
    """Add OGPSA's options to the parser of training arguments in the executed module, and check what it returns.

    Only the list of the default backend, `_TRAIN_ARGS`, is extended. Other backends parse a run without OGPSA as they
    do without the plugin, and refuse one with OGPSA.

    Raises:
        AttributeError, TypeError, ValueError: the module does not look as expected; it is left as it was.
    """
    stock = module.FinetuningArguments
    extended = extend(stock)
    if stock not in module._TRAIN_ARGS:
        raise ValueError("_TRAIN_ARGS does not hold FinetuningArguments")

    get_train_args, parse_train_args, read_args = module.get_train_args, module._parse_train_args, module.read_args

    @functools.wraps(get_train_args)
    def checked_get_train_args(args=None):
        args = read_args(args)
        refuse_given(args)
        parsed = get_train_args(args)
        finetuning_args = next((item for item in parsed if isinstance(item, stock)), None)
        if not isinstance(finetuning_args, extended):
            refuse_parser("get_train_args", args)
        elif finetuning_args.ogpsa_enabled:
            _, data_args, training_args = parsed[:3]
            check_run(data_args, training_args, finetuning_args)
        return parsed

    @functools.wraps(parse_train_args)
    def checked_parse_train_args(args=None):
        model_args, data_args, training_args, finetuning_args, *others = parse_train_args(args)
        if finetuning_args.ogpsa_enabled:
            refuse_trainers(model_args, training_args)  # before LLaMA-Factory checks what these options need
        return model_args, data_args, training_args, finetuning_args, *others

    for name in other_parsers(module):
        setattr(module, name, refusing(getattr(module, name), read_args))
    module._TRAIN_ARGS[:] = [extended if item is stock else item for item in module._TRAIN_ARGS]
    module._parse_train_args = checked_parse_train_args
    module.get_train_args = checked_get_train_args


def other_parsers(module: Any) -> list[str]:
    """Return the names of the functions that parse the training arguments of other backends."""
    return [name for name in vars(module) if re.fullmatch(r"_parse_train_\w+_args", name)]


def refusing(parse: Callable[..., Any], read_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap another backend's parser so that it refuses a run that asks for OGPSA."""

    @functools.wraps(parse)
    def checked_parse(args=None):
        args = read_args(args)
        refuse_parser(parse.__name__, args)
        return parse(args)

    return checked_parse


def check_run(data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Check an OGPSA run as a whole.

    Raises:
        ValueError: names the option, what was given and what is allowed.
        RuntimeError: this LLaMA-Factory does not look as the plugin expects.
    """
    from .workflow import check_seam

    check_distributed(training_args)
    if not training_args.do_train:
        return

    if finetuning_args.ogpsa_kernel == "triton":
        obstacle = triton_obstacle(training_args.device.type, interpret=True)
        if obstacle:
            raise ValueError(f"`ogpsa_kernel` is 'triton', but {obstacle}; allowed here: auto, torch.")
    check_datasets(finetuning_args, data_args.dataset_dir)
    check_seam(finetuning_args.stage)
