"""The texts that LlamaBoard shows for OGPSA (board_texts.yaml), in its languages and in the form of its own tables."""

from importlib.resources import files
from typing import Any

import yaml


_TEXTS = yaml.safe_load((files(__package__) / "board_texts.yaml").read_text(encoding="utf-8"))
LOCALES: dict[str, dict[str, dict[str, str]]] = _TEXTS["labels"]
ALERTS: dict[str, dict[str, str]] = _TEXTS["messages"]


def add_locales(locales: dict[str, Any]) -> None:
    """Add OGPSA's labels to LlamaBoard's table, for all of its languages; English if ours lacks one."""
    for name, texts in LOCALES.items():
        locales[name] = {lang: texts.get(lang, texts["en"]) for lang in locales["galore_tab"]}


def alert(name: str, lang: str, *values: Any) -> str:
    """Return a message in a language of LlamaBoard."""
    return ALERTS[name].get(lang, ALERTS[name]["en"]).format(*values)


def label(name: str, lang: str) -> str:
    """Return the label of an option in a language of LlamaBoard."""
    return LOCALES[name].get(lang, LOCALES[name]["en"])["label"]
