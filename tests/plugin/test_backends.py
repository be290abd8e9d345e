"""Backends and trainers that OGPSA does not know: stock runs there go on as they were, OGPSA runs are refused by name."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import OGPSA


# What LLaMA-Factory's parser would look like with one more backend: a list, a function and a sixth group of arguments.
NEXT_BACKEND = """
from dataclasses import dataclass


@dataclass
class NextArguments:
    next_backend_size: int = 1


_TRAIN_NEXT_ARGS = [ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, NextArguments, GeneratingArguments]


def _parse_train_next_args(args=None):
    return _parse_args(HfArgumentParser(_TRAIN_NEXT_ARGS), args)


def get_train_args(args=None):
    return _parse_train_next_args(args)
"""

PARSE = """
import importlib.abc, json, sys
import torch

class Next(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "llamafactory.hparams.parser":
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(spec for finder in behind if (spec := finder.find_spec(name, path, target)) is not None)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), exec(sys.argv[1], vars(module)))[0]
        return spec

sys.meta_path.insert(1, Next())  # behind OGPSA's own
from llamafactory.hparams import get_train_args
from llamafactory.hparams.finetuning_args import FinetuningArguments

parsed = get_train_args(json.loads(sys.argv[2]))
print(len(parsed), type(parsed[3]) is FinetuningArguments)
"""


@pytest.mark.cli
@pytest.mark.parametrize("asking", [False, True])
def test_a_backend_that_llamafactory_adds(base_args, asking):
    args = {**base_args, **OGPSA} if asking else base_args
    process = subprocess.run(
        [sys.executable, "-c", PARSE, NEXT_BACKEND, json.dumps(args)], capture_output=True, text=True
    )
    if asking:
        assert process.returncode != 0
        assert "ValueError: This run is parsed by LLaMA-Factory's `_parse_train_next_args`" in process.stderr
        assert "or a run without `stage: ogpsa_sft`, `ogpsa_dataset`, `ogpsa_update_interval`" in process.stderr
    else:
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.splitlines()[-1] == "6 True"


@pytest.fixture
def v1_config(model_dir, data_dir, tmp_path):
    """A run of LLaMA-Factory's v1 trainer; a function that writes it with further options."""
    dataset = tmp_path / "dataset.yaml"
    entry = {"path": f"{data_dir}/safety.json", "source": "local", "converter": "alpaca"}
    dataset.write_text(yaml.safe_dump({"safety": entry}))

    def write(**options):
        config = tmp_path / "v1.yaml"
        run = {"model": model_dir, "train_dataset": str(dataset), "output_dir": str(tmp_path / "out"), "max_steps": 1}
        config.write_text(yaml.safe_dump({**run, **options}))
        return str(config)

    return write


def test_v1_parses_a_stock_run_as_it_did(v1_config):
    from llamafactory.v1.config import get_args

    with open(v1_config()) as f:
        args = yaml.safe_load(f)
    assert get_args(dict(args)) == get_args.__wrapped__(dict(args))
