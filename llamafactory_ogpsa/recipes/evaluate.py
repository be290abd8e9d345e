"""`llamafactory-ogpsa evaluate`: one command line of lm-evaluation-harness for general ability, one for safety."""

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import RecipeError
from .refusal_rule import load_judge


TASKS = {"general": "mmlu,gpqa_main_zeroshot,ifeval,truthfulqa_mc2,bbh_cot_fewshot", "safety": "ogpsa_safety"}
TASK_FOLDER = Path(__file__).parent / "tasks"


def evaluate(
    kind: str,
    model: str,
    adapter: str | None,
    output: str,
    tasks: str | None,
    sources: dict[str, str | None],
    extra: Sequence[str],
) -> int:
    """Run lm-evaluation-harness on a model.

    Args:
        kind: `general` or `safety`.
        model: hub id or path.
        adapter: path of a LoRA adapter on top of it.
        output: the folder of the results, one model's.
        tasks: names of the harness's tasks, separated by commas; None for those of `TASKS`.
        sources: of the safety data, and the judge, by the name that the tasks know them by.
        extra: more words of the harness's command line.

    Returns:
        the harness's exit status.

    Raises:
        RecipeError: the harness is not installed, there is no such judge, or the safety data cannot be used.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "evaluation needs lm-evaluation-harness; install it by: pip install 'llamafactory-ogpsa[eval]'."
        )
    given = {name: value for name, value in sources.items() if value}
    if "judge" in given:
        load_judge(given["judge"])
    tasks = tasks or TASKS[kind]
    check_safety_data(tasks, given)
    command = harness_command(model, adapter, output, tasks, given, extra)
    print(shlex.join(command), file=sys.stderr)
    return subprocess.run(command).returncode


def check_safety_data(tasks: str, given: dict[str, str]) -> None:
    """Read what was given as safety data for these tasks, because the harness would show a traceback.

    Raises:
        RecipeError: it cannot be used; says why.
    """
    from .tasks import functions

    asked = tasks.split(",")
    for name in ("xstest_safe", "xstest_unsafe", "strongreject"):
        source = name.split("_")[0]
        if source in given and ("ogpsa_safety" in asked or f"ogpsa_{name}" in asked):
            getattr(functions, name)(given[source])


def harness_command(
    model: str, adapter: str | None, output: str, tasks: str, given: dict[str, str], extra: Sequence[str]
) -> list[str]:
    """Return the harness's command line."""
    words = ["--model", "hf", "--model_args", f"pretrained={model}" + (f",peft={adapter}" if adapter else "")]
    words += ["--tasks", tasks, "--include_path", str(TASK_FOLDER), "--apply_chat_template"]
    words += ["--output_path", output, "--log_samples"]
    if given:
        words += ["--metadata", json.dumps(given)]
    if "--batch_size" not in extra:
        words += ["--batch_size", "auto"]
    return [sys.executable, "-m", "lm_eval", "run", *words, *extra]
