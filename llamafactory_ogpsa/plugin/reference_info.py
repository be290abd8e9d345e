"""Checks of the reference sets' entries in dataset_info.json, before anything is read or tokenised."""

import json
import os
from typing import Any


def known_datasets(dataset_dir: Any) -> dict[str, Any] | None:
    """Return the entries of dataset_info.json by name; None if there is no local one to look into.

    Raises:
        ValueError: the file is missing or does not hold entries by name.
    """
    if isinstance(dataset_dir, dict):
        return dataset_dir
    if dataset_dir == "ONLINE" or str(dataset_dir).startswith("REMOTE:"):
        return None

    path = os.path.join(str(dataset_dir), "dataset_info.json")
    try:
        with open(path, encoding="utf-8") as f:
            info = json.load(f)
        if not isinstance(info, dict):
            raise ValueError("it does not hold entries by name")
        return info
    except (OSError, ValueError) as err:
        raise ValueError(f"`dataset_dir` is {dataset_dir!r}; allowed: a folder with a dataset_info.json ({err}).")


def choose_loss(stage: str, option: str, entry: dict[str, Any]) -> str:
    """Return the reference loss of a set: `stage` or `sft`.

    Args:
        stage: the training stage.
        option: `ogpsa_loss`; `auto` follows the data: in the DPO and KTO stages rankings and tagged records mean the
            stage's loss, plain records the SFT loss.
        entry: the set's entry in dataset_info.json.
    """
    if stage not in ("dpo", "kto"):
        return "stage"
    if option != "auto":
        return option
    ranked = bool(entry.get("ranking", False)) if stage == "dpo" else "kto_tag" in (entry.get("columns") or {})
    return "stage" if ranked else "sft"


def check_datasets(finetuning_args: Any, dataset_dir: Any) -> None:
    """Check that the reference sets exist and are of the kind that their reference loss needs.

    Raises:
        ValueError: an unknown name (the known ones are listed), a file that is missing, or a set of the wrong kind
            (says what to set).
    """
    info = known_datasets(dataset_dir)
    if info is None:
        return

    stage = finetuning_args.stage
    for name in finetuning_args.ogpsa_dataset:
        if name not in info:
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which is not in dataset_info.json; allowed: {', '.join(sorted(info))}."
            )
        check_file(name, info[name], dataset_dir)
        loss = choose_loss(stage, finetuning_args.ogpsa_loss, info[name])
        kind = "sft" if loss == "sft" else stage
        ranking = bool(info[name].get("ranking", False))
        tagged = "kto_tag" in (info[name].get("columns") or {})
        if kind in ("dpo", "rm") and not ranking:
            hint = "a set with rankings, or `ogpsa_loss: auto`" if kind == "dpo" else "a set with rankings"
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which has no rankings, but the reference loss of stage {stage} needs "
                f"them; allowed: {hint}."
            )
        if kind not in ("dpo", "rm") and ranking:
            fix = "; or set `ogpsa_loss: auto`" if stage == "dpo" else ""
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which is a ranking set, but the reference loss ({loss}) of stage "
                f"{stage} needs plain records; allowed: a set without rankings{fix}."
            )
        if kind == "kto" and not tagged:
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, which has no kto_tag column, but the reference loss of stage kto "
                "needs one; allowed: a set with a kto_tag, or `ogpsa_loss: auto`."
            )


def check_file(name: str, entry: Any, dataset_dir: Any) -> None:
    """Check that the file of a reference set exists, if its entry in dataset_info.json names a local one.

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
