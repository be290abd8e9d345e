"""Samples, and the split into training and held-out samples."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


# One held-out sample for ten training samples.
HELD_OUT = 10
# Why a sample is in neither split.
BEYOND = "more than --num-samples asks for"


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with the answer to learn; fields that a dataset does not have are None or empty."""

    prompt: str
    answer: str | None
    rejected: str | None = None  # what a ranking places below the answer
    query: str = ""  # a text that the prompt is about
    history: tuple[tuple[str, str], ...] = ()  # earlier turns: prompt and answer
    topic: str | None = None  # of a harmful prompt


def clean(text: Any) -> str:
    """Return a text without the white space around it; an empty one for anything else."""
    return text.strip() if isinstance(text, str) else ""


def number(value: Any) -> float | None:
    """Return a finite number, also from a text; None for anything else."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def prompt_key(prompt: str) -> str:
    """Return a prompt in one case and with single spaces; prompts with equal keys count as the same."""
    return " ".join(prompt.split()).casefold()


def collect(
    rows: Iterable[dict[str, Any]], drops: Counter, make: Callable[[dict[str, Any]], Sample | str]
) -> list[Sample]:
    """Make a sample from each record and keep the first one for each prompt; `drops` counts the others by reason.

    `make` returns the sample of a record, or the reason why there is none. Samples without a prompt or an answer, or
    whose rejected answer is empty or the same, are dropped too.
    """
    samples: dict[Any, Sample] = {}
    for row in rows:
        sample = make(row)
        if isinstance(sample, str):
            drops[sample] += 1
            continue
        key = (sample.history, prompt_key(sample.prompt), prompt_key(sample.query))
        if not sample.prompt:
            drops["empty prompt"] += 1
        elif not sample.answer or sample.rejected == "":
            drops["empty answer"] += 1
        elif sample.answer == sample.rejected:
            drops["good and bad answer are the same"] += 1
        elif key in samples:
            drops["same prompt as an earlier record"] += 1
        else:
            samples[key] = sample
    return list(samples.values())


def split(samples: list[Sample], num_samples: int, seed: int, drops: Counter) -> tuple[list[Sample], list[Sample]]:
    """Draw at most `num_samples` training samples, and one held-out sample for ten of them.

    They stay in the order drawn, because OGPSA uses the first of them. `drops` counts the samples that are in neither.
    """
    drawn = list(samples)
    random.Random(seed).shuffle(drawn)
    spare = max(1, len(drawn) // (HELD_OUT + 1)) if len(drawn) > 1 else 0
    train = min(num_samples, len(drawn) - spare)
    held_out = min(max(1, train // HELD_OUT), len(drawn) - train)
    if len(drawn) > train + held_out:
        drops[BEYOND] += len(drawn) - train - held_out
    return drawn[:train], drawn[train : train + held_out]
