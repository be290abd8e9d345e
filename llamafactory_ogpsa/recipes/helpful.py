"""UltraFeedback (arXiv 2310.01377): general instructions with scored answers, raw or binarized."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from .errors import RecipeError
from .samples import Sample, clean, number, prompt_key


RAW = ("instruction", "completions")
BINARIZED = ("prompt", "chosen", "rejected")


def make_samples(rows: Iterable[dict[str, Any]], drops: Counter, binarized: bool) -> list[Sample]:
    """Make a sample of each instruction: its best answer, above its worst.

    Args:
        rows: records with the columns `RAW` or `BINARIZED`.
        drops: counts the records that make no sample, by reason.
        binarized: which of the two.

    Returns:
        one sample an instruction.

    Raises:
        RecipeError: a column does not hold what it should.
    """
    pair: Callable[[dict[str, Any]], tuple[str, str] | str] = binarized_pair if binarized else raw_pair
    samples: dict[str, Sample] = {}
    for row in rows:
        prompt = clean(row["prompt" if binarized else "instruction"])
        key = prompt_key(prompt)
        if not prompt:
            drops["empty prompt"] += 1
        elif key in samples:
            drops["same prompt as an earlier record"] += 1
        else:
            found = pair(row)
            if isinstance(found, str):
                drops[found] += 1
            else:
                samples[key] = Sample(prompt, *found)
    return list(samples.values())


def raw_pair(row: dict[str, Any]) -> tuple[str, str] | str:
    """Return the completions with the highest and the lowest `overall_score`, or why there are none."""
    completions = row["completions"] or []
    if not isinstance(completions, list):
        raise RecipeError("the column completions has another schema: it holds no list of answers.")

    scored = []
    for completion in completions:
        found = list(completion) if isinstance(completion, dict) else [type(completion).__name__]
        missing = [name for name in ("response", "overall_score") if name not in found]
        if missing:
            raise RecipeError(
                f"the column completions has another schema: [{', '.join(missing)}] are missing; found: "
                f"[{', '.join(found)}]."
            )
        score, answer = number(completion["overall_score"]), clean(completion["response"])
        if answer and score is not None:
            scored.append((score, answer))

    if len(scored) < 2:
        return "fewer than two answers with text and score"
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return "all answers have the same score"
    return (best[1], worst[1]) if best[1] != worst[1] else "best and worst answer are the same"


def binarized_pair(row: dict[str, Any]) -> tuple[str, str] | str:
    """Return the chosen and the rejected answer, or why there are none."""
    conversations = [row["chosen"], row["rejected"]]
    for name, conversation in zip(("chosen", "rejected"), conversations, strict=True):
        if not isinstance(conversation, list) or not all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in conversation
        ):
            raise RecipeError(f"the column {name} has another schema: it holds no list of role and content.")

    if any(len(conversation) > 2 for conversation in conversations):
        return "more than one turn"
    chosen, rejected = (
        next((clean(message["content"]) for message in conversation if message["role"] == "assistant"), "")
        for conversation in conversations
    )
    if not chosen or not rejected:
        return "empty answer"
    return (chosen, rejected) if chosen != rejected else "chosen and rejected answer are the same"
