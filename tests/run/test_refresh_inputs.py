"""What scope `inputs` records of a forward pass, and what it refuses to train."""

import math
from types import SimpleNamespace

import pytest
import torch

from llamafactory_ogpsa import Subspace
from llamafactory_ogpsa.engines import Processes
from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.inputs import InputSubspace, Protected
from llamafactory_ogpsa.inputs.record import FEWEST_TOKENS, ROWS, Recorder, find_modules
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


def compute(model, inputs, processes=None, basis=None):
    """Make bases from inputs `[samples, in]`, in batches of one; return the subspace and the losses."""
    engine = ReplicatedEngine(model)
    engine.processes = processes or engine.processes
    collate = lambda samples: {"x": torch.stack([sample["x"] for sample in samples])}
    reference = ReferenceSet("set", [{"x": row} for row in inputs], collate, Loss(model))
    basis = basis or InputBasis(SETTINGS, engine, model)
    return basis.compute(ReferencePasses([reference], [list(range(len(inputs)))], 1, engine))


def record(model, batch, count, *inputs, **kwargs):
    """Record one forward pass."""
    recorder = Recorder(find_modules(ReplicatedEngine(model), model), count)
    with recorder.recording(model):
        recorder.begin_batch(batch, count)
        model(*inputs, **kwargs)
        recorder.end_batch(finite=True)
    return recorder


def test_inputs_that_are_cast_for_each_module_are_kept_once():
    """As PEFT casts them for adapters in float32 on a model in bfloat16."""

    class Cast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.down = (torch.nn.Linear(8, n, bias=False) for n in (8, 4, 8))

        def forward(self, x):
            return self.query(x.float()).sum() + self.key(x.float()).sum() + self.down(2 * x.float()).sum()

    inputs = torch.randn(3, 8).bfloat16()
    recorder = record(Cast(), {}, 3, inputs)
    assert sorted(recorder.shared) == [(0, 1), (2,)]
    assert (
        record(Cast(), {}, 3, inputs.float() / 3).rows((0, 1), 8).dtype == torch.float32
    )  # bfloat16 would lose digits
    torch.testing.assert_close(recorder.rows((0, 1), 8), inputs)  # in bfloat16, which takes half of the memory


def test_rows_that_are_not_finite_are_left_out():
    inputs = torch.randn(3, 8)
    inputs[1, 2] = math.inf
    rows = record(torch.nn.Linear(8, 8, bias=False), {}, 3, inputs).rows((0,), 8)
    torch.testing.assert_close(rows, inputs[::2])


def test_a_pass_of_another_batch_is_not_recorded():
    """KTO's loss runs the prompts with answers of other prompts too."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9, bias=False)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    model, ids = Model(), torch.tensor([[1, 2, 3]])
    recorder = Recorder(find_modules(ReplicatedEngine(model), model), 1)
    with recorder.recording(model):
        recorder.begin_batch({"input_ids": ids, "kl_input_ids": ids + 3}, 1)
        model(input_ids=ids)
        model(input_ids=ids + 3)
        model(input_ids=ids[:, :2])
        recorder.end_batch(finite=True)
    assert recorder.tokens[0].nonzero().flatten().tolist() == [1, 2, 3]
    torch.testing.assert_close(recorder.rows((1,), 8), model.embed.weight[1:4].detach())


class TopKRouter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight)


def test_a_router_is_recorded():
    inputs = torch.randn(3, 8)
    torch.testing.assert_close(record(torch.nn.Sequential(TopKRouter()), {}, 3, inputs).rows((0,), 8), inputs)


def test_a_router_that_zero_has_split_is_found():
    router = TopKRouter()
    router.weight.ds_shape, router.weight.data = router.weight.shape, torch.empty(0)
    engine = SimpleNamespace(parameters=[router.weight])
    assert find_modules(engine, router) == [(router, 0)]


def test_padding_is_left_out_under_the_mask_of_neat_packing():
    """As LLaMA-Factory's collator makes it: `[sequences, 1, length, length]`, 0 where a token sees another."""
    from llamafactory.data.collator import prepare_4d_attention_mask

    mask = prepare_4d_attention_mask(torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]), torch.float32)
    inputs = torch.randn(2, 6, 8)
    rows = record(torch.nn.Linear(8, 8, bias=False), {"attention_mask": mask}, 2, inputs).rows((0,), 8)
    torch.testing.assert_close(rows, torch.cat([inputs[0, :5], inputs[1, :2]]))


