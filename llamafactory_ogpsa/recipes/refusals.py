"""The refusal of a harmful prompt: from our templates, from the user's file, or the dataset's own safe answer."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from .errors import RecipeError
from .samples import clean, prompt_key


# The values of --refusals that are not files.
TEMPLATES, DATASET = "templates", "dataset"
TEMPLATE_FILE = Path(__file__).with_name("refusals.txt")

# `Label(prompt, topic, own)` returns the refusal of a prompt, None if there is none; its topic and the dataset's own
# safe answer are None if they are not known.
Label = Callable[[str, str | None, str | None], str | None]

_TOPIC = "{topic}"
_ALLOWED = (
    f"allowed: {TEMPLATES}, {DATASET}, a UTF-8 file with one refusal a line, at least one of them without {_TOPIC}, "
    "or such a file with JSON lines of prompt and refusal, whose name ends in .jsonl"
)


def make_label(choice: str, seed: int) -> Label:
    """Make the function that refuses a prompt.

    Args:
        choice: `templates`, `dataset`, or the path of a file: refusals, one per line, in which `{topic}` is replaced;
            or a .jsonl file of records with `prompt` and `refusal`.
        seed: the seed of the choice among refusals, which depends only on it and on the prompt.

    Raises:
        RecipeError: the file cannot be used; says why.
    """
    if choice == DATASET:
        return lambda prompt, topic, own: own

    path = TEMPLATE_FILE if choice == TEMPLATES else Path(choice)
    by_prompt = {}
    try:
        refusals = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            records = map(json.loads, refusals)
            by_prompt = {prompt_key(record["prompt"]): clean(record["refusal"]) for record in records}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise RecipeError(f"--refusals {choice!r} cannot be used ({err!r}); {_ALLOWED}.") from err

    if by_prompt:
        return lambda prompt, topic, own: by_prompt.get(prompt_key(prompt)) or None

    general = [text for text in refusals if _TOPIC not in text]
    if not general:
        raise RecipeError(f"--refusals {choice!r} has no line for prompts whose topic is not known; {_ALLOWED}.")

    def label(prompt: str, topic: str | None, own: str | None) -> str:
        draw = random.Random(f"{seed} {prompt}")
        return draw.choice(refusals if topic else general).replace(_TOPIC, topic or "")

    return label
