"""The example YAMLs are what LLaMA-Factory's own parser takes, and differ from a stock run by the OGPSA lines alone."""

from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "yaml").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_llamafactory_parses_the_example(path, monkeypatch, tmp_path):
    from llamafactory.hparams import get_train_args

    monkeypatch.chdir(ROOT)
    args = yaml.safe_load(path.read_text())
    parsed = get_train_args({**args, "use_cpu": True, "output_dir": str(tmp_path)})
    finetuning_args = parsed[3]
    assert finetuning_args.ogpsa_enabled == ("ogpsa_" in path.read_text())
    assert finetuning_args.stage == args["stage"].removeprefix("ogpsa_")


def test_naive_and_ogpsa_sft_differ_by_the_ogpsa_lines_alone():
    naive, ogpsa = (
        yaml.safe_load((ROOT / "examples" / "yaml" / f"tiny_{kind}_sft.yaml").read_text())
        for kind in ("naive", "ogpsa")
    )
    differing = {key for key in naive.keys() | ogpsa.keys() if naive.get(key) != ogpsa.get(key)}
    assert {key for key in differing if not key.startswith("ogpsa_")} == {"stage", "output_dir"}
