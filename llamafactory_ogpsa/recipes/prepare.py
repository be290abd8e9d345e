"""The recipes, and how one is carried out: read, make samples, split, write, report."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import helpful, safety, transcripts, truthful
from .errors import RecipeError
from .output import write
from .refusals import DATASET, TEMPLATES, make_label
from .samples import Sample, collect, split
from .source import find_schema, iterate, load


@dataclass(frozen=True)
class Recipe:
    """A published dataset, and how samples are made from its records."""

    about: str
    hub_id: str
    splits: tuple[str, ...]
    num_samples: int
    # The functions that make samples from records, by the columns that the records must have.
    schemas: dict[tuple[str, ...], Callable[..., list[Sample]]]
    config: str | None = None


# The paper trains on 10,000 prompts and uses 200 of each general set; the others can be mixed into the training data.
RECIPES = {
    "safety": Recipe(
        about="PKU-SafeRLHF, hh-rlhf or Safety-Tuned LLaMAs: harmful prompts, refused",
        hub_id="PKU-Alignment/PKU-SafeRLHF",
        splits=("train",),
        num_samples=10_000,
        schemas={
            safety.PKU: safety.make_pku_samples,
            transcripts.COLUMNS: partial(collect, make=transcripts.make_sample),
            safety.INSTRUCTIONS: partial(collect, make=safety.make_instruction),
        },
    ),
    "helpful": Recipe(
        about="UltraFeedback, raw or binarized, or hh-rlhf: general instructions",
        hub_id="openbmb/UltraFeedback",
        splits=("train", "train_prefs"),
        num_samples=1_000,
        schemas={
            helpful.RAW: partial(collect, make=helpful.make_raw),
            helpful.BINARIZED: partial(collect, make=helpful.make_binarized),
            transcripts.COLUMNS: partial(collect, make=transcripts.make_sample),
        },
    ),
    "truthful": Recipe(
        about="HaluEval QA: questions on a given text",
        hub_id="pminervini/HaluEval",
        splits=("train", "data"),
        config="qa",
        num_samples=1_000,
        schemas={truthful.COLUMNS: partial(collect, make=truthful.make_sample)},
    ),
}


def prepare(
    name: str, source: str | None, output: str, seed: int, num_samples: int | None, refusals: str | None = None
) -> str:
    """Carry out a recipe.

    Args:
        name: the recipe's.
        source: hub id, or path of a folder or file; None for the published dataset.
        output: the folder to write to, LLaMA-Factory's `dataset_dir`.
        seed: the seed of every choice.
        num_samples: prompts to train on; None for the recipe's own number.
        refusals: see `refusals.make_label`; for the recipe `safety` only. None is `templates` for PKU-SafeRLHF, whose
            safe answers often do not refuse, and `dataset` for the other two.

    Returns:
        the report: each record is in `<recipe>_sft`, in its held-out split, or counted among the dropped.

    Raises:
        RecipeError: the data cannot be used, or the output cannot be written; says why.
    """
    recipe, drops = RECIPES[name], Counter()
    source = source or recipe.hub_id
    label = None if refusals is None else make_label(refusals, seed)
    dataset = load(source, recipe.config, recipe.splits)
    schema = find_schema(dataset.column_names, source, *recipe.schemas)
    samples = recipe.schemas[schema](iterate(dataset, drops), drops)
    if name == "safety":
        label = label or make_label(TEMPLATES if schema == safety.PKU else DATASET, seed)
        samples = safety.refuse(samples, drops, label)
    if not samples:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in drops.most_common())
        raise RecipeError(f"{source}: none of the {len(dataset)} records can be used ({reasons}).")

    train, held_out = split(samples, num_samples or recipe.num_samples, seed, drops)
    try:
        counts = write(Path(output), name, train, held_out)
    except OSError as err:
        raise RecipeError(f"cannot write to {output}: {err}.") from err
    lines = [f"{source}: {len(dataset)} records"]
    lines += [f"  {count:>8}  dropped: {reason}" for reason, count in drops.most_common()]
    lines += [f"  {count:>8}  in {dataset_name}" for dataset_name, count in counts.items()]
    return "\n".join([*lines, f"written to {output}, with entries in dataset_info.json"])
