"""What the processes of test_shards.py do: FSDP2 on a gloo mesh, against the same model whole."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamafactory_ogpsa.engines import make_engine
from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.geometry import assign_groups, orthonormalise_
from llamafactory_ogpsa.inputs.record import Recorder, find_modules
from llamafactory_ogpsa.reference import ReferencePasses, ReferenceSet
from llamafactory_ogpsa.run.refresh_inputs import InputBasis
from llamafactory_ogpsa.subspace import Subspace


def start(work, *arguments):
    """Join the processes and work."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work(*arguments)
    dist.barrier()  # none leaves while another is still in its last collective
    dist.destroy_process_group()


class Loss:
    """A quadratic loss, averaged over samples of different weight."""

    def __init__(self, model):
        self.model = model

    def weigh(self, samples):
        return float(sum(sample["tokens"] for sample in samples))

    def __call__(self, batch, weight, total):
        errors = (self.model(batch["x"]) - batch["y"]).square().sum(-1)
        return (errors * batch["tokens"]).sum() * (weight / batch["tokens"].sum()) / total


def collate(samples):
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def make_set(name, count, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    samples = [dict(x=draw(7), y=draw(1), tokens=torch.tensor(1.0 + i % 4)) for i in range(count)]
    return ReferenceSet(name, samples, collate, None)


def reference_gradients(sets, indices, parts, batch_size, model, engine, rows):
    """Compute the reference gradients of sets under `Loss` into rows; return the losses."""
    sets = [replace(reference, loss=Loss(model)) for reference in sets]
    return ReferencePasses(sets, indices, batch_size, engine, parts).gradients_into(rows)


def make_models(mesh_shape=None):
    """Make a model of odd sizes (its last bias has one element: most processes hold none of it), whole and sharded."""
    torch.manual_seed(3)
    whole = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 1))
    whole[0].bias.requires_grad_(False)
    sharded = copy.deepcopy(whole)
    names = None if mesh_shape is None else ("replicate", "shard")
    mesh = init_device_mesh("cpu", mesh_shape or (dist.get_world_size(),), mesh_dim_names=names)
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    return whole, sharded


def build(engine, model, scope, rank=None, parts=1, sets=None):
    """Make the subspace of an engine's model; return it with the reference losses."""
    sets = sets or [make_set("a", 11, 1), make_set("b", 5, 2)]
    rows = [torch.full((len(sets) * parts, size), 7.0) for size in engine.sizes]
    indices = [list(range(len(reference.samples))) for reference in sets]
    losses = reference_gradients(sets, indices, parts, 3, model, engine, rows)
    groups = assign_groups(len(engine.names), scope)
    basis, geometry = orthonormalise_(rows, groups, rank, engine.device, parts, engine.processes)
    return Subspace(engine.names, basis, geometry, groups, engine.device, engine.processes), losses


def accumulate_safety(model, average_over=1):
    """Leave a safety gradient, of a loss that every process has whole, in a model."""
    safety = make_set("safety", 6, 9)
    batch = collate(safety.samples)
    Loss(model)(batch, 1.0, 1.0).backward()


