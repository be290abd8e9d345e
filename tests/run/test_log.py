"""The line at the start of a run says when the subspace is refreshed and what that costs."""

import logging
from types import SimpleNamespace

import pytest

from llamafactory_ogpsa.options import OPTIONS, Settings, resolve
from llamafactory_ogpsa.run.log import introduce


def start(caplog, interval, scope, from_zero=False, method="orthogonal"):
    """Return what is logged at the start of a run of 10 steps of 4 samples, with one set of 8."""
    given = {
        **dict.fromkeys(OPTIONS),
        "ogpsa_dataset": "helpful",
        "ogpsa_update_interval": interval,
        "ogpsa_scope": scope,
        "ogpsa_method": method,
    }
    arguments = SimpleNamespace(**given, stage="sft", plot_loss=False)
    resolve(arguments)
    engine = SimpleNamespace(processes=SimpleNamespace(size=1), num_parameters=20, names=["a"])
    host = SimpleNamespace(engine=engine, max_steps=10, samples_per_step=4)
    maker = SimpleNamespace(rank=1, num_bytes=80, device="cpu")
    sets = [SimpleNamespace(name="helpful", samples=range(8))]
    with caplog.at_level(logging.INFO):
        introduce(logging.getLogger("start"), Settings.from_arguments(arguments), sets, host, maker, from_zero)
    return caplog.text


@pytest.mark.parametrize(
    ("interval", "scope", "from_zero", "when", "cost"),
    [
        (5, "parameter", False, "refreshed every K = 5 steps", "0.40"),
        (5, "inputs", False, "refreshed every K = 5 steps", "0.40"),
        (10, "inputs", False, "refreshed before the first step alone;", "0.20"),
        (1_000_000, "inputs", True, "refreshed before the first step alone;", "0.20"),
        (1_000_000, "global", True, "refreshed before the first step, and again once the weights have moved;", "0.40"),
    ],
)
def test_the_start_line_says_when_and_at_what_cost(caplog, interval, scope, from_zero, when, cost):
    text = start(caplog, interval, scope, from_zero)
    assert when in text
    assert f"expected cost {cost} reference samples" in text
    assert "WARNING" not in text


def test_one_refresh_of_a_basis_that_follows_the_model_is_warned_of(caplog):
    assert "OGPSA refreshes its basis once: the run has 10 steps" in start(caplog, 10, scope="parameter")
    caplog.clear()
    assert "refreshes its basis once" not in start(caplog, 5, scope="parameter")


def test_a_second_refresh_that_leaves_loras_b_unprotected_is_warned_of(caplog):
    assert "OGPSA refreshes its basis 2 times: the run has 10 steps" in start(caplog, 5, "inputs", from_zero=True)
    assert "LoRA's B is then not protected" in caplog.text
    caplog.clear()
    assert "LoRA's B" not in start(caplog, 5, "inputs", from_zero=True, method="monitor")
