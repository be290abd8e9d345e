"""The seam `llamafactory.hparams.parser`: OGPSA's options are parsed with LLaMA-Factory's own.

The checks that need more than the finetuning arguments (which datasets exist, how many processes there are) are made
here too, before any model is loaded.
"""

import functools
import json
import os
import re
from collections.abc import Callable
from typing import Any

from ..kernels import triton_obstacle
from .arguments import extend
from .backends import refuse_environment, refuse_parser, refuse_trainers
from .distributed import check_distributed


def patch(module: Any) -> None:
    """Let the parser of training arguments know OGPSA's options, and check what it returns.

    Only the list of the default backend, `_TRAIN_ARGS`, is extended. Any other stays as it is: a run without OGPSA is
    parsed there as without the plugin, one with OGPSA is refused.

    Args:
        module: the executed `llamafactory.hparams.parser`.

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
        refuse_environment(args)
        parsed = get_train_args(args)
        finetuning_args = next((item for item in parsed if isinstance(item, stock)), None)
        if not isinstance(finetuning_args, extended):
            refuse_parser("get_train_args", args)
        elif finetuning_args.ogpsa_enabled:
            model_args, data_args, training_args = parsed[:3]
            check_run(model_args, data_args, training_args, finetuning_args)
        return parsed

    @functools.wraps(parse_train_args)
    def checked_parse_train_args(args=None):
        model_args, data_args, training_args, finetuning_args, *others = parse_train_args(args)
        if finetuning_args.ogpsa_enabled:
            refuse_trainers(model_args, training_args)  # before LLaMA-Factory looks for what these need
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
    """Wrap the parser of another backend, which then refuses a run that asks for OGPSA."""

    @functools.wraps(parse)
    def checked_parse(args=None):
        args = read_args(args)
        refuse_parser(parse.__name__, args)
        return parse(args)

    return checked_parse


def check_run(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Check an OGPSA run as a whole.

    Raises:
        ValueError: names the option, what was given and what is allowed.
        RuntimeError: this LLaMA-Factory does not look as the plugin expects.
    """
    from .workflow import check_seam

    check_distributed(training_args)
    if not training_args.do_train:
        return

    obstacle = (
        triton_obstacle(training_args.device.type, interpret=True)
        if finetuning_args.ogpsa_kernel == "triton"
        else None
    )
    if obstacle:
        raise ValueError(f"`ogpsa_kernel` is 'triton', but {obstacle}; allowed here: auto, torch.")
    check_datasets(finetuning_args, data_args.dataset_dir)
    check_seam(finetuning_args.stage)


def known_datasets(dataset_dir: Any) -> dict[str, Any] | None:
    """Return the entries of dataset_info.json by name; None where there is no local one to look into.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    if isinstance(dataset_dir, dict):
        return dataset_dir
    if dataset_dir == "ONLINE" or dataset_dir.startswith("REMOTE:"):
        return None

    path = os.path.join(dataset_dir, "dataset_info.json")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as err:
        raise ValueError(f"`dataset_dir` is {dataset_dir!r}; allowed: a folder with a dataset_info.json ({err}).")


def check_datasets(finetuning_args: Any, dataset_dir: Any) -> None:
    """Check that the reference sets exist and are of the kind that the reference loss needs.

    Raises:
        ValueError: an unknown name (the known ones are listed), a file that is missing, or a set of the wrong kind
            (says what to set).
    """
    info = known_datasets(dataset_dir)
    if info is None:
        return

    stage, loss = finetuning_args.stage, finetuning_args.ogpsa_loss
    kind = "sft" if loss == "sft" else stage
    for name in finetuning_args.ogpsa_dataset:
        if name not in info:
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which is not in dataset_info.json; allowed: {', '.join(sorted(info))}."
            )
        check_file(name, info[name], dataset_dir)
        ranking = bool(info[name].get("ranking", False))
        tagged = "kto_tag" in (info[name].get("columns") or {})
        if kind in ("dpo", "rm") and not ranking:
            hint = "a set with rankings, or `ogpsa_loss: sft`" if kind == "dpo" else "a set with rankings"
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which has no rankings, but the reference loss of stage {stage} needs "
                f"them; allowed: {hint}."
            )
        if kind not in ("dpo", "rm") and ranking:
            fix = "; or set `ogpsa_loss: stage`" if stage == "dpo" else ""
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which is a ranking set, but the reference loss ({loss}) of stage "
                f"{stage} needs plain records; allowed: a set without rankings{fix}."
            )
        if kind == "kto" and not tagged:
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which has no kto_tag column, but the reference loss of stage kto "
                "needs one; allowed: a set with a kto_tag, or `ogpsa_loss: sft`."
            )


def check_file(name: str, entry: Any, dataset_dir: Any) -> None:
    """Check that the file of a reference set exists, where its entry in dataset_info.json names a local one.

    Raises:
        ValueError: it does not, or the entry names nothing to read.
    """
    sources = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
    if not isinstance(entry, dict) or not any(source in entry for source in sources):
        raise ValueError(
            f"`ogpsa_dataset` has {name!r}, whose entry in dataset_info.json does not say what to read; allowed: an "
            f"entry with one of {', '.join(sources)}."
        )
    if any(source in entry for source in sources[:-1]) or isinstance(dataset_dir, dict):
        return

    path = os.path.join(dataset_dir, entry["file_name"])
    if not os.path.isfile(path) and not (os.path.isdir(path) and os.listdir(path)):
        raise ValueError(
            f"`ogpsa_dataset` has {name!r}, whose `file_name` in dataset_info.json is {entry['file_name']!r}, but "
            f"{path} is not there or is an empty folder; allowed: a file or a folder of files."
        )
