"""UltraFeedback (arXiv 2310.01377): general instructions with scored answers, raw or binarized."""

from typing import Any

from .errors import RecipeError
from .samples import Sample, clean, number
from .source import find_schema


RAW = ("instruction", "completions")
BINARIZED = ("prompt", "chosen", "rejected")


def make_raw(row: dict[str, Any]) -> Sample | str:
    """Return a sample of the completions with the highest and lowest `overall_score`, or why there is none."""
    scored = []
    for completion in entries_of(row, "completions", ("response", "overall_score")):
        score, answer = number(completion["overall_score"]), clean(completion["response"])
        if answer and score is not None:
            scored.append((score, answer))

    if len(scored) < 2:
        return "fewer than two answers with text and score"
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return "all answers have the same score"
    return Sample(clean(row["instruction"]), best[1], worst[1])


def make_binarized(row: dict[str, Any]) -> Sample | str:
    """Return a sample of the chosen and the rejected conversation of one turn each, or why there is none."""
    conversations = [entries_of(row, name, ("role", "content")) for name in ("chosen", "rejected")]
    if any(len(messages) > 2 for messages in conversations):
        return "more than one turn"
    answers = ([clean(m["content"]) for m in messages if m["role"] == "assistant"] for messages in conversations)
    return Sample(clean(row["prompt"]), *("".join(found[:1]) for found in answers))


def entries_of(row: dict[str, Any], column: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the entries of a column; raise a RecipeError unless they are records with these names."""
    entries = row[column] or []
    if not isinstance(entries, list):
        raise RecipeError(f"the column {column} has another schema: it holds no list.")
    for entry in entries:
        found = list(entry) if isinstance(entry, dict) else [type(entry).__name__]
        find_schema(found, f"the column {column}", names)
    return entries
