"""`llamafactory-ogpsa evaluate`: one command line of lm-evaluation-harness for general ability, one for safety."""

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .errors import RecipeError
from .refusal_rule import load_judge


TASKS = {"general": "mmlu,gpqa_main_zeroshot,ifeval,truthfulqa_mc2,bbh_cot_fewshot", "safety": "ogpsa_safety"}
TASK_FOLDER = Path(__file__).parent / "tasks"
# The tasks that each option has an effect on.
READERS = {"xstest": ("ogpsa_xstest_safe", "ogpsa_xstest_unsafe"), "strongreject": ("ogpsa_strongreject",)}
READERS["judge"] = READERS["xstest"] + READERS["strongreject"]


def evaluate(
    kind: str,
    model: str,
    adapter: str | None,
    output: str,
    tasks: str | None,
    extra: Sequence[str],
    **sources: str | None,
) -> int:
    """Run lm-evaluation-harness on a model and return its exit status.

    Args:
        kind: `general` or `safety`.
        model: hub id or path.
        adapter: path of a LoRA adapter on top of it.
        output: the folder of this one model's results.
        tasks: names of the harness's tasks, separated by commas; None for those of `TASKS`.
        extra: more words of the harness's command line.
        sources: `xstest`, `strongreject` and `judge`; None if not given.

    Raises:
        RecipeError: the harness is not installed, there is no such judge, the safety data cannot be used, or an option
            would have no effect.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "evaluation needs lm-evaluation-harness; install it by: pip install '.[eval]' in a clone of this project."
        )
    from .tasks import functions

    # The harness takes abbreviations; none of its other options begins like this.
    if any(word.startswith(("--o", "-o")) for word in extra):
        raise RecipeError("the harness's --output_path would replace --output; give --output alone.")
    tasks = tasks or TASKS[kind]
    given = {option: value for option, value in sources.items() if value is not None}
    for option, value in given.items():
        read = [name for name in READERS[option] if is_run(name, tasks)]
        if not read:
            allowed = ", ".join(("ogpsa_safety", *READERS[option]))
            raise RecipeError(f"--{option} has no effect on the tasks {tasks}; allowed with it: {allowed}.")
        if option == "judge":
            load_judge(value)
        else:
            for name in read:  # reads the data, because the harness would show a traceback
                getattr(functions, name.removeprefix("ogpsa_"))(value)
    command = harness_command(model, adapter, output, tasks, given, extra)
    print(shlex.join(command), file=sys.stderr)
    return subprocess.run(command).returncode


def is_run(name: str, tasks: str) -> bool:
    """Return whether `tasks`, which can have patterns, runs a safety task, alone or in the group."""
    return any(fnmatch(known, pattern) for known in (name, "ogpsa_safety") for pattern in tasks.split(","))


def harness_command(
    model: str, adapter: str | None, output: str, tasks: str, given: dict[str, str], extra: Sequence[str]
) -> list[str]:
    """Return the harness's command line."""
    words = ["--model", "hf", "--model_args", f"pretrained={model}" + (f",peft={adapter}" if adapter else "")]
    words += ["--tasks", tasks, "--include_path", str(TASK_FOLDER), "--apply_chat_template"]
    words += ["--output_path", output, "--log_samples"]
    words += ["--metadata", json.dumps(given)] if given else []
    # If an option is given twice, the harness takes the last.
    return [sys.executable, "-m", "lm_eval", "run", *words, "--batch_size", "auto", *extra]
