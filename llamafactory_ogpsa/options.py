"""The `ogpsa_*` options, each declared once, as a field of `Settings`.

LLaMA-Factory's arguments and their `--help` (`plugin.arguments`), the checks, the defaults, the tables in
docs/options.md (scripts/options_table.py) and the web UI's panel (`plugin.board_tab`) are made from these fields.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

from .geometry import SCOPES
from .inputs import DEFAULT_RANK, MOST_DIRECTIONS
from .kernels import MAX_RANK
from .projection import METHODS


PREFIX = "ogpsa_"

# Optimizer steps between refreshes, and the same for DPO and KTO.
_INTERVAL, _PREFERENCE_INTERVAL = 30, 5


@dataclass(frozen=True)
class Option:
    """The declaration of an option.

    Attributes:
        type: `list` (dataset names), `int` (a positive integer), `str` (one of `choices`) or `bool`.
        help: what it does.
        group: the heading under which docs/options.md and the web UI show it.
        default: the value if none is given; None if `default_text` describes it.
        default_text: the default in words, if `default` does not show it.
        by_stage: defaults of single training stages.
        choices: the allowed values of a `str`.
        panel: whether the web UI has an element for it; others are given in LlamaBoard's extra arguments.
    """

    type: type
    help: str
    group: str
    default: Any = None
    default_text: str = ""
    by_stage: dict[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    panel: bool = True

    def default_of(self, stage: str) -> Any:
        """Return the default in a training stage."""
        return self.by_stage.get(stage, self.default)

    @property
    def shown_default(self) -> str:
        """The default as it is shown to users."""
        return "required" if self.type is list else self.default_text or str(self.default).lower()


def _option(type: type, help: str, group: str, **kwargs: Any) -> Any:
    return field(metadata={"option": Option(type, help, group, **kwargs)})


@dataclass(frozen=True)
class Settings:
    """The options of a run, checked and with their defaults filled in; `ogpsa_` is left out of the names."""

    dataset: list[str] = _option(
        list,
        "The datasets of the general capabilities to preserve, one capability each: names in dataset_info.json, "
        "separated by commas.",
        "Reference data",
    )
    num_samples: int = _option(
        int, "The first N samples of each reference dataset are used.", "Reference data", default=200
    )
    refresh_samples: int | None = _option(
        int,
        "Samples per reference dataset and refresh, taken in turn from the first `ogpsa_num_samples`.",
        "Reference data",
        default_text="all of them every time",
        panel=False,
    )
    loss: str = _option(
        str,
        "The reference loss. auto: what each dataset is for, the loss of the training stage for rankings and tagged "
        "records and the SFT loss for plain ones in the DPO and KTO stages; stage, sft: that one for all.",
        "Reference data",
        default="auto",
        choices=("auto", "stage", "sft"),
    )
    batch_size: int | None = _option(
        int,
        "Samples per reference batch.",
        "Reference data",
        default_text="`per_device_train_batch_size`",
        panel=False,
    )
    update_interval: int = _option(
        int,
        "Optimizer steps between two refreshes of the subspace.",
        "Subspace",
        default=_INTERVAL,
        by_stage={"dpo": _PREFERENCE_INTERVAL, "kto": _PREFERENCE_INTERVAL},
        default_text=f"{_INTERVAL}; {_PREFERENCE_INTERVAL} for DPO and KTO",
    )
    scope: str = _option(
        str,
        "parameter: a subspace per parameter tensor; global: one for all; inputs: for each weight matrix the input "
        "directions that the reference data use.",
        "Subspace",
        default="parameter",
        choices=SCOPES,
    )
    rank: int | None = _option(
        int,
        "The most directions kept in the subspace; more than one per dataset split the samples of each dataset. "
        "With `ogpsa_scope: inputs`: directions per weight matrix.",
        "Subspace",
        default_text=f"one per dataset; {DEFAULT_RANK} with `ogpsa_scope: inputs`",
    )
    method: str = _option(
        str,
        "orthogonal: remove the whole component in the subspace; conflict: remove only what raises a reference loss; "
        "monitor: measure the component and change nothing.",
        "Subspace",
        default="orthogonal",
        choices=METHODS,
    )
    basis_device: str = _option(
        str,
        "Where the basis of the subspace is kept. auto: decide by the free memory; accelerator; cpu: in pinned host "
        "memory.",
        "Machine",
        default="auto",
        choices=("auto", "accelerator", "cpu"),
    )
    basis_dtype: str = _option(
        str,
        "The precision of the basis. auto: that of the gradients.",
        "Machine",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        panel=False,
    )
    kernel: str = _option(
        str,
        "The implementation of the projection. auto: Triton where it runs, else torch.",
        "Machine",
        default="auto",
        choices=("auto", "triton", "torch"),
        panel=False,
    )
    save_state: bool = _option(
        bool,
        "Save the basis in checkpoints, so that a resumed run ends as an uninterrupted one. If false, it is computed "
        "again where training resumes.",
        "Machine",
        default=True,
    )
    plot: bool  # LLaMA-Factory's `plot_loss`

    @classmethod
    def from_arguments(cls, arguments: Any) -> "Settings":
        """Collect the settings from LLaMA-Factory's finetuning arguments, on which `resolve` was called."""
        options = {name.removeprefix(PREFIX): getattr(arguments, name) for name in OPTIONS}
        return cls(**options, plot=arguments.plot_loss)


