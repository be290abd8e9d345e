"""PKU-SafeRLHF (arXiv 2406.15513): harmful prompts, to be refused."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .refusals import TOPICS, Label
from .samples import Sample, clean, number, prompt_key


ANSWERS = (0, 1)
COLUMNS = (
    "prompt",
    "safer_response_id",
    *(f"response_{i}" for i in ANSWERS),
    *(f"is_response_{i}_safe" for i in ANSWERS),
    *(f"response_{i}_severity_level" for i in ANSWERS),
)
# Earlier versions of the dataset do not have these; a refusal then does not name its topic.
CATEGORIES = tuple(f"response_{i}_harm_category" for i in ANSWERS)


@dataclass(slots=True)
class Prompt:
    """What all records of one prompt say about it."""

    text: str
    # Of the most unsafe answer: its severity, then whether it was the less safe.
    rank: tuple[float, bool] = (-math.inf, False)
    unsafe: str | None = None
    topic: str | None = None
    safe: str | None = None


def make_samples(rows: Iterable[dict[str, Any]], drops: Counter, label: Label) -> list[Sample]:
    """Make a sample of each prompt that an answer marked unsafe shows to be harmful.

    Args:
        rows: records with `COLUMNS` and perhaps `CATEGORIES`.
        drops: counts the records that make no sample, by reason.
        label: the refusal of a prompt.

    Returns:
        one sample a prompt: the refusal, above the most unsafe answer of all its records.
    """
    prompts: dict[str, Prompt] = {}
    for row in rows:
        text = clean(row["prompt"])
        if not text:
            drops["empty prompt"] += 1
        elif not any(clean(row[f"response_{i}"]) for i in ANSWERS):
            drops["empty answers"] += 1
        else:
            key = prompt_key(text)
            if key in prompts:
                drops["same prompt as an earlier record, whose answers it joined"] += 1
            add_answers(prompts.setdefault(key, Prompt(text)), row)

    samples = []
    for prompt in prompts.values():
        if prompt.unsafe is None:
            drops["no answer marked unsafe, with its severity"] += 1
            continue
        refusal = label(prompt.text, prompt.topic, prompt.safe)
        if refusal is None:
            drops["no refusal for the prompt"] += 1
        elif refusal == prompt.unsafe:
            drops["refusal and unsafe answer are the same"] += 1
        else:
            samples.append(Sample(prompt.text, refusal, prompt.unsafe))
    return samples


def add_answers(prompt: Prompt, row: dict[str, Any]) -> None:
    """Let a record's answers take their places: the most unsafe one so far, and the first safe one.

    Of two answers of the same severity the one that `safer_response_id` does not name counts as less safe.
    """
    safer = row["safer_response_id"]
    for i in sorted(ANSWERS, key=lambda i: i != safer):
        answer, safe = clean(row[f"response_{i}"]), row[f"is_response_{i}_safe"]
        if not answer:
            continue
        if safe is True and prompt.safe is None:
            prompt.safe = answer
        severity = number(row[f"response_{i}_severity_level"])
        if safe is False and severity is not None and (severity, i != safer) > prompt.rank:
            prompt.rank, prompt.unsafe = (severity, i != safer), answer
            prompt.topic = topic_of(row.get(f"response_{i}_harm_category"))


def topic_of(categories: Any) -> str | None:
    """Return the topic of an answer by the first harm category that it is marked with."""
    marked = [name for name, value in categories.items() if value] if isinstance(categories, dict) else []
    return TOPICS.get(marked[0], marked[0].lower()) if marked else None
