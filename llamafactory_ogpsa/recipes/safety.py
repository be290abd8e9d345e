"""Harmful prompts, to be refused: PKU-SafeRLHF (arXiv 2406.15513), or Safety-Tuned LLaMAs (arXiv 2309.07875)."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .refusals import Label
from .samples import Sample, clean, number, prompt_key


ANSWERS = (0, 1)
# The columns response_i_harm_category, which earlier versions do not have, give the topic that a refusal names.
PKU = (
    "prompt",
    "safer_response_id",
    *(f"response_{i}" for i in ANSWERS),
    *(f"is_response_{i}_safe" for i in ANSWERS),
    *(f"response_{i}_severity_level" for i in ANSWERS),
)
INSTRUCTIONS = ("instruction", "input", "output")


def make_pku_samples(rows: Iterable[dict[str, Any]], drops: Counter) -> list[Sample]:
    """Make a sample for each prompt that has an answer marked unsafe.

    Args:
        rows: records with the columns `PKU`.
        drops: counts the records that give no sample, by reason.

    Returns:
        one sample per prompt: its first safe answer or None, above the most unsafe answer of all its records. If two
        answers have the same severity, the one that `safer_response_id` does not name counts as less safe.
    """
    prompts: dict[str, tuple[tuple[float, bool], Sample]] = {}
    for row in rows:
        text, safer = clean(row["prompt"]), row["safer_response_id"]
        answers = {i: clean(row[f"response_{i}"]) for i in sorted(ANSWERS, key=lambda i: i != safer)}
        key = prompt_key(text)
        if not text or not any(answers.values()):
            drops["empty answers" if text else "empty prompt"] += 1
            continue
        if key in prompts:
            drops["same prompt as an earlier record, whose answers it joined"] += 1
        rank, sample = prompts.get(key, ((-math.inf, False), Sample(text, None)))
        for i, answer in answers.items():
            safe, severity = row[f"is_response_{i}_safe"], number(row[f"response_{i}_severity_level"])
            if answer and safe is True and sample.answer is None:
                sample = replace(sample, answer=answer)
            if answer and safe is False and severity is not None and (severity, i != safer) > rank:
                rank = (severity, i != safer)
                sample = replace(sample, rejected=answer, topic=topic_of(row.get(f"response_{i}_harm_category")))
        prompts[key] = rank, sample

    samples = [sample for _, sample in prompts.values() if sample.rejected]
    if len(samples) < len(prompts):
        drops["no answer marked unsafe, with its severity"] += len(prompts) - len(samples)
    return samples


def topic_of(categories: Any) -> str | None:
    """Return the topic of an answer, its first harm category."""
    marked = [name for name, value in categories.items() if value] if isinstance(categories, dict) else []
    return marked[0].lower() if marked else None


def make_instruction(row: dict[str, Any]) -> Sample:
    """Return a sample of an unsafe instruction and its safe answer, without a rejected one."""
    return Sample(clean(row["instruction"]), clean(row["output"]), query=clean(row["input"]))


def refuse(samples: Iterable[Sample], drops: Counter, label: Label) -> list[Sample]:
    """Replace the answers by refusals; `drops` counts samples without one, or whose rejected answer is the same."""
    refused = []
    for sample in samples:
        refusal = label(sample.prompt, sample.topic, sample.answer)
        if refusal is None:
            drops["no refusal for the prompt"] += 1
        elif refusal == sample.rejected:
            drops["refusal and unsafe answer are the same"] += 1
        else:
            refused.append(replace(sample, answer=refusal))
    return refused
