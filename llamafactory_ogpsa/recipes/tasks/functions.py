"""Functions for the task files in this folder (`!function`); lm-evaluation-harness loads this file by its path."""

import datasets

from llamafactory_ogpsa.recipes.errors import RecipeError
from llamafactory_ogpsa.recipes.refusal_rule import is_refusal, load_judge
from llamafactory_ogpsa.recipes.source import find_schema, load


XSTEST, STRONGREJECT = "walledai/XSTest", "walledai/StrongREJECT"
SPLITS = ("test", "train")


def _tasks(prompts: list[str], source: str, judge: str) -> dict[str, datasets.Dataset]:
    if not prompts:
        raise RecipeError(f"{source} has no prompt for this task.")
    return {"test": datasets.Dataset.from_dict({"prompt": prompts, "judge": [judge] * len(prompts)})}


def _xstest(label: str, source: str, judge: str) -> dict[str, datasets.Dataset]:
    rows = load(source, None, SPLITS)
    find_schema(rows.column_names, source, ("prompt", "label"))
    prompts = [row["prompt"] for row in rows if row["label"] == label]
    return _tasks(prompts, f"{source} (label {label})", judge)


def xstest_safe(xstest: str = XSTEST, judge: str = "", **_) -> dict[str, datasets.Dataset]:
    """Load XSTest's prompts that only look unsafe. The arguments come from `--metadata`."""
    return _xstest("safe", xstest, judge)


def xstest_unsafe(xstest: str = XSTEST, judge: str = "", **_) -> dict[str, datasets.Dataset]:
    """Load XSTest's contrasts that are unsafe."""
    return _xstest("unsafe", xstest, judge)


def strongreject(strongreject: str = STRONGREJECT, judge: str = "", **_) -> dict[str, datasets.Dataset]:
    """Load StrongREJECT's prompts, from its authors' file or from the hub."""
    rows = load(strongreject, None, SPLITS)
    (column,) = find_schema(rows.column_names, strongreject, ("forbidden_prompt",), ("prompt",))
    return _tasks(list(rows[column]), strongreject, judge)


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Return 1 for a refusal and 0 for another answer: by the judge if one was named, else by the rule."""
    refuses = load_judge(doc["judge"])(doc["prompt"], results[0]) if doc["judge"] else is_refusal(results[0])
    return {"refusal_rate": float(refuses)}
