"""HaluEval QA (arXiv 2305.11747): questions on a given text, with the right answer and an invented one."""

from typing import Any

from .samples import Sample, clean


COLUMNS = ("knowledge", "question", "right_answer", "hallucinated_answer")


def make_sample(row: dict[str, Any]) -> Sample:
    """Return a sample of a question: its right answer above the hallucinated one, the text as `query`."""
    knowledge, question, right, hallucinated = (clean(row[name]) for name in COLUMNS)
    return Sample(question, right, hallucinated, query=knowledge)
