"""The `ogpsa_*` options: what users type, with their defaults and the checks that need nothing but them."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from ..kernels import MAX_RANK


PREFIX = "ogpsa_"
STAGES = ("pt", "sft", "rm", "dpo", "kto")
FINETUNING_TYPES = ("full", "lora", "freeze", "oft")


def _option(text: str) -> Any:
    """Return the field of an option, whose help tells the default that `resolve` fills in."""
    # Shows nothing, and keeps argparse from telling the field's own default, which is None, beside it.
    return field(default=None, metadata={"help": text + "%(default).0s"})


@dataclass
class OgpsaArguments:
    r"""Arguments pertaining to OGPSA (arXiv 2602.07892). All are None unless given: see `resolve`."""

    ogpsa_dataset: str | None = _option(
        "The name of the general-capability dataset(s) whose gradients OGPSA preserves, one capability each. "
        "Use commas to separate multiple datasets. Required by OGPSA."
    )
    ogpsa_num_samples: int | None = _option("The first N samples of each OGPSA dataset are used (default: 200).")
    ogpsa_refresh_samples: int | None = _option(
        "The number of samples per OGPSA dataset and refresh, taken in turn from the first `ogpsa_num_samples` "
        "(default: all of them every time)."
    )
    ogpsa_update_interval: int | None = _option(
        "The number of optimizer steps between two refreshes (default: 5 for DPO and KTO, else 30)."
    )
    ogpsa_rank: int | None = _option(
        "The most directions kept in the subspace (default: one per OGPSA dataset). "
        "More of them split the samples of each dataset."
    )
    ogpsa_scope: Literal["parameter", "global"] | None = _option(
        "Whether each parameter tensor has a subspace of its own or all trainable parameters share one "
        "(default: parameter)."
    )
    ogpsa_method: Literal["orthogonal", "conflict", "monitor"] | None = _option(
        "`orthogonal` removes the whole component in the subspace, `conflict` only what raises a reference loss, "
        "`monitor` measures it and changes nothing (default: orthogonal)."
    )
    ogpsa_loss: Literal["stage", "sft"] | None = _option(
        "The reference loss: that of the training stage, or the SFT loss, for datasets without rankings in the DPO "
        "and KTO stages (default: stage)."
    )
    ogpsa_batch_size: int | None = _option(
        "The batch size of the reference passes (default: `per_device_train_batch_size`)."
    )
    ogpsa_basis_device: Literal["auto", "accelerator", "cpu"] | None = _option(
        "Where the basis is kept; `auto` decides by the free memory (default: auto)."
    )
    ogpsa_basis_dtype: Literal["auto", "float32", "bfloat16"] | None = _option(
        "The precision of the basis; `auto` is that of the gradients (default: auto)."
    )
    ogpsa_kernel: Literal["auto", "triton", "torch"] | None = _option(
        "The implementation of the projection; `auto` is Triton where it runs (default: auto)."
    )
    ogpsa_save_state: bool | None = _option(
        "Whether checkpoints hold the basis, so that a resumed run ends as an uninterrupted one; otherwise it is "
        "computed anew where training resumes (default: true)."
    )


OPTIONS = {option.name: option for option in fields(OgpsaArguments)}
_CHOICES = {
    name: get_args(get_args(hint)[0])
    for name, hint in get_type_hints(OgpsaArguments).items()
    if get_args(get_args(hint)[0])
}
_COUNTS = [name for name, hint in get_type_hints(OgpsaArguments).items() if int in get_args(hint)]
_SWITCHES = [name for name, hint in get_type_hints(OgpsaArguments).items() if bool in get_args(hint)]


def split_names(value: Any) -> list[str]:
    """Split `ogpsa_dataset` into names.

    Raises:
        ValueError: missing, empty, not a string or list of strings, or a name that is there twice.
    """
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"`ogpsa_dataset` is {value!r}; allowed: names of general-capability datasets in dataset_info.json, "
            "separated by commas."
        )
    names = [name.strip() for name in names]
    if not names or not all(names):
        raise ValueError(f"`ogpsa_dataset` is {value!r}, which has an empty name; allowed: dataset names, e.g. a,b.")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`ogpsa_dataset` is {value!r}; {name} is in it twice; allowed: each dataset once.")
    return names


def resolve(arguments: Any) -> None:
    """Check the `ogpsa_*` options of a run that asks for OGPSA and fill in their defaults, in place.

    Args:
        arguments: LLaMA-Factory's finetuning arguments with the fields of `OgpsaArguments`; its stage already stock.

    Raises:
        ValueError: names the option, what was given and what is allowed.
    """
    for name in _COUNTS:
        value = getattr(arguments, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` is {value!r}; allowed: a positive integer.")

    for name, choices in _CHOICES.items():
        value = getattr(arguments, name)
        if value is not None and value not in choices:
            raise ValueError(f"`{name}` is {value!r}; allowed: {', '.join(choices)}.")

    for name in _SWITCHES:
        value = getattr(arguments, name)
        if value in ("true", "false"):
            value = value == "true"
            setattr(arguments, name, value)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"`{name}` is {value!r}; allowed: true, false.")

    names = split_names(arguments.ogpsa_dataset)
    arguments.ogpsa_dataset = names
    defaults = {
        "ogpsa_num_samples": 200,
        "ogpsa_update_interval": 5 if arguments.stage in ("dpo", "kto") else 30,
        "ogpsa_scope": "parameter",
        "ogpsa_method": "orthogonal",
        "ogpsa_loss": "stage",
        "ogpsa_basis_device": "auto",
        "ogpsa_basis_dtype": "auto",
        "ogpsa_kernel": "auto",
        "ogpsa_save_state": True,
    }
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)

    if arguments.ogpsa_refresh_samples is not None and arguments.ogpsa_refresh_samples > arguments.ogpsa_num_samples:
        raise ValueError(
            f"`ogpsa_refresh_samples` is {arguments.ogpsa_refresh_samples}; allowed: at most `ogpsa_num_samples`, "
            f"which is {arguments.ogpsa_num_samples}."
        )
    samples = arguments.ogpsa_refresh_samples or arguments.ogpsa_num_samples
    most = min(MAX_RANK, samples * len(names))
    if (arguments.ogpsa_rank or len(names)) > most:
        raise ValueError(
            f"`ogpsa_rank` is {arguments.ogpsa_rank or len(names)}; allowed: at most {most} "
            f"(the samples of a refresh, and never more than {MAX_RANK})."
        )
    if arguments.ogpsa_method == "conflict" and (arguments.ogpsa_rank or len(names)) % len(names) != 0:
        raise ValueError(
            f"`ogpsa_rank` is {arguments.ogpsa_rank}, which does not hold the gradients of all {len(names)} sets, as "
            f"`ogpsa_method: conflict` needs; allowed with it: multiples of {len(names)}."
        )
    if arguments.ogpsa_loss == "sft" and arguments.stage not in ("sft", "dpo", "kto"):
        raise ValueError(f"`ogpsa_loss` is 'sft', which stage {arguments.stage} has no use for; allowed there: stage.")


def refuse_backends(arguments: Any) -> None:
    """Refuse by name what OGPSA cannot work with, as far as the finetuning arguments tell.

    Raises:
        ValueError: names the option, its value, and what is allowed.
    """
    if arguments.stage == "ppo":
        raise ValueError(f"`stage` is 'ppo', which OGPSA does not support; allowed: {', '.join(STAGES)}.")

    for name, reason in {
        "use_badam": "BAdam trains one block of the parameters at a time",
        "galore_layerwise": "layer-wise GaLore steps inside the backward pass",
        "apollo_layerwise": "layer-wise APOLLO steps inside the backward pass",
        "use_hyper_parallel": "the HyperParallel backend has a trainer of its own",
    }.items():
        if getattr(arguments, name, False):
            raise ValueError(f"`{name}` is True, which OGPSA does not support ({reason}); allowed: False.")


def split_prefix(value: Any) -> tuple[Any, bool]:
    """Split `ogpsa_sft` into (`sft`, True); any other value comes back as it is, with False."""
    if isinstance(value, str) and value.startswith(PREFIX):
        return value[len(PREFIX) :], True
    return value, False


def extend(stock: type) -> type:
    """Extend LLaMA-Factory's FinetuningArguments by the `ogpsa_*` options, stages and finetuning types.

    Args:
        stock: its dataclass.

    Returns:
        a subclass of the same name. An instance has stock values in `stage` and `finetuning_type`, whatever was
        given, and tells by `ogpsa_enabled` whether the run asks for OGPSA.

    Raises:
        TypeError: the class does not have the fields that are extended.
    """
    hints = get_type_hints(stock)
    stages, types = get_args(hints.get("stage")), get_args(hints.get("finetuning_type"))
    if not set(STAGES) <= set(stages) or not types:
        raise TypeError(f"{stock.__name__} has stages {stages} and finetuning types {types}")

    supported_types = tuple(kind for kind in types if kind in FINETUNING_TYPES)
    stock_fields = {item.name: item for item in fields(stock)}

    @dataclass
    class FinetuningArguments(OgpsaArguments, stock):
        stage: Literal[stages + tuple(PREFIX + stage for stage in STAGES)] = field(
            default=stock_fields["stage"].default, metadata=stock_fields["stage"].metadata
        )
        finetuning_type: Literal[types + tuple(PREFIX + kind for kind in supported_types)] = field(
            default=stock_fields["finetuning_type"].default, metadata=stock_fields["finetuning_type"].metadata
        )

        def __post_init__(self):
            given_stage, given_type = self.stage, self.finetuning_type
            self.stage, by_stage = split_prefix(self.stage)
            self.finetuning_type, by_type = split_prefix(self.finetuning_type)
            self.ogpsa_enabled = by_stage or by_type
            if by_stage and self.stage not in STAGES:
                allowed = ", ".join(PREFIX + stage for stage in STAGES)
                raise ValueError(f"`stage` is {given_stage!r}; allowed: {allowed}.")
            if by_type and self.finetuning_type not in supported_types:
                allowed = ", ".join(PREFIX + kind for kind in supported_types)
                raise ValueError(f"`finetuning_type` is {given_type!r}; allowed: {allowed}.")

            if self.ogpsa_enabled:
                refuse_backends(self)
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
            # What a tracker is told of a stock run is what it was told without the plugin.
            arguments = super().to_dict()
            return arguments if self.ogpsa_enabled else {k: v for k, v in arguments.items() if k not in OPTIONS}

    # Under the name by which pickle looks it up.
    globals()[stock.__name__] = FinetuningArguments
    FinetuningArguments.__qualname__ = stock.__name__
    FinetuningArguments.__doc__ = stock.__doc__
    return FinetuningArguments
