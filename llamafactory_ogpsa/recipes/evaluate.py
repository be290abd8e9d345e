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
    kind: str, model: str, adapter: str | None, output: str, tasks: str | None, sources: dict, extra: Sequence[str]
) -> int:
    """Run lm-evaluation-harness on a model and return its exit status.

    Args:
        kind: `general` or `safety`.
        model: hub id or path.
        adapter: path of a LoRA adapter on top of it.
        output: the folder of the results, one model's.
        tasks: names of the harness's tasks, separated by commas; None for those of `TASKS`.
        sources: `xstest`, `strongreject` and `judge`; None where not given.
        extra: more words of the harness's command line.

    Raises:
        RecipeError: the harness is not installed, there is no such judge, or the safety data cannot be used.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "evaluation needs lm-evaluation-harness; install it by: pip install 'llamafactory-ogpsa[eval]'."
        )
    from .tasks import functions

    given = {name: value for name, value in sources.items() if value}
    if "judge" in given:
        load_judge(given["judge"])
    tasks = tasks or TASKS[kind]
    for name in ("xstest_safe", "xstest_unsafe", "strongreject"):
        source = given.get(name.split("_")[0])
        if source and {"ogpsa_safety", f"ogpsa_{name}"} & set(tasks.split(",")):
            getattr(functions, name)(source)  # reads it, because the harness would show a traceback
    command = harness_command(model, adapter, output, tasks, given, extra)
    print(shlex.join(command), file=sys.stderr)
    return subprocess.run(command).returncode


def harness_command(
    model: str, adapter: str | None, output: str, tasks: str, given: dict[str, str], extra: Sequence[str]
) -> list[str]:
    """Return the harness's command line."""
    words = ["--model", "hf", "--model_args", f"pretrained={model}" + (f",peft={adapter}" if adapter else "")]
    words += ["--tasks", tasks, "--include_path", str(TASK_FOLDER), "--apply_chat_template"]
    words += ["--output_path", output, "--log_samples"]
    words += ["--metadata", json.dumps(given)] if given else []
    words += [] if "--batch_size" in extra else ["--batch_size", "auto"]
    return [sys.executable, "-m", "lm_eval", "run", *words, *extra]
