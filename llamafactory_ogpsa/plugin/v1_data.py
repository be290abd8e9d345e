"""Reference sets through the data pipeline of LLaMA-Factory's v1 trainer: DataEngine, renderer, collator.

Every refusal is a ValueError that names the option, its value and what is allowed.
"""

import os
from functools import partial
from typing import Any

import torch

from ..noise import preserve_random_state
from ..options import Settings
from ..reference import ReferenceSet
from .datasets import check_parts


# The first `ogpsa_num_samples` records of each set, in v1's format; named by its entry in a YAML, or its file.
Records = dict[str, list[dict[str, Any]]]


def read_sets(settings: Settings) -> Records:
    """Read the reference sets of a run; the random state stays as it was.

    A name in `ogpsa_dataset` is what `train_dataset` may be: a YAML, each entry of which is one set, a file or a
    dataset.

    Raises:
        ValueError: a set cannot be read, has no records, or its records are not messages.
    """
    from llamafactory.v1.core.data_engine import DataEngine

    sets: Records = {}
    paths: dict[str, str] = {}  # of the sets, by name
    for path in settings.dataset:
        with preserve_random_state(torch.device("cpu")):
            try:
                data = DataEngine(path)
                found = {} if data.streaming else read_entries(data, settings.num_samples)
            except Exception as err:
                raise ValueError(
                    f"`ogpsa_dataset` has {path!r}, which cannot be read ({type(err).__name__}: {err}); allowed: what "
                    "`train_dataset` may be in LLaMA-Factory's v1 trainer."
                ) from err
        if data.streaming:
            raise ValueError(f"`ogpsa_dataset` has {path!r}, which is streamed; allowed: sets that are not.")
        for entry, records in found.items():
            name = os.path.splitext(os.path.basename(path))[0] if entry == "default" else entry
            if name in paths:
                both = " and ".join(dict.fromkeys((paths[name], path)))
                raise ValueError(f"`ogpsa_dataset` has a set {name!r} twice, in {both}; allowed: each name once.")
            check_records(name, records)
            paths[name] = path
            sets[name] = records
    return sets


def read_entries(data: Any, num_samples: int) -> Records:
    """Return the first records of every entry of a DataEngine, converted to v1's format."""
    found: Records = {name: [] for name in data.dataset_infos}
    for position, (name, *_) in enumerate(data.data_index):  # from 0.9.6 on, an entry also has the turn to cut at
        if len(found[name]) < num_samples:
            found[name].append(data[position])
    return found


def check_records(name: str, records: list[dict[str, Any]]) -> None:
    """Refuse a set without records, or whose records are not messages."""
    if not records:
        raise ValueError(f"`ogpsa_dataset` has {name!r}, which has no records; allowed: sets with at least one.")
    if not all("messages" in record for record in records):
        raise ValueError(
            f"`ogpsa_dataset` has {name!r}, whose records have {', '.join(sorted(records[0]))}; allowed: sets of "
            "messages. Most sets need a `converter` in the YAML."
        )


def make_reference_sets(trainer: Any, settings: Settings, sets: Records) -> list[ReferenceSet]:
    """Tokenise reference sets with a v1 trainer's renderer, and give each its collator and loss.

    Raises:
        ValueError: a set has no sample with a token to learn, or too few for `ogpsa_rank`.
    """
    cutoff_len = trainer.args.cutoff_len
    made = []
    for name, records in sets.items():
        samples = trainer.renderer.process_samples(records)
        samples = [sample for sample in samples if count_weight(sample, cutoff_len) > 0]
        if not samples:
            raise ValueError(
                f"`ogpsa_dataset` has {name!r}, none of whose first {settings.num_samples} records has a token "
                f"to learn at cutoff_len {cutoff_len}; allowed: a set with at least one."
            )
        made.append(ReferenceSet(name, samples, partial(collate, cutoff_len=cutoff_len), TokenLoss(trainer)))

    check_parts(settings.scope, settings.rank, made)
    return made


def count_weight(sample: dict[str, Any], cutoff_len: int) -> float:
    """Return the sum of the loss weights of a sample's tokens, which are 0 or 1 by default."""
    return float(sum(sample["loss_weights"][1:cutoff_len]))


def collate(samples: list[dict[str, Any]], cutoff_len: int) -> dict[str, Any]:
    """Make one batch by v1's collator: it pads to the longest sample, and cuts at `cutoff_len` tokens."""
    from llamafactory.v1.core.utils.batching import default_collate_fn
    from llamafactory.v1.utils.objects import StatefulBuffer

    buffer = StatefulBuffer()
    buffer.put(samples)
    shape = {"micro_batch_size": len(samples), "num_micro_batch": 1, "cutoff_len": cutoff_len}
    return default_collate_fn(buffer, shape)[0]


class TokenLoss:
    """v1's SFT loss: the mean over tokens, weighted by their loss weights."""

    def __init__(self, trainer: Any) -> None:
        """Bind the loss to a trainer."""
        self._trainer = trainer

    def weigh(self, samples: list[dict[str, Any]]) -> float:
        """Return the sum of the loss weights."""
        return sum(count_weight(sample, self._trainer.args.cutoff_len) for sample in samples)

    def __call__(self, batch: dict[str, Any], weight: float, total: float) -> torch.Tensor:
        """Return the batch's part of the mean over `total`."""
        return self._trainer.compute_loss(batch) * (weight / total)
