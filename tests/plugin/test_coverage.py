"""Protection reaches the weights: every tensor that has a safety gradient has a direction, and the log says so."""

import math

import pytest
import torch
from conftest import OGPSA, load_weights, read_rows, run_here

from llamafactory_ogpsa.run import OgpsaRun


# Trained on one of the reference sets, so that much is to be removed wherever there is a direction.
LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "warmup_ratio": 0.1,
    "max_steps": 6,
    "ogpsa_update_interval": 30,
    "dataset": "helpful_again",
}
PAIRS = {"stage": "ogpsa_dpo", "dataset": "helpful_pairs", "ogpsa_dataset": "helpful_pairs,truthful_pairs"}


@pytest.fixture
def removed_by_tensor(monkeypatch):
    """Record of each projection, by the tensor's name, the share that it removes and the norm that it removes it of."""
    steps, stock = [], OgpsaRun.project

    def project(self, max_norm, measure, optimizer=None):
        before = [None if g is None else g.clone() for g in self.engine.gradients()]
        stats = stock(self, None, measure, optimizer)
        steps.append(
            {
                name: (((old - new).norm() / old.norm()).item(), old.norm().item())
                for name, old, new in zip(self.engine.names, before, self.engine.gradients(), strict=True)
                if old is not None and old.norm() > 0
            }
        )
        return stats

    monkeypatch.setattr(OgpsaRun, "project", project)
    return steps


@pytest.mark.parametrize("pairs", [False, True], ids=["sft", "dpo"])
@pytest.mark.parametrize(
    "change",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"pissa_init": True, "pissa_iter": -1}, {"fp16": True}],
    ids=["lora", "rslora", "dora", "pissa", "skipped step"],
)
def test_every_lora_a_is_projected_from_the_first_step_that_can_be(
    base_args, removed_by_tensor, change, pairs, cpu_scaler, monkeypatch, tmp_path
):
    args = {**base_args, **OGPSA, **LORA, **(PAIRS if pairs else {}), **change}
    if "pissa_init" in change and pairs:
        pytest.skip("LLaMA-Factory has no PiSSA for DPO")
    if "fp16" in change:
        # The scale is such that the first step overflows, and is skipped.
        monkeypatch.setattr(
            torch.amp, "GradScaler", lambda *_, **__: _Scaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-90)
        )
    run_here(args)
    steps, refreshes = read_rows(args["output_dir"])
    seen = [{name: part for name, part in step.items() if "lora_A" in name} for step in removed_by_tensor]
    protected = [step for step in seen if step]
    shares = []
    assert len(protected) >= 3  # the first steps have no gradient of A, or are skipped
    for step in protected:
        assert len(step) == 14  # seven matrices in each of two layers
        assert min(share for share, _ in step.values()) > 0.01
        removed = math.hypot(*(share * norm for share, norm in step.values()))
        shares.append(removed / math.hypot(*(norm for _, norm in step.values())))
    assert min(shares) > 0.25
    assert sum(shares) / len(shares) > 0.3
    assert len(refreshes) == 2 - bool(refreshes[0]["covered_elements"] == 1)
    assert refreshes[-1]["covered_elements"] == 1
    assert all(row["uncovered"] == 0 for row in steps[2:])


_Scaler = torch.amp.GradScaler


def test_a_part_that_the_reference_sets_do_not_reach_is_named(base_args, said, monkeypatch):
    """A norm that only safety data reach: in the log from the start, and a warning at the second logged step."""
    from llamafactory.train.sft import trainer

    stock = trainer.CustomSeq2SeqTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = stock(self, model, inputs, *args, **kwargs)
        if "num_items_in_batch" in kwargs or args:  # a training step, not a reference pass
            extra = model.get_parameter("model.layers.0.input_layernorm.weight")
            return loss + extra.sum() * 10
        return loss

    monkeypatch.setattr(trainer.CustomSeq2SeqTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr("llamafactory_ogpsa.run.run.find_coverage", _without_the_norm)
    run_here({**base_args, **OGPSA})
    steps, refreshes = read_rows(base_args["output_dir"])
    assert all(row["covered_tensors"] == row["trainable_tensors"] - 1 for row in refreshes)
    size = sum(tensor.numel() for tensor in load_weights(base_args["model_name_or_path"]).values())
    assert all(row["covered_elements"] == pytest.approx(1 - 32 / size) for row in refreshes)
    assert all(row["uncovered"] > 0.9 for row in steps)
    warnings = [message for message in said() if "does not protect" in message]
    assert len(warnings) == 1
    assert "1 norms" in warnings[0]


def _without_the_norm(covered, engine):
    from llamafactory_ogpsa.run.coverage import find_coverage

    position = engine.names.index("model.layers.0.input_layernorm.weight")
    return find_coverage([has and index != position for index, has in enumerate(covered)], engine)
