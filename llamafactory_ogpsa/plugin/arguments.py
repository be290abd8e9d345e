"""The `ogpsa_*` options as fields of LLaMA-Factory's finetuning arguments.

Every refusal is a ValueError that names the option, its value and what is allowed.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_args, get_type_hints

from ..autoload import STAGES
from ..options import OPTIONS, PREFIX, Option, resolve
from .optimizers import refuse_switches


FINETUNING_TYPES = ("full", "lora", "freeze", "oft")


def _argument(option: Option) -> tuple[Any, Any]:
    """Return the type and the field of an option; the field is None unless the option is given."""
    # Numbers are parsed as text, because argparse would refuse 200.0; `resolve` checks them and names the option.
    kind = {list: str, int: str, str: Literal[option.choices or ("",)], bool: bool}[option.type]
    # `%(default).0s` prints nothing, and stops argparse from adding the field's own default, which is None.
    default = option.shown_default if option.type is list else f"default: {option.shown_default}"
    return kind | None, field(default=None, metadata={"help": f"{option.help} ({default})%(default).0s"})


OgpsaArguments = make_dataclass("OgpsaArguments", [(name, *_argument(option)) for name, option in OPTIONS.items()])


def looks_like_ours(value: Any) -> bool:
    """Return whether a stage or finetuning type is meant to ask for OGPSA, misspelt or not: `ogpsa`, `ogpsa_stf`."""
    return str(value).startswith(PREFIX.removesuffix("_"))


def split_prefix(name: str, value: Any, allowed: Iterable[str]) -> tuple[Any, bool]:
    """Split a stage or finetuning type, `ogpsa_sft` into (`sft`, True); a stock value comes back with False.

    Raises:
        ValueError: the value looks like one of OGPSA's and is not.
    """
    if not looks_like_ours(value):
        return value, False

    spellings = [PREFIX + item for item in allowed]
    if value not in spellings:
        raise ValueError(f"`{name}` is {value!r}; allowed with OGPSA: {', '.join(spellings)}.")
    return value.removeprefix(PREFIX), True


def extend(stock: type) -> type:
    """Extend LLaMA-Factory's FinetuningArguments by the `ogpsa_*` options, stages and finetuning types.

    Returns:
        a subclass of the same name. Its instances have stock values in `stage` and `finetuning_type`, whatever was
        given; `ogpsa_enabled` is True if the run asks for OGPSA.

    Raises:
        TypeError: the class does not have the fields that are extended.
    """
    hints = get_type_hints(stock)
    stages, types = get_args(hints.get("stage")), get_args(hints.get("finetuning_type"))
    if not set(STAGES) <= set(stages) or not types:
        raise TypeError(f"{stock.__name__} has stages {stages} and finetuning types {types}")

    supported_types = tuple(kind for kind in types if kind in FINETUNING_TYPES)
    stock_fields = {item.name: copy(item) for item in fields(stock)}  # `dataclass` will write new types into them

    @dataclass
    class FinetuningArguments(OgpsaArguments, stock):
        stage: Literal[stages + tuple(PREFIX + stage for stage in STAGES)] = stock_fields["stage"]
        finetuning_type: Literal[types + tuple(PREFIX + kind for kind in supported_types)] = stock_fields[
            "finetuning_type"
        ]

        def __post_init__(self):
            given_stage, given_type = self.stage, self.finetuning_type
            self.stage, by_stage = split_prefix("stage", given_stage, STAGES)
            self.finetuning_type, by_type = split_prefix("finetuning_type", given_type, supported_types)
            self.ogpsa_enabled = by_stage or by_type

            if self.ogpsa_enabled:
                if self.stage == "ppo":
                    raise ValueError(f"`stage` is 'ppo', which OGPSA does not support; allowed: {', '.join(STAGES)}.")
                refuse_switches(self)
                resolve(self)
            else:
                given = [name for name in OPTIONS if getattr(self, name) is not None]
                if given:
                    change = f"change `stage: {given_stage}` to `stage: {PREFIX}{given_stage}`, or "
                    raise ValueError(
                        f"`{given[0]}` is {getattr(self, given[0])!r}, but neither `stage` ({given_stage}) nor "
                        f"`finetuning_type` ({given_type}) asks for OGPSA; "
                        f"{change if given_stage in STAGES else ''}remove {', '.join(f'`{name}`' for name in given)}."
                    )
            super().__post_init__()

        def to_dict(self) -> dict[str, Any]:
            # Trackers must get from a stock run what they get without the plugin.
            arguments = super().to_dict()
            return arguments if self.ogpsa_enabled else {k: v for k, v in arguments.items() if k not in OPTIONS}

    # pickle looks the class up under this name.
    globals()[stock.__name__] = FinetuningArguments
    FinetuningArguments.__qualname__ = stock.__name__
    FinetuningArguments.__doc__ = stock.__doc__
    return FinetuningArguments
