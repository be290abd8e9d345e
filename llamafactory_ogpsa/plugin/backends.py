"""Backends and trainers of LLaMA-Factory that OGPSA does not support: refused by name if a run asks for OGPSA.

The checks read what the user gave before LLaMA-Factory parses it, because its parser depends on the backend. Every
refusal is a ValueError that names the option, its value and what is allowed.
"""

import os
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from ..options import PREFIX, refuse_unknown
from .arguments import looks_like_ours
from .optimizers import refuse_optim


# The environment variables by which LLaMA-Factory takes another backend, and what the backend is called.
BACKENDS = {"USE_MCA": "Megatron", "USE_MEGATRON_BRIDGE": "Megatron Bridge", "USE_KT": "KTransformers"}


def is_set(variable: str) -> bool:
    """Return whether an environment variable is on, as LLaMA-Factory reads it."""
    return os.getenv(variable, "0").lower() in ("true", "y", "1")


def given_options(arguments: dict[str, Any] | list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the options that the user gave, by name.

    Args:
        arguments: as LLaMA-Factory reads them: a dict from a file, or a command line (`--name value`, `--name=value`
            or `name=value`).
    """
    if isinstance(arguments, dict):
        yield from arguments.items()
        return

    for word, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = word.partition("=")
        if equals or word.startswith("--"):
            yield name.removeprefix("--").replace("-", "_"), value if equals else following


def ogpsa_options(arguments: dict[str, Any] | list[str]) -> list[str]:
    """Return the given options that ask for OGPSA, as the user wrote them: `ogpsa_rank`, `stage: ogpsa_sft`."""
    asking = []
    for name, value in given_options(arguments):
        if value is None:
            continue
        if name.startswith(PREFIX):
            asking.append(name)
        elif name in ("stage", "finetuning_type") and looks_like_ours(value):
            asking.append(f"{name}: {value}")
    return asking


def refuse_asking(arguments: dict[str, Any] | list[str], reason: str, allowed: str) -> None:
    """Raise a ValueError with this reason if the given options ask for OGPSA; it lists those that do."""
    asking = ", ".join(f"`{name}`" for name in ogpsa_options(arguments))
    if asking:
        raise ValueError(f"{reason}; allowed: {allowed}, or a run without {asking}.")


def refuse_given(arguments: dict[str, Any] | list[str]) -> None:
    """Refuse what is wrong with the given options by themselves; `arguments` as for `given_options`.

    Raises:
        ValueError: an option is misspelt, or the options ask for OGPSA and an environment variable chooses a backend
            that OGPSA does not support.
    """
    refuse_unknown(name for name, _ in given_options(arguments))  # with ALLOW_EXTRA_ARGS they would be ignored
    for variable, backend in BACKENDS.items():
        if is_set(variable):
            refuse_asking(arguments, f"`{variable}` is set: OGPSA does not support the {backend} backend", "unset")


def refuse_parser(name: str, arguments: dict[str, Any] | list[str]) -> None:
    """Refuse an OGPSA run that LLaMA-Factory's function `name` parses, which OGPSA does not know."""
    reason = f"This run is parsed by LLaMA-Factory's `{name}`, which belongs to a backend that OGPSA does not support"
    refuse_asking(arguments, reason, "the default backend")


def refuse_trainers(model_args: Any, training_args: Any) -> None:
    """Refuse what the model and training arguments ask for and OGPSA does not support."""
    if getattr(model_args, "use_kt", False):
        raise ValueError("`use_kt` is True: OGPSA does not support the KTransformers backend; allowed: False.")
    refuse_optim(str(getattr(training_args.optim, "value", training_args.optim)))
