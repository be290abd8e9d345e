"""What the log says of the optimizer's step, against the saved weights before and after it."""

import oracle
import pytest
import torch
from conftest import OGPSA, load_weights, read_rows, run_here, same_weights

from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.run import update


COPIED = update.MOST_COPIED
OPTIMIZERS = {
    "sgd": {"optim": "sgd", "learning_rate": 1.0},
    "sgd with decay": {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.1},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("scope", ["parameter", "global"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_update_figures_are_those_of_the_saved_weights(base_args, optimizer, stage, scope):
    suffix = "_pairs" if stage == "dpo" else ""
    args = {
        **base_args,
        **OGPSA,
        **OPTIMIZERS[optimizer],
        "stage": f"ogpsa_{stage}",
        "dataset": f"safety{suffix}",
        "ogpsa_dataset": f"helpful{suffix},truthful{suffix}",
        "ogpsa_scope": scope,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "max_grad_norm": 0.5,
    }
    initial = load_weights(args["model_name_or_path"])
    run_here(args)
    final = load_weights(args["output_dir"])
    _, references = oracle.projected_gradient(args, stage, scope, 2)
    change = {name: (final[name].double() - initial[name].double()).flatten() for name in final}
    whole = torch.cat([change[name] for name in change])
    row = read_rows(args["output_dir"])[0][0]
    for reference, name in zip(references, args["ogpsa_dataset"].split(","), strict=True):
        r = torch.cat([reference[tensor] for tensor in change])
        assert row["update_cosine"][name] == pytest.approx((whole @ r / whole.norm() / r.norm()).item(), abs=1e-4)
        assert row["update_loss_change"][name] == pytest.approx(
            (whole @ r).item(), abs=1e-4 * (whole.norm() * r.norm()).item()
        )
    if optimizer == "sgd":
        assert row["update_share"] < 1e-3
    else:
        assert row["update_share"] > 2e-3


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_adams_state_gives_what_a_copy_gives(base_args, monkeypatch, tmp_path, optim, decay):
    rows = []
    for most in (COPIED, 0):
        monkeypatch.setattr(update, "MOST_COPIED", most)
        args = {**base_args, **OGPSA, "optim": optim, "weight_decay": decay, "learning_rate": 1e-3}
        run_here({**args, "output_dir": str(tmp_path / str(most))})
        rows.append(read_rows(tmp_path / str(most))[0])
    assert same_weights(tmp_path / str(update.MOST_COPIED), tmp_path / str(COPIED))
    for one, other in zip(*rows, strict=True):
        assert other["update_share"] == pytest.approx(one["update_share"], abs=1e-4)
        for name in ("helpful", "truthful"):
            assert other["update_cosine"][name] == pytest.approx(one["update_cosine"][name], abs=1e-4)


def test_a_parameter_without_a_gradient_does_not_change(monkeypatch):
    monkeypatch.setattr(update, "MOST_COPIED", 0)
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False) for _ in range(2)])
    engine, optimizer = ReplicatedEngine(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    for reached in (2, 1):
        optimizer.zero_grad()
        for param in engine.parameters[:reached]:
            param.grad = torch.randn_like(param)
        before = [param.detach().clone() for param in engine.parameters]
        read_changes = update.make_change_reader(engine, optimizer)
        optimizer.step()
        changes = dict(read_changes())
        assert list(changes) == list(range(reached))
        for index, change in changes.items():
            expected = (engine.parameters[index].detach() - before[index]).flatten()
            torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_whose_step_cannot_be_had_is_named_once(base_args, monkeypatch, said):
    monkeypatch.setattr(update, "MOST_COPIED", 0)
    run_here({**base_args, **OGPSA, "optim": "sgd"})
    steps, _ = read_rows(base_args["output_dir"])
    assert len(steps) == 3
    assert not any("update_cosine" in row for row in steps)
    assert len([message for message in said() if "from the state of torch.optim.sgd.SGD" in message]) == 1


def test_an_adamw_with_another_state_is_not_read_as_torchs(monkeypatch):
    """bitsandbytes keeps `state1` and `state2`, and GaLore moments of another shape, both in a class named AdamW."""
    monkeypatch.setattr(update, "MOST_COPIED", 0)
    engine = ReplicatedEngine(torch.nn.Linear(3, 3))
    other = type("AdamW", (torch.optim.SGD,), {"__module__": "bitsandbytes.optim.adamw"})
    assert update.make_change_reader(engine, other(engine.parameters, lr=0.1)) is None
    assert update.make_change_reader(engine, torch.optim.AdamW(engine.parameters, lr=0.1)) is not None


def test_a_step_of_learning_rate_zero_has_no_update(base_args):
    run_here({**base_args, **OGPSA, "warmup_steps": 1})
    steps, _ = read_rows(base_args["output_dir"])
    assert ["update_share" in row for row in steps] == [False, True, True]
