"""Reference sets through LLaMA-Factory's own dataset machinery: dataset_info.json, template, tokenizer, processors."""

import copy
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import Any, NamedTuple, TextIO

import torch

from ..noise import preserve_random_state
from .reference_info import choose_loss, known_datasets


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


logger = logging.getLogger("llamafactory.ogpsa")

# A set that dataset_info.json is not at hand to describe is taken to be of the stage's kind.
_UNKNOWN = {"ranking": True, "columns": {"kto_tag": "kto_tag"}}

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


def reference_data_args(data_args: Any, name: str, num_samples: int, packing: bool) -> Any:
    """Return the run's data arguments, changed to load the first `num_samples` records of one reference set.

    A copy, not a new instance: LLaMA-Factory's `__post_init__` is not idempotent (packing shortens cutoff_len).
    """
    arguments = copy.copy(data_args)
    arguments.dataset, arguments.eval_dataset, arguments.val_size = [name], None, 0.0
    arguments.max_samples, arguments.streaming, arguments.tokenized_path = num_samples, False, None
    arguments.mix_strategy, arguments.interleave_probs = "concat", None
    arguments.packing, arguments.neat_packing = packing, packing and data_args.neat_packing
    return arguments


def has_media_tokens(template: Any) -> bool:
    """Return whether a template is that of a multimodal model, whose collator adds an image or sound to a text batch."""
    plugin = template.mm_plugin
    return plugin.image_token is not None or plugin.audio_token is not None


def packs_reference_sets(stage: str, data_args: Any, model_args: Any, template: Any) -> bool:
    """Decide whether reference samples are packed, as those that the run trains on are.

    LLaMA-Factory packs in the stages pt and sft alone, whatever is given in the others. Neat packing keeps the samples
    of a sequence apart, so that a loss is the same without it; and with it, LLaMA-Factory cannot collate a batch without
    images for a multimodal model. There reference samples are packed for FlashAttention 2 only, where unpacked batches
    cannot be collated.
    """
    if stage not in ("pt", "sft") or not data_args.packing:
        return False
    return not (data_args.neat_packing and has_media_tokens(template)) or model_args.flash_attn == "fa2"


def without_media(samples: Iterable[dict[str, Any]]) -> int:
    """Return the number of samples that have neither an image, a video nor a sound."""
    return sum(not any(sample.get(key) for key in ("images", "videos", "audios")) for sample in samples)


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
    """Return whether loading a set failed because it has no record, or none that was converted."""
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
        ValueError: a set has no usable sample after tokenising, or cannot be collated.
    """
    info = known_datasets(data_args.dataset_dir) or {}
    num_samples = finetuning_args.ogpsa_num_samples
    packing = packs_reference_sets(finetuning_args.stage, data_args, model_args, template)
    sets = []
    for name in finetuning_args.ogpsa_dataset:
        loss = choose_loss(finetuning_args.stage, finetuning_args.ogpsa_loss, info.get(name, _UNKNOWN))
        data_stage = "sft" if loss == "sft" else _DATA_STAGES[finetuning_args.stage]
        arguments = reference_data_args(data_args, name, num_samples, packing)
        no_sample = no_usable_sample(name, num_samples, arguments, data_stage)
        with preserve_random_state(torch.device("cpu")), redirect_stdout(ReferenceHeading(sys.stdout, name)):
            try:
                if data_stage == "pt" and training_args.should_log:
                    warn_of_unseen_answers(name, model_args, arguments, training_args)
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
        samples = samples.select(usable)
        if arguments.neat_packing and has_media_tokens(template) and without_media(samples):
            raise ValueError(
                f"`neat_packing` is True with FlashAttention 2, and {name!r} of `ogpsa_dataset` gives packed sequences "
                "without images, which LLaMA-Factory cannot collate for a multimodal model; allowed: "
                "`neat_packing: false`, another `flash_attn`, or a set whose records all have images."
            )
        sets.append(LoadedSet(name, samples, loss))

    # In scope `inputs` the rank counts directions of a matrix's input: samples are not split for it.
    rank = None if finetuning_args.ogpsa_scope == "inputs" else finetuning_args.ogpsa_rank
    needed = rank or len(sets)
    for reference in sets:
        parts = -(-needed // len(sets))
        if len(reference.samples) < parts:
            raise ValueError(
                f"`ogpsa_rank` is {needed}, which splits {reference.name!r} into {parts} parts, but it has only "
                f"{len(reference.samples)} usable samples; allowed: at most {len(reference.samples) * len(sets)}."
            )
    return sets


def no_usable_sample(name: str, num_samples: int, arguments: Any, data_stage: str) -> ValueError:
    """Return the error of a reference set that gives no sample, with the likely causes.

    Args:
        name: the set's name.
        num_samples: how many of its records are read.
        arguments: the data arguments that it is read with.
        data_stage: how LLaMA-Factory processes it: `pt`, `sft`, `rm` or `kto`.
    """
    if data_stage == "pt" and arguments.packing:
        return ValueError(
            f"`ogpsa_dataset` has {name!r}, whose first {num_samples} records do not fill one packed block of "
            f"cutoff_len {arguments.cutoff_len} tokens; allowed: a larger `ogpsa_num_samples` where the file has more "
            "records, a smaller `cutoff_len`, or `packing: false`. Stage pt reads of each record the first message of "
            "the prompt alone."
        )
    columns = (
        "they have no text where `columns.prompt` in dataset_info.json looks for it, and stage pt reads nothing else"
        if data_stage == "pt"
        else "they have no answers where `columns` and `tags` in dataset_info.json look for them"
    )
    return ValueError(
        f"`ogpsa_dataset` has {name!r}, none of whose first {num_samples} records gives a token to learn at cutoff_len "
        f"{arguments.cutoff_len}; allowed: a set with at least one usable record. Likely causes: the file has no "
        f"records; {columns}; or `cutoff_len` is too small, so that nothing is left of the answers."
    )


def warn_of_unseen_answers(name: str, model_args: Any, arguments: Any, training_args: Any) -> None:
    """Warn where records of a set have more than stage pt learns: the first message of their prompt.

    Args:
        name: the set's name.
        model_args: the run's, for the folder of cached datasets.
        arguments: the data arguments that the set is read with.
        training_args: the run's.
    """
    from llamafactory.data import loader

    read_records = getattr(loader, "_get_merged_dataset", None)
    if read_records is None:  # in a LLaMA-Factory that is not known
        return

    records = read_records([name], model_args, arguments, training_args, "pt")
    unseen = sum(has_unseen_text(record) for record in records)
    if unseen:
        logger.warning(
            f"{unseen} of the first {len(records)} records of {name!r} in `ogpsa_dataset` have answers or further "
            "messages, which stage pt does not see: it learns the first message of the prompt alone (of plain records "
            "the columns `prompt` and `query`). For sets of instructions and answers use stage ogpsa_sft, or put the "
            "whole text into one column and name it as `prompt` in `columns` of dataset_info.json."
        )


def has_unseen_text(record: dict[str, Any]) -> bool:
    """Return whether a record in LLaMA-Factory's own format has text that stage pt does not learn."""
    return len(record["_prompt"]) > 1 or any(message["content"] for message in record["_response"] or [])


class ReferenceHeading:
    """Standard output while a reference set is read: the example that LLaMA-Factory prints gets a heading of its own."""

    def __init__(self, stream: TextIO, name: str) -> None:
        """Write to `stream` in the place of stock's heading that the example is of the reference set `name`."""
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        """Write a text, the heading replaced."""
        return self._stream.write(f"reference example of {self._name}:" if text == "training example:" else text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
