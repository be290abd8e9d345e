"""A recipe from beginning to end: read, make samples, split, write, report."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import helpful, safety, truthful
from .errors import RecipeError
from .output import write
from .refusals import TEMPLATES, Label, make_label
from .samples import Sample, split
from .source import iterate, load, require_columns


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Recipe:
    """Where the records come from and what becomes of them."""

    about: str
    hub_id: str
    config: str | None
    splits: tuple[str, ...]
    num_samples: int
    read: Callable[..., list[Sample]]


@dataclass(frozen=True)
class Report:
    """What became of the records: each is in `<recipe>_sft`, in its held-out split, or counted among the dropped."""

    source: str
    output: Path
    records: int
    drops: Counter
    counts: dict[str, int]

    def __str__(self) -> str:
        """Return the report as it is printed."""
        lines = [f"{self.source}: {self.records} records"]
        lines += [f"  {count:>8}  dropped: {reason}" for reason, count in self.drops.most_common()]
        lines += [f"  {count:>8}  in {name}" for name, count in self.counts.items()]
        return "\n".join([*lines, f"written to {self.output}, with entries in dataset_info.json"])


def read_safety(dataset: "Dataset", source: str, drops: Counter, label: Label) -> list[Sample]:
    """Make samples of PKU-SafeRLHF."""
    require_columns(dataset, source, safety.COLUMNS)
    return safety.make_samples(iterate(dataset, safety.COLUMNS + safety.CATEGORIES, drops), drops, label)


def read_helpful(dataset: "Dataset", source: str, drops: Counter) -> list[Sample]:
    """Make samples of UltraFeedback, in either form."""
    schemas = (helpful.RAW, helpful.BINARIZED)
    form = require_columns(dataset, source, *schemas)
    return helpful.make_samples(iterate(dataset, schemas[form], drops), drops, binarized=form == 1)


def read_truthful(dataset: "Dataset", source: str, drops: Counter) -> list[Sample]:
    """Make samples of HaluEval QA."""
    require_columns(dataset, source, truthful.COLUMNS)
    return truthful.make_samples(iterate(dataset, truthful.COLUMNS, drops), drops)


# The paper trains on 10,000 prompts and takes 200 of each general set; the rest of those is for mixing it in.
RECIPES = {
    "safety": Recipe(
        about="PKU-SafeRLHF: harmful prompts, refused",
        hub_id="PKU-Alignment/PKU-SafeRLHF",
        config=None,
        splits=("train",),
        num_samples=10_000,
        read=read_safety,
    ),
    "helpful": Recipe(
        about="UltraFeedback, raw or binarized: general instructions",
        hub_id="openbmb/UltraFeedback",
        config=None,
        splits=("train", "train_prefs"),
        num_samples=1_000,
        read=read_helpful,
    ),
    "truthful": Recipe(
        about="HaluEval QA: questions on a given text",
        hub_id="pminervini/HaluEval",
        config="qa",
        splits=("train", "data"),
        num_samples=1_000,
        read=read_truthful,
    ),
}


def prepare(
    name: str,
    source: str | None,
    output: str,
    seed: int,
    num_samples: int | None,
    refusals: str = TEMPLATES,
) -> Report:
    """Carry out a recipe.

    Args:
        name: of the recipe.
        source: hub id, or path of a folder or file; None for the published dataset.
        output: the folder to write to, LLaMA-Factory's `dataset_dir`.
        seed: of every choice.
        num_samples: to train on; None for the recipe's own number.
        refusals: see `refusals.make_label`; the recipe `safety` alone has a use for it.

    Returns:
        what was kept and dropped.

    Raises:
        RecipeError: the data cannot be used, or the output not be written; says why.
    """
    recipe, drops = RECIPES[name], Counter()
    source = source or recipe.hub_id
    options = {"label": make_label(refusals, seed)} if name == "safety" else {}
    dataset = load(source, recipe.config, recipe.splits)
    samples = recipe.read(dataset, source, drops, **options)
    if not samples:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in drops.most_common())
        raise RecipeError(f"{source}: none of the {len(dataset)} records can be used ({reasons}).")

    train, held_out = split(samples, num_samples or recipe.num_samples, seed, drops)
    try:
        counts = write(Path(output), name, train, held_out)
    except OSError as err:
        raise RecipeError(f"cannot write to {output}: {err}.") from err
    return Report(source, Path(output), len(dataset), drops, counts)