def test_an_adapter_of_dora_is_refused():
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, use_dora=True))
    with pytest.raises(ValueError, match="uses DoRA.*allowed with `ogpsa_scope: inputs`: an adapter without"):
        InputBasis(SETTINGS, ReplicatedEngine(model), model)


def test_an_embedding_may_be_all_that_is_trained():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8).requires_grad_(False))
    subspace, _ = compute(model, torch.tensor([[1, 2], [2, 3]]))
    assert subspace.protected[0].tokens.nonzero().flatten().tolist() == [1, 2, 3]


class Fused(torch.nn.Module):
    """Multiplies by its head's weight without calling the head, as a fused loss does."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.head = torch.nn.Sequential(*layers), torch.nn.Linear(8, 9, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.layers(x) @ self.head.weight.T


@pytest.mark.parametrize("layers", [[torch.nn.Linear(8, 8)], []])
def test_a_head_whose_inputs_are_hidden_stops_the_run(layers):
    with pytest.raises(RuntimeError, match="no input of the output head was seen.*enable_liger_kernel.*Allowed: "):
        compute(Fused(layers), torch.randn(2, 8))


def test_a_run_none_of_whose_matrices_is_seen_stops():
    model = Fused([])
    model.get_output_embeddings = lambda: None
    with pytest.raises(RuntimeError, match="no input of any trained weight matrix was seen"):
        compute(model, torch.randn(2, 8))


def test_processes_that_find_fewer_or_more_directions_take_those_of_the_first():
    class Second(Processes):
        """Stands for a process whose first one has found two directions."""

        def agree(self, numbers):
            return torch.tensor(2) if numbers.dim() == 0 else torch.eye(8)[: len(numbers)]

    for own in (1, 3):
        subspace, _ = compute(torch.nn.Linear(8, 8, bias=False), torch.eye(8)[2 : 2 + own], Second())
        torch.testing.assert_close(subspace.protected[0].basis, torch.eye(8)[:2])


@pytest.mark.parametrize("method", ["orthogonal", "monitor"])
def test_monitor_counts_b_as_unreached_and_leaves_a(method):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2))
    engine = ReplicatedEngine(model)
    before = [param.detach().clone() for param in engine.parameters]
    basis = InputBasis(SimpleNamespace(**{**vars(SETTINGS), "method": method}), engine, model)
    subspace, _ = compute(model, torch.eye(8)[:2], basis=basis)
    unreached = [name for name, item in zip(subspace.names, subspace.protected, strict=True) if item.unreached]
    assert ["lora_B" in name for name in unreached] == [True]
    changed = [not torch.equal(old, new) for old, new in zip(before, engine.parameters, strict=True)]
    assert any(changed) == (method == "orthogonal")
    assert basis.made_by()["ogpsa_method"] == method


@pytest.mark.parametrize(("samples", "tokens"), [(2, 60), (ROWS // 32, 32), (ROWS, FEWEST_TOKENS), (0, 60)])
def test_few_samples_give_more_of_their_tokens_and_many_still_enough(samples, tokens):
    model = torch.nn.Linear(8, 4)
    engine = ReplicatedEngine(model)
    recorder = Recorder(find_modules(engine, model), samples)
    inputs, labels = torch.randn(1, 60, 8), torch.full((1, 60), -100)
    labels[0, 41:] = 1
    with recorder.recording(model):
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
