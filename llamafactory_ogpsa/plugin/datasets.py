"""Reference sets through LLaMA-Factory's own dataset machinery: dataset_info.json, template, tokenizer, processors."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..noise import preserve_random_state


class LoadedSet(NamedTuple):
    """A reference set that has been read.

    Attributes:
        name: its name in dataset_info.json.
        samples: the tokenised samples.
        loss: `stage` or `sft`: the loss that it is for.
    """

    name: str
    samples: Any
    loss: str


# What `get_dataset` calls the data of each training stage.
_DATA_STAGES = {"pt": "pt", "sft": "sft", "rm": "rm", "dpo": "rm", "kto": "kto"}

# How LLaMA-Factory and the datasets library say that there was nothing to go on with.
_EMPTY = (
    "StopIteration",
    "Cannot find valid samples",
    "Cannot find sufficient samples",
    "corresponds to no data",
    "at least one example when writing",
)


def reference_data_args(data_args: Any, name: str, num_samples: int) -> Any:
    """Return the run's data arguments, changed to load the first `num_samples` records of one reference set.

    A copy, not a new instance: LLaMA-Factory's `__post_init__` is not idempotent (packing shortens cutoff_len).
    """
    arguments = copy.copy(data_args)
    arguments.dataset, arguments.eval_dataset, arguments.val_size = [name], None, 0.0
    arguments.max_samples, arguments.streaming, arguments.tokenized_path = num_samples, False, None
    arguments.mix_strategy, arguments.interleave_probs = "concat", None
    return arguments


def count_tokens(sample: dict[str, Any], pad_token_id: int | None = None) -> int:
    """Return how many tokens of a tokenised sample the loss sees: labels are shifted by one, and may be all masked.

    Args:
        sample: the sample; of a pair the chosen answer counts, of text without labels what is not padding.
        pad_token_id: the padding's id.
    """
    for key in ("labels", "chosen_labels"):
        if key in sample:
            return sum(label != -100 for label in sample[key][1:])
    return sum(token != pad_token_id for token in sample["input_ids"][1:])


def found_no_record(err: BaseException | None) -> bool:
    """Tell whether loading a set failed because it has no record, or none that was converted."""
    if err is None:
        return False
    return any(words in f"{type(err).__name__}: {err}" for words in _EMPTY) or found_no_record(err.__cause__)


def load_reference_sets(
    get_dataset: Callable[..., dict[str, Any]],
    finetuning_args: Any,
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    tokenizer: Any,
    processor: Any = None,
) -> list[LoadedSet]:
    """Read and tokenise the reference sets of a run, once; the random state stays as it was.

    Args:
        get_dataset: LLaMA-Factory's function.
        finetuning_args: the run's, with `ogpsa_dataset`, `ogpsa_num_samples` and `ogpsa_loss`.
        template: as the workflow hands it to `get_dataset`, and so the following.
        model_args: likewise.
        data_args: likewise; copied and changed, see `reference_data_args`.
        training_args: likewise.
        stage: likewise; the reference loss decides how its own data are processed.
        tokenizer: likewise.
        processor: likewise.

    Returns:
        one set a dataset name.

    Raises:
        ValueError: a set has no usable sample after tokenising.
    """
    loss = "sft" if finetuning_args.ogpsa_loss == "sft" and finetuning_args.stage != "sft" else "stage"
    data_stage = "sft" if loss == "sft" else _DATA_STAGES[finetuning_args.stage]
    sets = []
    for name in finetuning_args.ogpsa_dataset:
        arguments = reference_data_args(data_args, name, finetuning_args.ogpsa_num_samples)
        no_sample = ValueError(
            f"`ogpsa_dataset` has {name!r}, none of whose first {finetuning_args.ogpsa_num_samples} records gives a "
            f"token to learn at cutoff_len {data_args.cutoff_len}; allowed: a set with at least one usable record. "
            "Likely causes: the file has no records; they have no answers where `columns` and `tags` in "
            "dataset_info.json look for them; or `cutoff_len` is too small, so that nothing is left of the answers."
        )
        with preserve_random_state(torch.device("cpu")):
            try:
                module = get_dataset(template, model_args, arguments, training_args, data_stage, tokenizer, processor)
            except Exception as err:
                if found_no_record(err):
                    raise no_sample from err
                raise ValueError(
                    f"`ogpsa_dataset` has {name!r}, which cannot be read ({type(err).__name__}: {err}); allowed: a "
                    "set that LLaMA-Factory can load as dataset_info.json describes it."
                ) from err

        samples = module.get("train_dataset")
        usable = [i for i, sample in enumerate(samples or []) if count_tokens(sample) > 0]
        if not usable:
            raise no_sample
        sets.append(LoadedSet(name, samples.select(usable), loss))

    needed = finetuning_args.ogpsa_rank or len(sets)
    for reference in sets:
        parts = -(-needed // len(sets))
        if len(reference.samples) < parts:
            raise ValueError(
                f"`ogpsa_rank` is {needed}, which splits {reference.name!r} into {parts} parts, but it has only "
                f"{len(reference.samples)} usable samples; allowed: at most {len(reference.samples) * len(sets)}."
            )
    return sets
