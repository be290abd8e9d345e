"""Reference sets through LLaMA-Factory's own dataset machinery: dataset_info.json, template, tokenizer, processors."""

import copy
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple, TextIO

import torch

from ..noise import preserve_random_state
from ..reference import ReferenceSet
from .reference_info import choose_loss, known_datasets


class LoadedSet(NamedTuple):
    """A tokenised reference set, named as in dataset_info.json; `loss` is the one that it is for, `stage` or `sft`."""

    name: str
    samples: Any
    loss: str


logger = logging.getLogger("llamafactory.ogpsa")

# Without a local dataset_info.json, a set counts as one of the stage's kind.
_UNKNOWN = {"ranking": True, "columns": {"kto_tag": "kto_tag"}}

# Parts of the messages of LLaMA-Factory and the datasets library for a set without a record.
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
    """Return whether the template's collator adds an image or sound to a text batch, as for a multimodal model."""
    plugin = template.mm_plugin
    return plugin.image_token is not None or plugin.audio_token is not None


def packs_reference_sets(stage: str, data_args: Any, model_args: Any, template: Any, scope: str) -> bool:
    """Decide whether reference samples are packed, as the training samples are.

    LLaMA-Factory packs in the stages pt and sft only. Neat packing keeps the samples of a sequence apart, so that a loss
    is the same without it, and LLaMA-Factory cannot collate it without images for a multimodal model. Scope `inputs`
    keeps some tokens of each sample. So for neat packing of a multimodal model, and for all packing with scope `inputs`,
    reference samples are packed only if FlashAttention 2 comes with neat packing: it cannot collate unpacked batches.
    """
    if stage not in ("pt", "sft") or not data_args.packing:
        return False
    if scope == "inputs" or (data_args.neat_packing and has_media_tokens(template)):
        return data_args.neat_packing and model_args.flash_attn == "fa2"
    return True


def has_media(sample: dict[str, Any]) -> bool:
    """Return whether a sample has an image, a video or a sound."""
    return any(sample.get(key) for key in ("images", "videos", "audios"))


def count_tokens(sample: dict[str, Any], pad_token_id: int | None = None) -> int:
    """Return how many tokens of a tokenised sample the loss counts: labels are shifted by one, and may be all masked.

    For a pair the chosen answer counts; for text without labels, all that is not padding.
    """
    for key in ("labels", "chosen_labels"):
        if key in sample:
            return sum(label != -100 for label in sample[key][1:])
    return sum(token != pad_token_id for token in sample["input_ids"][1:])


def found_no_record(err: BaseException | None) -> bool:
    """Return whether loading a set failed because it has no record, or because no record was converted."""
    if err is None:
        return False
    return any(words in f"{type(err).__name__}: {err}" for words in _EMPTY) or found_no_record(err.__cause__)


