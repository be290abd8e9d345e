"""The seam `llamafactory.hparams.parser`: OGPSA's options are parsed with LLaMA-Factory's own.

The checks that need more than the finetuning arguments (which datasets exist, how many processes there are) are made
here too, before any model is loaded.
"""

import functools
import json
import os
from typing import Any

from ..kernels import triton_obstacle
from .arguments import extend, refuse_environment
from .distributed import check_distributed
from .optimizers import refuse_optim


def patch(module: Any) -> None:
    """Replace FinetuningArguments in the parser's lists by its extension and check what `get_train_args` returns.

    Args:
        module: the executed `llamafactory.hparams.parser`.

    Raises:
        AttributeError, TypeError, ValueError: the module does not look as expected; it is left as it was.
    """
    stock = module.FinetuningArguments
    extended = extend(stock)
    lists = [module._TRAIN_ARGS, getattr(module, "_TRAIN_MCA_ARGS", [])]
    if stock not in module._TRAIN_ARGS:
        raise ValueError("_TRAIN_ARGS does not hold FinetuningArguments")

    get_train_args, read_args = module.get_train_args, module.read_args

    @functools.wraps(get_train_args)
    def checked_get_train_args(args=None):
        args = read_args(args)
        refuse_environment(args)
        parsed = get_train_args(args)
        model_args, data_args, training_args, finetuning_args, _ = parsed
        if finetuning_args.ogpsa_enabled:
            check_run(model_args, data_args, training_args, finetuning_args)
        return parsed

    for arguments in lists:
        arguments[:] = [extended if item is stock else item for item in arguments]
    module.get_train_args = checked_get_train_args


def check_run(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Check an OGPSA run as a whole.

    Raises:
        ValueError: names the option, what was given and what is allowed.
        RuntimeError: this LLaMA-Factory does not look as the plugin expects.
    """
    from .workflow import check_seam

    if getattr(model_args, "use_kt", False):
        raise ValueError("`use_kt` is True: OGPSA does not support the KTransformers backend; allowed: False.")

    refuse_optim(str(getattr(training_args.optim, "value", training_args.optim)))
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
        ValueError: an unknown name (the known ones are listed), or a set of the wrong kind (says what to set).
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
