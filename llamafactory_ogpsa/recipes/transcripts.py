"""Anthropic's hh-rlhf (arXiv 2204.05862): two conversations that differ in their last answer, one preferred."""

import re
from typing import Any

from .samples import Sample, clean


COLUMNS = ("chosen", "rejected")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKER = re.compile(r"\b(Human|Assistant):")


def make_sample(row: dict[str, Any]) -> Sample | str:
    """Return a sample of the last request, its two answers, and the turns before as history; or why there is none."""
    chosen, rejected = (split_turns(row[name]) for name in COLUMNS)
    if not chosen or not rejected:
        return "turns of Human and Assistant do not alternate"
    if chosen[:-1] != rejected[:-1]:
        return "chosen and rejected do not answer the same request"
    # In some published answers the model has written further turns of both speakers.
    if any(_SPEAKER.search(turn) for turn in (*chosen, rejected[-1])):
        return "a turn holds another turn"
    *history, prompt, answer = chosen
    if not all(history):
        return "an earlier turn is empty"
    return Sample(prompt, answer, rejected[-1], history=tuple(zip(history[::2], history[1::2], strict=True)))


def split_turns(transcript: Any) -> list[str]:
    """Return the turns of a transcript, a request first and an answer last; empty if they do not alternate."""
    start, *parts = _TURN.split(f"\n\n{clean(transcript)}")
    speakers, turns = parts[::2], [clean(turn) for turn in parts[1::2]]
    return turns if not clean(start) and speakers == ["Human", "Assistant"] * (len(turns) // 2) else []
