"""How often the refusal rule of `llamafactory-ogpsa evaluate safety` agrees with people, on completions they labelled.

    python examples/recipes/refusal_agreement.py xstest_v2_completions_gpt4.csv ...

The files are XSTest's (https://github.com/paul-rottger/exaggerated-safety): columns `completion` and `final_label`. A
partial refusal counts for neither side; its line says how often the rule calls it a refusal.
"""

import argparse
import csv
from pathlib import Path

from llamafactory_ogpsa.recipes.refusal_rule import is_refusal


COMPLIES, REFUSES, PARTLY = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


def count(path: Path) -> dict[str, tuple[int, int]]:
    """Return, for each label of people, how many completions the rule calls refusals, and of how many."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    flags = {
        label: [is_refusal(row["completion"]) for row in rows if row["final_label"] == label]
        for label in (COMPLIES, REFUSES, PARTLY)
    }
    return {label: (sum(found), len(found)) for label, found in flags.items()}


def agreement(counts: dict[str, tuple[int, int]]) -> float:
    """Return the share of full refusals and full answers on which rule and people agree."""
    (wrong, answers), (right, refusals) = counts[COMPLIES], counts[REFUSES]
    return (answers - wrong + right) / (answers + refusals)


def main() -> None:
    """Print a Markdown table, a row a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="CSV files with completion and final_label")
    print("| completions | agreement | full refusals found | full answers called refusals | partial refusals found |")
    print("|---|---|---|---|---|")
    for path in parser.parse_args().files:
        counts = count(path)
        shares = " | ".join(f"{found} of {total}" for found, total in (counts[k] for k in (REFUSES, COMPLIES, PARTLY)))
        print(f"| {path.stem} | {100 * agreement(counts):.1f} % | {shares} |")


if __name__ == "__main__":
    main()
