"""The command `llamafactory-ogpsa`: data, evaluation and checks beside `llamafactory-cli`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .doctor import examine
from .recipes.compare import draw, make_table, read_rows
from .recipes.errors import RecipeError
from .recipes.evaluate import TASKS, evaluate
from .recipes.prepare import RECIPES, prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit status."""
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    options = vars(arguments)
    run = options.pop("run")
    if "extra" in options:
        options["extra"] = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return run(**options)
    except RecipeError as err:
        print(f"llamafactory-ogpsa: {err}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; `run` of what it returns takes the command's options by name."""
    parser = argparse.ArgumentParser(
        prog="llamafactory-ogpsa",
        description="Data and checks for OGPSA training; the training itself is `llamafactory-cli train`. "
        "Exit status: 2 if something given cannot be used; the message says what and why. doctor returns 1 if OGPSA "
        "cannot train here; evaluate returns the harness's status.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_prepare(commands.add_parser("prepare", help="make LLaMA-Factory datasets of published data"))
    add_evaluate(
        commands.add_parser("evaluate", help="measure general ability or safety of a model", allow_abbrev=False)
    )
    add_compare(commands.add_parser("compare", help="turn results of evaluate into a table, and a picture"))
    doctor = commands.add_parser(
        "doctor",
        help="check whether OGPSA can train here, and print what to fix",
        description="Print versions, seams and devices, and for each problem a fix to try. "
        "Exit status: 0 if OGPSA can train, 1 otherwise.",
    )
    doctor.set_defaults(run=examine)
    return parser


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """Add the recipes and their options to the parser of `prepare`."""
    recipes = parser.add_subparsers(dest="name", required=True, metavar="RECIPE")
    for name, recipe in RECIPES.items():
        options = recipes.add_parser(
            name,
            help=recipe.about,
            description=f"Write {name}_sft and {name}_dpo, each with a _heldout split, into a dataset_dir.",
        )
        options.add_argument(
            "--from",
            dest="source",
            metavar="HUB_ID_OR_PATH",
            help=f"dataset on the Hugging Face hub, or local folder or file (default: {recipe.hub_id})",
        )
        options.add_argument(
            "--output",
            metavar="DIR",
            default="data/recipes",
            help="folder for the files and dataset_info.json (default: %(default)s)",
        )
        options.add_argument("--seed", type=int, default=0, help="seed of every choice (default: %(default)s)")
        options.add_argument(
            "--num-samples",
            type=positive,
            metavar="N",
            help=f"prompts to train on; a tenth as many are held out (default: {recipe.num_samples})",
        )
        if name == "safety":
            options.add_argument(
                "--refusals",
                metavar="templates|dataset|FILE",
                help="where the refusals come from: varied templates, the dataset's own safe answers, or a file "
                "with one refusal a line ({topic} is replaced) or .jsonl with prompt and refusal "
                "(default: templates for PKU-SafeRLHF, dataset for others)",
            )
    parser.set_defaults(run=run_prepare)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.description = (
        "Run lm-evaluation-harness on a base model, a full checkpoint or a LoRA adapter. Options that are not listed "
        "here are its own, e.g. --limit 10."
    )
    parser.add_argument("kind", choices=TASKS, help=", ".join(f"{name}: {tasks}" for name, tasks in TASKS.items()))
    parser.add_argument("--model", required=True, help="hub id or path of a model or full checkpoint")
    parser.add_argument("--adapter", help="path of a LoRA adapter on top of it")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of this model's results, of both kinds")
    parser.add_argument("--tasks", metavar="NAMES", help="other tasks of the harness, separated by commas")
    parser.add_argument("--xstest", metavar="HUB_ID_OR_PATH", help="XSTest (default: walledai/XSTest)")
    parser.add_argument("--strongreject", metavar="HUB_ID_OR_PATH", help="default: walledai/StrongREJECT")
    parser.add_argument(
        "--judge",
        metavar="MODULE:FUNCTION",
        help="function of a prompt and its answer that returns whether it is a refusal, instead of the rule",
    )
    parser.set_defaults(run=evaluate, extra=[])


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.description = (
        "Print a Markdown table of the results, a row a folder, and with --picture draw them as a scatter plot. "
        "Exit status: 2 where a folder has no results, or where the picture cannot be drawn after the table was printed."
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folder given to evaluate as --output")
    parser.add_argument("--picture", metavar="FILE", help="the scatter plot (default: none)")
    parser.set_defaults(run=run_compare)


def positive(text: str) -> int:
    """Read a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def run_prepare(**options: Any) -> int:
    """Carry out a recipe and print its report."""
    print(prepare(**options))
    return 0


def run_compare(results: Sequence[str], picture: str | None) -> int:
    """Print the table, and draw the picture if one is wanted."""
    rows = read_rows(results)
    print(make_table(rows))
    if picture:
        draw(rows, Path(picture))
        print(f"picture in {picture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
