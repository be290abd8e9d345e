"""Write the tables of docs/options.md, which come from the declaration of the options.

Run `python scripts/options_table.py` after a change of the declaration.
"""

from pathlib import Path

from llamafactory_ogpsa.options import OPTIONS


PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"

# The lines around the tables.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def make_tables() -> str:
    """Return the Markdown tables of all options, one a group."""
    allowed = {list: "dataset names", int: "a positive integer", bool: "true, false"}
    lines = []
    for group in dict.fromkeys(option.group for option in OPTIONS.values()):
        lines += [f"## {group}", "", "| option | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {option.shown_default} | {allowed.get(option.type) or ', '.join(option.choices)} | {option.help} |"
            for name, option in OPTIONS.items()
            if option.group == group
        ]
        lines.append("")
    return "\n".join(lines)


def insert_tables(page: str) -> str:
    """Return a page with new tables of options; raise a ValueError if the two lines around them are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{make_tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(insert_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
