"""Reference gradients: weights, parts, turns, faults, and what a pass leaves behind."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.noise import preserve_random_state, without_noise
from llamafactory_ogpsa.reference import ReferencePasses, ReferenceSet, split_parts, take_in_turn


class Loss:
    """A token-averaged quadratic loss: what the trainers' losses look like from here."""

    def __init__(self, model):
        self.model = model

    def weigh(self, samples):
        return float(sum(sample["tokens"] for sample in samples))

    def __call__(self, batch, weight, total):
        errors = (self.model(batch["x"]) - batch["y"]).square().sum(-1)
        return (errors * batch["tokens"]).sum() / total


def collate(samples):
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def make_set(name, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return ReferenceSet(
        name,
        [
            {
                "x": torch.randn(4, generator=generator, dtype=torch.float64),
                "y": torch.randn(3, generator=generator, dtype=torch.float64),
                "tokens": torch.tensor(float(1 + i % 5), dtype=torch.float64),
            }
            for i in range(count)
        ],
        collate,
        None,
    )


def run(model, sets, parts=1, batch_size=4, indices=None, loss=None, loss_scale=1.0):
    engine = ReplicatedEngine(model, scaler=SimpleNamespace(get_scale=lambda: loss_scale))
    rows = [torch.full((len(sets) * parts, size), 7.0, dtype=torch.float64) for size in engine.sizes]
    indices = indices or [list(range(len(s.samples))) for s in sets]
    sets = [replace(reference, loss=loss or Loss(model)) for reference in sets]
    losses = ReferencePasses(sets, indices, batch_size, engine, parts).gradients_into(rows)
    return losses, torch.cat(rows, 1), engine


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()


def oracle(model, reference):
    batch = collate(reference.samples)
    loss = Loss(model)(batch, 0, float(batch["tokens"].sum()))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_mean_gradient_whatever_the_batch_size(model, batch_size, parts):
    sets = [make_set("a", 11, 1), make_set("b", 8, 2)]
    losses, rows, engine = run(model, sets, parts, batch_size)
    for i, reference in enumerate(sets):
        loss, gradient = oracle(model, reference)
        assert losses[reference.name] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(rows[i * parts : (i + 1) * parts].sum(0), gradient, rtol=1e-10, atol=1e-12)
    assert all(gradient is None for gradient in engine.gradients())


def test_parameters_that_no_sample_touches_give_zero_rows(model):
    model.unused = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    engine = ReplicatedEngine(model)
    _, rows, _ = run(model, [make_set("a", 5, 1)])
    position = engine.names.index("unused")
    start = sum(engine.sizes[:position])
    assert rows[:, start : start + 5].abs().max() == 0


def test_a_batch_that_is_not_finite_is_left_out(model):
    good, broken = make_set("a", 6, 1), make_set("a", 6, 1)
    broken.samples[4]["y"][0] = float("nan")
    losses, rows, _ = run(model, [broken], batch_size=1)
    kept = replace(good, samples=[s for i, s in enumerate(good.samples) if i != 4])
    loss, gradient = oracle(model, kept)
    assert losses["a"] == pytest.approx(loss)
    torch.testing.assert_close(rows[0], gradient, rtol=1e-10, atol=1e-12)


def test_a_set_without_a_finite_loss_stops_the_run(model):
    broken = make_set("truthful", 3, 1)
    for sample in broken.samples:
        sample["y"][:] = float("inf")
    with pytest.raises(FloatingPointError, match="reference set truthful gives no reference gradient: no batch"):
        run(model, [make_set("a", 3, 2), broken])


def test_an_overflowing_loss_scale_is_lowered(model):
    class Overflowing(Loss):
        def __init__(self, model, largest):
            super().__init__(model)
            self.largest = largest

        def __call__(self, batch, weight, total):
            loss = super().__call__(batch, weight, total)
            loss.register_hook(lambda gradient: gradient * (float("inf") if gradient.item() > self.largest else 1.0))
            return loss

    _, rows, _ = run(model, [make_set("a", 5, 1)], loss=Overflowing(model, 300), loss_scale=65536.0)
    torch.testing.assert_close(rows[0], oracle(model, make_set("a", 5, 1))[1])
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        run(model, [make_set("a", 5, 1)], loss=Overflowing(model, 0.5), loss_scale=65536.0)


@given(available=st.integers(1, 50), count=st.none() | st.integers(1, 60), turns=st.integers(1, 8))
def test_samples_are_taken_in_turn(available, count, turns):
    taken = [take_in_turn(available, count, turn) for turn in range(turns)]
    size = available if count is None else min(count, available)
    assert all(len(set(indices)) == size for indices in taken)
    assert sum(taken, []) == [i % available for i in range(turns * size)]


@given(st.integers(1, 40), st.integers(1, 9))
def test_parts_share_the_samples_out_evenly(count, parts):
    split = split_parts(list(range(count)), parts)
    assert sorted(sum(split, [])) == list(range(count))
    assert max(map(len, split)) - min(map(len, split)) <= 1


def test_the_random_state_is_preserved():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with preserve_random_state(torch.device("cpu")):
        draw()
    assert draw() == expected


def test_noise_is_off_and_everything_else_trains():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(attention_dropout=0.5, hidden_size=4.0)
            self.dropout, self.drop_last, self.p = 0.5, True, 0.3
            self.inner = torch.nn.Dropout(0.5)

        def forward(self, x):
            assert self.training
            x = torch.nn.functional.dropout(x, self.dropout, training=self.training)
            return self.inner(torch.nn.functional.dropout(x, self.config.attention_dropout, training=self.training))

    model = torch.nn.Sequential(Layer(), torch.nn.Embedding(3, 4)).eval()
    model[1].neftune_noise_alpha = 5.0
    with without_noise(model):
        assert torch.equal(model[0](torch.ones(100)), torch.ones(100))
        assert model[1].neftune_noise_alpha == 0
        assert (model[0].p, model[0].config.hidden_size) == (0.3, 4.0)
    assert not any(module.training for module in model.modules())
    assert (model[0].dropout, model[0].inner.p, model[0].config.attention_dropout) == (0.5, 0.5, 0.5)
    assert model[1].neftune_noise_alpha == 5.0


def test_a_loss_that_reaches_no_parameter_is_an_error(model):
    class Detached(Loss):
        def __call__(self, batch, weight, total):
            return torch.ones((), requires_grad=True) * 1.0

    with pytest.raises(ValueError, match="reaches no trainable parameter"):
        run(model, [make_set("a", 3, 1)], loss=Detached(model))


def test_a_model_that_is_split_over_devices_is_refused():
    split = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False, device="meta"))
    with pytest.raises(ValueError, match="0.weight is on cpu, 1.weight on meta"):
        ReplicatedEngine(split)
    ReplicatedEngine(split.requires_grad_(False).append(torch.nn.Linear(1, 1)))


def test_a_gradient_that_is_not_finite_is_not_tried_again_without_a_loss_scale(model):
    class Broken(Loss):
        calls = 0

        def __call__(self, batch, weight, total):
            self.calls += 1
            loss = super().__call__(batch, weight, total)
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss

    loss = Broken(model)
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        run(model, [make_set("a", 3, 1)], loss=loss)
    assert loss.calls == 1
