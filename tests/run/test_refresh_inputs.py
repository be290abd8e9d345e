"""What scope `inputs` records of a forward pass, and what it refuses to train."""

from types import SimpleNamespace

import pytest
import torch

from llamafactory_ogpsa import Subspace
from llamafactory_ogpsa.engines import Processes
from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.inputs import InputSubspace, Protected
from llamafactory_ogpsa.record import FEWEST_TOKENS, ROWS, Recorder, find_modules
from llamafactory_ogpsa.reference import ReferencePasses, ReferenceSet
from llamafactory_ogpsa.run.refresh_inputs import InputBasis


SETTINGS = SimpleNamespace(rank=3, kernel="torch", method="orthogonal", scope="inputs")


class Loss:
    """A squared output, averaged over samples."""

    def __init__(self, model):
        self.model = model

    def weigh(self, samples):
        return float(len(samples))

    def __call__(self, batch, weight, total):
        return self.model(batch["x"]).square().mean() * (weight / total)


def compute(model, inputs):
    """Make bases from inputs `[samples, in]`, in batches of one; return the subspace and the losses."""
    engine = ReplicatedEngine(model)
    collate = lambda samples: {"x": torch.stack([sample["x"] for sample in samples])}
    reference = ReferenceSet("set", [{"x": row} for row in inputs], collate, Loss(model))
    return InputBasis(SETTINGS, engine, model).compute(
        ReferencePasses([reference], [list(range(len(inputs)))], 1, engine)
    )


def test_the_identity_that_dora_passes_through_its_adapter_is_no_input():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, use_dora=True, init_lora_weights=False))
    engine = ReplicatedEngine(model)
    recorder = Recorder(find_modules(engine, model), 3)
    inputs = torch.randn(3, 8)
    with recorder.recording():
        recorder.begin_batch({}, 3)
        model(inputs)
        recorder.end_batch(finite=True)
    a, b = (next(i for i, name in enumerate(engine.names) if kind in name) for kind in ("lora_A", "lora_B"))
    assert sorted(recorder.shared) == sorted([(a,), (b,)])
    torch.testing.assert_close(recorder.rows((a,), 8), inputs)
    torch.testing.assert_close(recorder.rows((b,), 2), inputs @ engine.parameters[a].detach().T)


@pytest.mark.parametrize(("samples", "tokens"), [(2, 60), (ROWS // 32, 32), (ROWS, FEWEST_TOKENS), (0, 60)])
def test_few_samples_give_more_of_their_tokens_and_many_still_enough(samples, tokens):
    model = torch.nn.Linear(8, 4)
    engine = ReplicatedEngine(model)
    recorder = Recorder(find_modules(engine, model), samples)
    inputs, labels = torch.randn(1, 60, 8), torch.full((1, 60), -100)
    labels[0, 41:] = 1
    with recorder.recording():
        recorder.begin_batch({"attention_mask": torch.ones(1, 60), "labels": labels}, 1)
        model(inputs)
        recorder.end_batch(finite=True)
    weight = engine.names.index("weight")
    rows = recorder.rows((weight,), 8)
    assert len(rows) == tokens
    assert any(torch.equal(row, inputs[0, 40]) for row in rows)  # from which the first token of the answer comes


def test_a_batch_whose_loss_is_not_finite_leaves_no_inputs():
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(8, 4), torch.randn(3, 8)
    inputs[1, 2] = torch.nan
    subspace, losses = compute(model, inputs)
    other, other_losses = compute(model, inputs[[0, 2]])
    index = subspace.names.index("weight")
    assert torch.equal(subspace.protected[index].basis, other.protected[index].basis)
    assert losses == other_losses


def test_a_transposed_matrix_is_measured_and_projected():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, inputs = Conv1D(8, 8), torch.randn(2, 8)
    subspace, _ = compute(model, inputs)
    weight = subspace.names.index("weight")
    gradients = [torch.randn_like(param) for param in model.parameters()]
    change = gradients[weight].clone()
    subspace.projection(kernel="torch")(gradients)
    basis = torch.linalg.svd(inputs.double(), full_matrices=False)[2]
    expected = change.double() - basis.T @ (basis @ change.double())
    torch.testing.assert_close(gradients[weight].double(), expected, rtol=1e-5, atol=1e-5)
    # The change of the weights comes flat.
    coefficients, total = subspace.measure([(weight, change.flatten())])
    assert coefficients.item() == pytest.approx((basis @ change.double()).norm().item(), rel=1e-5)
    assert total.item() == pytest.approx(change.double().square().sum().item(), rel=1e-5)


def test_a_square_transposed_matrix_is_restored_as_one():
    from transformers.pytorch_utils import Conv1D

    model = Conv1D(8, 8)
    subspace, _ = compute(model, torch.randn(2, 8))
    tensors = subspace.tensors()
    restored = InputBasis(SETTINGS, ReplicatedEngine(model), model).restore(tensors.get, set(tensors))
    assert [item.transposed for item in restored.protected] == [item.transposed for item in subspace.protected]


def test_a_basis_is_read_without_waiting_for_other_processes():
    """One of them may have failed to read its copy."""

    class Absent(Processes):
        def union(self, items):
            raise AssertionError("waits for processes that may not come")

    model = torch.nn.Linear(8, 8)
    tensors = compute(model, torch.randn(2, 8))[0].tensors()
    engine = ReplicatedEngine(model)
    engine.processes = Absent(shard_group=object())
    restored = InputBasis(SETTINGS, engine, model).restore(tensors.get, set(tensors))
    assert restored.rank == 2


def test_a_transposed_matrix_that_processes_share_is_refused():
    from transformers.pytorch_utils import Conv1D

    model = Conv1D(8, 8)
    engine = ReplicatedEngine(model)
    engine.processes = Processes(shard_group=object())
    with pytest.raises(ValueError, match="`ogpsa_scope` is 'inputs'.*Conv1D.*allowed: another scope"):
        InputBasis(SETTINGS, engine, model)


def test_inputs_shared_in_some_passes_only_are_put_together():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.always = torch.nn.Linear(8, 8, bias=False)
            self.sometimes = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.always(x) + (self.sometimes(x) if x[0, 0] > 0 else 0)

    torch.manual_seed(0)
    model, inputs = Experts(), torch.eye(8)[:3] * torch.tensor([1.0, 2.0, 3.0])[:, None]
    inputs[1:, 0] = -0.001
    subspace, _ = compute(model, inputs)
    ranks = {name: len(item.basis) for name, item in zip(subspace.names, subspace.protected, strict=True)}
    assert ranks == {"always.weight": 3, "sometimes.weight": 1}


@pytest.mark.parametrize("lora", [False, True])
def test_an_expert_that_no_token_reaches_is_not_covered(lora):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return torch.cat([self.used(x), self.idle(x[:0])])

    torch.manual_seed(0)
    model, inputs = Experts(), torch.randn(2, 8)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["used", "idle"], r=4))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    subspace, _ = compute(model, inputs)
    covered = dict(zip(subspace.names, subspace.find_covered(), strict=True))
    assert len(covered) == (4 if lora else 2)
    assert all(has == ("used" in name) for name, has in covered.items())
    changed = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
    assert len(changed) == lora
    assert all("used.lora_A" in name for name in changed)


def test_gradients_whose_last_tensor_is_untouched_make_a_subspace():
    gradients = [{"touched": torch.randn(3, 4), "untouched": None}]
    subspace = Subspace.from_gradients(gradients, scope="inputs", rank=1)
    assert subspace.names == ("touched",)
    assert isinstance(subspace, InputSubspace)
    assert isinstance(subspace.protected[0], Protected)
