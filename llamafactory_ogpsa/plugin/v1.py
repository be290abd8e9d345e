"""The seam `llamafactory.v1.config.arg_parser`: the OGPSA options of LLaMA-Factory's next trainer (`USE_V1=1`).

Experimental, see docs/v1.md. v1's parser does not know the `ogpsa_*` options, and with `ALLOW_EXTRA_KEYS=1` it would
ignore them and train without OGPSA. A stage that has OGPSA (`plugin.v1_trainer`) takes them out before v1 parses the
rest; where they still reach the parser, they are refused. Every refusal is a ValueError that names the option, its
value and what is allowed.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import yaml
from omegaconf import OmegaConf

from ..options import OPTIONS, PREFIX, Settings, refuse_unknown, resolve
from .backends import given_options, ogpsa_options, refuse_asking


# What v1 parses: options by name, a command line, or None for that of this process.
InputArgument = dict[str, Any] | list[str] | None


def patch(module: ModuleType) -> None:
    """Wrap the function that parses the arguments of every v1 command, so that it refuses OGPSA.

    Raises:
        AttributeError: the module has no `get_args`; it is left as it was.
    """
    get_args = module.get_args

    @functools.wraps(get_args)
    def refusing_get_args(args=None):
        reason = "OGPSA is asked for, but this command of LLaMA-Factory's v1 trainer has no OGPSA"
        refuse_asking(read_all(args), reason, "`llamafactory-cli sft`")
        return get_args(args)

    module.get_args = refusing_get_args


def take_settings(
    args: InputArgument, stage: str, get_args: Callable[[InputArgument], tuple]
) -> tuple[Settings, tuple] | None:
    """Take the OGPSA options out of the arguments of a stage, parse the rest, and check the run as far as they tell.

    `get_args`: v1's function that parses arguments.

    Returns:
        the settings and what `get_args` made of the rest; None if the run does not ask for OGPSA.
    """
    asking = ogpsa_options(read_all(args))
    if not asking:
        return None

    classic = [name for name in asking if ":" in name]
    if classic:
        raise ValueError(
            f"`{classic[0]}` is given, but LLaMA-Factory's v1 trainer takes the stage from its command; allowed: "
            f"`llamafactory-cli {stage}` with `ogpsa_dataset`, or `USE_V1` unset."
        )
    options, rest = split_options(sys.argv[1:] if args is None else args)
    settings = make_settings(options, stage)
    parsed = get_args(rest)
    refuse_arguments(parsed[0], parsed[2])
    return settings, parsed


def is_file(words: dict[str, Any] | list[str]) -> bool:
    """Return whether a command line names a file of options, as v1's parser sees it."""
    return not isinstance(words, dict) and bool(words) and words[0].endswith((".yaml", ".yml", ".json"))


def read_all(args: InputArgument) -> dict[str, Any]:
    """Read the options from a dict, or from a command line (None: this process's) and the file that it may name."""
    words = sys.argv[1:] if args is None else args
    if not is_file(words):
        return dict(given_options(words))
    return {**OmegaConf.to_container(OmegaConf.load(words[0])), **dict(given_options(words[1:]))}


def split_options(words: dict[str, Any] | list[str]) -> tuple[dict[str, Any], dict[str, Any] | list[str]]:
    """Separate the `ogpsa_*` options from the rest of a dict of options, or of a command line, perhaps with a file.

    Returns:
        the OGPSA options by name, values of a command line read as YAML; and the rest for v1's parser.
    """
    if isinstance(words, dict):
        options = {name: value for name, value in words.items() if name.startswith(PREFIX)}
        return options, {name: value for name, value in words.items() if name not in options}

    given = {name: yaml.safe_load(value or "") for name, value in given_options(words) if name.startswith(PREFIX)}
    rest, skip = [], False
    for word in words:
        ours = any(name.startswith(PREFIX) for name, _ in given_options([word]))
        if not ours and not skip:
            rest.append(word)
        skip = ours and "=" not in word
    if not is_file(words):
        return given, rest

    config = OmegaConf.merge(OmegaConf.load(words[0]), OmegaConf.from_cli(rest[1:]))
    options, others = split_options(OmegaConf.to_container(config))
    return {**options, **given}, others


def make_settings(options: dict[str, Any], stage: str) -> Settings:
    """Check the options of a run, given by name, and fill in their defaults."""
    refuse_unknown(options)
    arguments = SimpleNamespace(**{name: options.get(name) for name in OPTIONS}, stage=stage, plot_loss=False)
    if arguments.ogpsa_save_state is None:
        arguments.ogpsa_save_state = False
    resolve(arguments)
    if arguments.ogpsa_save_state:
        raise ValueError(
            "`ogpsa_save_state` is True, but the checkpoints of LLaMA-Factory's v1 trainer cannot hold it; allowed: "
            "False."
        )
    return Settings.from_arguments(arguments)


def refuse_arguments(model_args: Any, training_args: Any) -> None:
    """Refuse what OGPSA does not support in v1."""
    config = training_args.dist_config or {}
    cp_size = max(config.get("cp_size", 1), getattr(training_args, "cp_size", 1))
    given = {
        "dist_config.name": (config.get("name"), (None, "fsdp2")),
        "cp_size": (cp_size, (1,)),
        "batching_strategy": (str(training_args.batching_strategy), ("normal",)),
        "resume_from_checkpoint": (training_args.resume_from_checkpoint, (None,)),
        "quant_config": (model_args.quant_config, (None,)),
    }
    for name, (value, allowed) in given.items():
        if value not in allowed:
            listed = ", ".join("not given" if item is None else str(item) for item in allowed)
            raise ValueError(
                f"`{name}` is {value!r}, which OGPSA does not support in LLaMA-Factory's v1 trainer; allowed: {listed}."
            )
