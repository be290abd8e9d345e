"""The `ogpsa_*` options as LLaMA-Factory's argument parser takes and shows them."""

import re
from types import SimpleNamespace

import pytest

from llamafactory_ogpsa.plugin.arguments import OPTIONS, resolve


@pytest.fixture(scope="module")
def parser():
    from llamafactory.hparams import parser

    return parser


def test_the_help_shows_the_real_default_once(parser):
    printed = " ".join(parser.HfArgumentParser(parser._TRAIN_ARGS).format_help().split())
    filled = SimpleNamespace(**{**dict.fromkeys(OPTIONS), "ogpsa_dataset": "general"}, stage="sft")
    resolve(filled)
    for name in OPTIONS:
        _, _, rest = printed.rpartition(f" --{name} ")  # the first time is in the usage line
        text = re.split(r" --[a-z]+_", rest)[0]  # up to the next option, past its own spelling with dashes
        shown = re.findall(r"\(default: (.*?)\)", text)
        assert len(shown) == (name != "ogpsa_dataset"), text
        assert "%" not in text
        default = getattr(filled, name)
        if shown and default is not None:
            assert str(default).lower() in shown[0], text