OPTIONS: dict[str, Option] = {
    PREFIX + item.name: item.metadata["option"] for item in fields(Settings) if "option" in item.metadata
}


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuse names that begin like OGPSA's options but are none of them.

    Raises:
        ValueError: names the first such name and the nearest option, or all options if none is near.
    """
    for name in names:
        if name.startswith(PREFIX) and name not in OPTIONS:
            endings = [option.removeprefix(PREFIX) for option in OPTIONS]
            near = difflib.get_close_matches(name.removeprefix(PREFIX), endings, n=1)
            allowed = f"did you mean `{PREFIX}{near[0]}`?" if near else f"allowed: {', '.join(OPTIONS)}."
            raise ValueError(f"`{name}` is given, which OGPSA does not have; {allowed}")


def _read_names(name: str, value: Any) -> list[str]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise ValueError(
            f"`{name}` is {value!r}; allowed: names of general-capability datasets in dataset_info.json, "
            "separated by commas."
        )
    names = [item.strip() for item in names]
    if not names or not all(names):
        raise ValueError(f"`{name}` is {value!r}, which has an empty name; allowed: dataset names, e.g. a,b.")
    for item in names:
        if names.count(item) > 1:
            raise ValueError(f"`{name}` is {value!r}; {item} is in it twice; allowed: each dataset once.")
    return names


def _read_count(name: str, value: Any) -> int:
    """Read a positive integer: 200, 200.0, "200" or "2e2"."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}(\.[0-9]{0,18})?([eE]\+?[0-9]{1,2})?", value):
        number = Fraction(value)
    if isinstance(number, float | Fraction) and number % 1 == 0:
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"`{name}` is {value!r}; allowed: a positive integer.")
    return number


def _read_switch(name: str, value: Any) -> bool:
    value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}; allowed: true, false.")
    return value


def _read_choice(name: str, value: Any) -> str:
    choices = OPTIONS[name].choices
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; allowed: {', '.join(choices)}.")
    return value


_READERS = {list: _read_names, int: _read_count, str: _read_choice, bool: _read_switch}


def resolve(arguments: Any) -> None:
    """Check the options of a run that asks for OGPSA and fill in their defaults, in place.

    Args:
        arguments: an object with all `OPTIONS` as attributes, None if not given, and the stock `stage`.

    Raises:
        ValueError: names the option, what was given and what is allowed.
    """
    for name, option in OPTIONS.items():
        value = getattr(arguments, name)
        if value is not None or option.type is list:
            setattr(arguments, name, _READERS[option.type](name, value))
        else:
            setattr(arguments, name, option.default_of(arguments.stage))

    if arguments.ogpsa_refresh_samples is not None and arguments.ogpsa_refresh_samples > arguments.ogpsa_num_samples:
        raise ValueError(
            f"`ogpsa_refresh_samples` is {arguments.ogpsa_refresh_samples}; allowed: at most `ogpsa_num_samples`, "
            f"which is {arguments.ogpsa_num_samples}."
        )
    if arguments.ogpsa_loss == "sft" and arguments.stage not in ("sft", "dpo", "kto"):
        raise ValueError(f"`ogpsa_loss` is 'sft', which stage {arguments.stage} does not use; allowed there: stage.")
    if arguments.ogpsa_scope == "inputs":
        _resolve_inputs(arguments)
    else:
        _check_rank(arguments)


def _resolve_inputs(arguments: Any) -> None:
    """Check `ogpsa_scope: inputs`, whose rank counts directions of a weight matrix's input, not gradients."""
    if arguments.ogpsa_rank is None:
        arguments.ogpsa_rank = DEFAULT_RANK
    if arguments.ogpsa_rank > MOST_DIRECTIONS:
        raise ValueError(
            f"`ogpsa_rank` is {arguments.ogpsa_rank}; allowed with `ogpsa_scope: inputs`: 1 to {MOST_DIRECTIONS}."
        )
    if arguments.ogpsa_method == "conflict":
        raise ValueError(
            "`ogpsa_method` is 'conflict', which needs the reference gradients, and `ogpsa_scope: inputs` has none; "
            "allowed with it: orthogonal, monitor."
        )
    if getattr(arguments, "use_dora", False):
        raise ValueError(
            "`use_dora` is True: B changes the weight's norm, and so the output for every input, which `ogpsa_scope: "
            "inputs` could not prevent; allowed with it: False."
        )
    if getattr(arguments, "finetuning_type", None) == "oft":
        raise ValueError(
            "`finetuning_type` is 'oft', which rotates the inputs that `ogpsa_scope: inputs` keeps; allowed with it: "
            "full, freeze, lora."
        )
    for name in ("ogpsa_basis_device", "ogpsa_basis_dtype"):
        if getattr(arguments, name) != "auto":
            raise ValueError(
                f"`{name}` is {getattr(arguments, name)!r}, but the basis of `ogpsa_scope: inputs` is small, and always "
                "in float32 where the gradients are; allowed with it: auto."
            )


def _check_rank(arguments: Any) -> None:
    """Check the rank of a subspace that reference gradients span."""
    sets = len(arguments.ogpsa_dataset)
    samples = arguments.ogpsa_refresh_samples or arguments.ogpsa_num_samples
    rank, most = arguments.ogpsa_rank or sets, min(MAX_RANK, samples * sets)
    if rank > most:
        raise ValueError(
            f"`ogpsa_rank` is {rank}; allowed: at most {most} (the samples of a refresh, and never more than "
            f"{MAX_RANK})."
        )
    if arguments.ogpsa_method == "conflict" and rank % sets != 0:
        raise ValueError(
            f"`ogpsa_rank` is {rank}, which does not hold the gradients of all {sets} sets, as "
            f"`ogpsa_method: conflict` needs; allowed with it: multiples of {sets}."
        )