def gather(model):
    return {
        name: param.grad.full_tensor() if hasattr(param.grad, "full_tensor") else param.grad
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def project_like_the_whole(scope, method, parts, mesh_shape):
    whole, sharded = make_models(mesh_shape)
    engines = ReplicatedEngine(whole), make_engine(sharded, sharded, torch.device("cpu"))
    assert engines[1].num_parameters == sum(engines[0].sizes)
    assert sum(engines[1].sizes) < engines[1].num_parameters
    figures = []
    for engine, model in zip(engines, (whole, sharded)):
        subspace, losses = build(engine, model, scope, parts=parts)
        assert all(gradient is None for gradient in engine.gradients())
        accumulate_safety(model)
        stats = subspace.projection(method)(engine.gradients(), 0.5, measure=True)
        figures.append([stats.removed, stats.norm, *stats.cosines, *losses.values()])
        if method == "orthogonal":
            assert stats.residual <= 1e-5
    torch.testing.assert_close(torch.tensor(figures[1]), torch.tensor(figures[0]), rtol=1e-5, atol=1e-6)
    expected = gather(whole)
    for name, gradient in gather(sharded).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """Measures the largest tensor that an operation made, in elements."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, leaf.numel())
        return result


def count_what_a_step_costs(scope, method):
    _, sharded = make_models()
    engine = make_engine(sharded, sharded, torch.device("cpu"))
    subspace, _ = build(engine, sharded, scope)
    projection = subspace.projection(method)
    accumulate_safety(sharded)
    calls = []
    collectives = [
        "all_reduce",
        "broadcast",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "reduce",
    ]
    stock = {name: getattr(dist, name) for name in collectives}
    for name in collectives:

        def counted(tensor, *args, call=name, **kwargs):
            calls.append((call, tensor.numel() * tensor.itemsize))
            return stock[call](tensor, *args, **kwargs)

        setattr(dist, name, counted)
    try:
        with Largest() as largest:
            projection(engine.gradients(), 1.0, measure=False)
    finally:
        for name in collectives:
            setattr(dist, name, stock[name])
    groups = len(subspace.geometry.ranks)
    assert calls == [("all_reduce", 4 * (subspace.rank + 1) * groups)]
    assert largest.numel <= sum(engine.sizes)


def disagree():
    """One process has a gradient that is not finite: nothing is projected anywhere, and nobody waits."""
    _, sharded = make_models()
    engine = make_engine(sharded, sharded, torch.device("cpu"))
    subspace, _ = build(engine, sharded, "parameter")
    accumulate_safety(sharded)
    if dist.get_rank() == 1:
        engine.gradients()[0].view(-1)[0] = float("inf")
    before = [gradient.clone() for gradient in engine.gradients()]
    for method in ("orthogonal", "conflict"):
        stats = subspace.projection(method)(engine.gradients(), None, measure=True)
        assert not stats.finite
        for gradient, copy_ in zip(engine.gradients(), before):
            assert torch.equal(gradient, copy_)


def drop_the_same_batches():
    """A reference sample of one process gives no finite loss: all leave out the batches of that moment."""
    whole, sharded = make_models()
    engine = make_engine(sharded, sharded, torch.device("cpu"))
    broken = make_set("a", 8, 1)
    broken.samples[2]["y"][0] = float("nan")  # with two processes: the second batch of the first one, size one
    rows = [torch.empty(1, size) for size in engine.sizes]
    losses = reference_gradients([broken], [list(range(8))], 1, 1, sharded, engine, rows)

    kept = replace(broken, samples=[sample for i, sample in enumerate(broken.samples) if i not in (2, 3)])
    other = ReplicatedEngine(whole)
    expected = [torch.empty(1, size) for size in other.sizes]
    expected_losses = reference_gradients([kept], [list(range(6))], 1, 6, whole, other, expected)
    assert abs(losses["a"] / expected_losses["a"] - 1) < 1e-5


def refuse_what_is_not_sharded():
    whole, sharded = make_models()
    sharded.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="cannot train extra under FSDP"):
        make_engine(sharded, sharded, torch.device("cpu"))


def record_one_sample():
    """Compare the bases of one sample, which the second process has none of, with those of one process alone."""
    whole, sharded = make_models()
    subspaces = [make_input_basis(model, make_set("a", 1, 1)) for model in (whole, sharded)]
    for one, other in zip(*(subspace.protected for subspace in subspaces), strict=True):
        assert one.frozen == other.frozen
        if one.basis is not None:
            torch.testing.assert_close(other.basis.abs(), one.basis.abs(), rtol=1e-5, atol=1e-5)
    assert subspaces[1].rank == 1


def make_input_basis(model, reference):
    engine = make_engine(model, model, torch.device("cpu"))
    settings = SimpleNamespace(rank=3, kernel="torch", method="orthogonal")
    indices = [list(range(len(reference.samples)))]
    passes = ReferencePasses([replace(reference, loss=Loss(model))], indices, 3, engine)
    return InputBasis(settings, engine, model).compute(passes)[0]


class Tokens(torch.nn.Module):
    """An embedding and a head of the root, which FSDP2 leaves gathered after a forward pass, around a layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = torch.nn.Embedding(8, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 8)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)))


def record_what_is_gathered(reshard):
    """Record after a forward pass without a backward pass, as the check for noise and an evaluation make them."""
    torch.manual_seed(3)
    model = Tokens()
    for module in (model.layer, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=reshard)
    engine = make_engine(model, model, torch.device("cpu"))
    modules, ids = find_modules(engine, model), torch.tensor([[1, 2, 5]])
    recorder = Recorder(modules, 1)
    with torch.no_grad():
        model(ids)
    with torch.no_grad(), recorder.recording(model):
        recorder.begin_batch({}, 1)
        before = model(ids)
        recorder.end_batch(finite=True)
    names = {engine.names[index] for indices in recorder.shared for index in indices}
    assert names == {"layer.weight", "head.weight"}
    assert [engine.names[index] for index in recorder.tokens] == ["embedding.weight"]

    engine.edit([engine.names.index("head.weight")], lambda index, rows: rows.mul_(2))
    bias = model.head.bias.full_tensor()
    torch.testing.assert_close(model(ids) - bias, 2 * (before - bias))
