"""Reference passes are free of noise, and prove it; runs of no steps; collators that take their samples apart."""

import pytest
import torch
from conftest import OGPSA, load_weights, read_rows, run_here, same_weights

from llamafactory_ogpsa.noise import check_repeatable, without_noise


@pytest.mark.parametrize("alpha", [5, 5.0])
@pytest.mark.parametrize(
    "change", [{}, {"stage": "ogpsa_dpo", "dataset": "safety_pairs", "ogpsa_dataset": "helpful_pairs"}]
)
def test_neftune_does_not_reach_the_reference_losses(base_args, tmp_path, alpha, change):
    losses = []
    for name, noise in [("quiet", {}), ("noisy", {"neftune_noise_alpha": alpha})]:
        out = str(tmp_path / name)
        run_here({**base_args, **OGPSA, **change, **noise, "output_dir": out, "max_steps": 1})
        losses.append(read_rows(out)[1][0]["reference_loss"])
    assert losses[0] == losses[1]
    assert not same_weights(tmp_path / "quiet", tmp_path / "noisy")  # the training steps have their noise
    if change:
        assert losses[0]["helpful_pairs"] == pytest.approx(0.693147, abs=1e-5)  # ln 2 before the first step


class Hidden(torch.nn.Module):
    """Noise whose strength has a name that says nothing."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def test_noise_that_stays_on_is_an_error_that_names_the_module():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), Hidden(), torch.nn.Linear(4, 1))
    loss = lambda: model(torch.ones(3, 4)).square().mean()
    with without_noise(model), pytest.raises(RuntimeError, match=r"first seen in 2, Hidden"):
        check_repeatable(model, loss, list)
    model[2] = torch.nn.Identity()
    with without_noise(model):
        check_repeatable(model, loss, list)


def test_a_run_is_stopped_by_noise_in_its_reference_passes(base_args, monkeypatch):
    from transformers import AutoModelForCausalLM

    mlp = type(AutoModelForCausalLM.from_pretrained(base_args["model_name_or_path"]).model.layers[0].mlp)
    stock = mlp.forward
    noisy = lambda self, x: stock(self, x) * (1 + 200 * torch.rand(()))
    monkeypatch.setattr(mlp, "forward", noisy)
    place = f"first seen in model.layers.0.mlp, {mlp.__name__}"
    with pytest.raises(RuntimeError, match=f"stays on in reference passes .{place}"):
        run_here({**base_args, **OGPSA})


@pytest.mark.parametrize("change", [{"num_train_epochs": 0, "max_steps": -1}])
def test_a_run_of_no_steps_saves_the_model_as_stock_does(base_args, tmp_path, change):
    stock = {**base_args, **change, "output_dir": str(tmp_path / "stock")}
    run_here(stock)
    run_here({**base_args, **OGPSA, **change})
    assert same_weights(base_args["output_dir"], stock["output_dir"])
    assert load_weights(base_args["output_dir"])


def test_a_collator_may_take_samples_apart(base_args, monkeypatch):
    """A batch is collated again where a loss was not finite; collators of images pop what they have used."""
    from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask as Collator
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer as Trainer

    collate, compute_loss, calls = Collator.__call__, Trainer.compute_loss, []

    def popping(self, features):
        batch = collate(self, [dict(feature) for feature in features])
        for feature in features:
            feature.pop("input_ids")
        return batch

    def sometimes_infinite(self, *args, **kwargs):
        calls.append(None)
        loss = compute_loss(self, *args, **kwargs)
        return loss * float("inf") if len(calls) == 6 else loss

    monkeypatch.setattr(Collator, "__call__", popping)
    monkeypatch.setattr(Trainer, "compute_loss", sometimes_infinite)
    run_here({**base_args, **OGPSA})
    assert len(read_rows(base_args["output_dir"])[0]) == 3