def load_reference_sets(
    get_dataset: Callable[..., dict[str, Any]], finetuning_args: Any, call: dict[str, Any]
) -> list[LoadedSet]:
    """Read and tokenise the reference sets of a run, once; the random state stays as it was.

    Args:
        get_dataset: LLaMA-Factory's.
        finetuning_args: those of the run.
        call: the arguments, by name, with which the workflow calls `get_dataset` for the training set.

    Returns:
        one set for each name in `ogpsa_dataset`.

    Raises:
        ValueError: a set cannot be read or collated, or has no usable samples, or too few for `ogpsa_rank`.
    """
    template, model_args, data_args = call["template"], call["model_args"], call["data_args"]
    training_args = call["training_args"]
    info = known_datasets(data_args.dataset_dir) or {}
    num_samples = finetuning_args.ogpsa_num_samples
    packing = packs_reference_sets(finetuning_args.stage, data_args, model_args, template, finetuning_args.ogpsa_scope)
    sets = []
    for name in finetuning_args.ogpsa_dataset:
        loss = choose_loss(finetuning_args.stage, finetuning_args.ogpsa_loss, info.get(name, _UNKNOWN))
        data_stage = "sft" if loss == "sft" else call["stage"]
        arguments = reference_data_args(data_args, name, num_samples, packing)
        no_sample = no_usable_sample(name, num_samples, arguments, data_stage)
        with preserve_random_state(torch.device("cpu")), redirect_stdout(ReferenceHeading(sys.stdout, name)):
            try:
                if data_stage == "pt" and training_args.should_log:
                    warn_of_unseen_answers(name, model_args, arguments, training_args)
                module = get_dataset(**{**call, "data_args": arguments, "stage": data_stage})
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
        if arguments.neat_packing and has_media_tokens(template) and not all(map(has_media, samples)):
            raise ValueError(
                f"`neat_packing` is True with FlashAttention 2, and {name!r} of `ogpsa_dataset` gives packed sequences "
                "without images, which LLaMA-Factory cannot collate for a multimodal model; allowed: "
                "`neat_packing: false`, another `flash_attn`, or a set whose records all have images."
            )
        sets.append(LoadedSet(name, samples, loss))

    check_parts(finetuning_args.ogpsa_scope, finetuning_args.ogpsa_rank, sets)
    return sets


def check_parts(scope: str, rank: int | None, sets: Sequence[LoadedSet | ReferenceSet]) -> None:
    """Check that every reference set has a sample for each part that `ogpsa_rank` splits it into.

    With scope `inputs` the rank counts directions of a matrix's input, and samples are not split.

    Raises:
        ValueError: a set has too few.
    """
    if rank is None or scope == "inputs":
        return

    parts = -(-rank // len(sets))
    for item in sets:
        size = len(item.samples)
        if size < parts:
            raise ValueError(
                f"`ogpsa_rank` is {rank}, which splits {item.name!r} into {parts} parts, but it has only {size} "
                f"usable samples; allowed: at most {size * len(sets)}."
            )


def no_usable_sample(name: str, num_samples: int, arguments: Any, data_stage: str) -> ValueError:
    """Return the error for a reference set without a usable sample, with the likely causes."""
    if data_stage == "pt" and arguments.packing:
        return ValueError(
            f"`ogpsa_dataset` has {name!r}, whose first {num_samples} records do not fill one packed block of "
            f"cutoff_len {arguments.cutoff_len} tokens; allowed: a larger `ogpsa_num_samples` where the file has more "
            "records, a smaller `cutoff_len`, or `packing: false`. Stage pt reads only the first message of each "
            "record's prompt."
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
    """Warn if records of a set have more than the first message of a prompt, which is all that stage pt learns."""
    from llamafactory.data import loader

    read_records = getattr(loader, "_get_merged_dataset", None)
    if read_records is None:  # an unknown version of LLaMA-Factory
        return

    records = read_records([name], model_args, arguments, training_args, "pt")
    unseen = sum(has_unseen_text(record) for record in records)
    if unseen:
        logger.warning(
            f"{unseen} of the first {len(records)} records of {name!r} in `ogpsa_dataset` have answers or further "
            "messages, which stage pt does not see: it learns only the first message of the prompt (of plain records "
            "the columns `prompt` and `query`). For sets of instructions and answers use stage ogpsa_sft, or put the "
            "whole text into one column and name it as `prompt` in `columns` of dataset_info.json."
        )


def has_unseen_text(record: dict[str, Any]) -> bool:
    """Return whether a record in LLaMA-Factory's own format has text that stage pt does not learn."""
    return len(record["_prompt"]) > 1 or any(message["content"] for message in record["_response"] or [])


class ReferenceHeading:
    """Standard output while a reference set is read: the heading of LLaMA-Factory's example names the set."""

    def __init__(self, stream: TextIO, name: str) -> None:
        """Write to `stream`, with `name` in the heading."""
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        """Write a text; the heading is replaced."""
        return self._stream.write(f"reference example of {self._name}:" if text == "training example:" else text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
