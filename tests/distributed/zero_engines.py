"""What the processes of test_zero_engines.py do: DeepSpeed's ZeRO without a trainer, against the same model whole."""

import copy

import deepspeed
import torch
import torch.distributed as dist
from sharded import Loss, build, collate, make_set
from zero import zero_config

from llamafactory_ogpsa.engines import make_engine
from llamafactory_ogpsa.engines.replicated import ReplicatedEngine


CLIP = 0.5


class Net(torch.nn.Module):
    """A layer of it is reached by some samples of the second reference set alone."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(7, 13)
        self.head = torch.nn.Linear(13, 1)
        self.side = torch.nn.Linear(7, 5)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = x.to(self.body.weight.dtype)
        out = self.head(torch.tanh(self.body(x)))
        marked = x[:, :1] > 5
        return out + self.side(x).sum(-1, keepdim=True) * marked if marked.any() else out


def mark(reference, count):
    """Mark the first samples of a set."""
    for sample in reference.samples[:count]:
        sample["x"][0] = 6.0
    return reference


def make_optimizer(model):
    parameters = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.1}], lr=0.1)


def start_deepspeed(model, config, dtype):
    precision = {"float32": {}, "bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True}}}[dtype]
    if dtype == "float16":
        precision["fp16"] |= {"initial_scale_power": 12}
    batch = {"train_batch_size": dist.get_world_size(), "train_micro_batch_size_per_gpu": 1}
    config = {**config, **precision, **batch, "gradient_accumulation_steps": 1, "gradient_clipping": CLIP}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(model), config=config, dist_init_required=False
    )
    return engine


def figures_of(engine, loss, scope):
    """Project a safety gradient out of the subspace of two sets; return everything measured on the way."""
    # Of a process's two batches of the second set, the first reaches the whole model and the last does not.
    sets = [make_set("a", 11, 1), mark(make_set("b", 12, 2), 3 * dist.get_world_size())]
    subspace, losses = build(engine, loss.model, scope, sets=sets)
    safety = collate(make_set("safety", 6, 9).samples)
    with engine.reference_pass():
        engine.clear()
        engine.backward(loss(safety, 1.0, 1.0) / engine.processes.size, engine.loss_scale, last=True)
        engine.complete()
    engine.fill()
    stats = subspace.projection("orthogonal")(engine.gradients(), None, measure=True)
    assert stats.residual <= (2e-3 if engine.dtypes[0] == torch.float16 else 1e-5)
    norm = stats.norm / engine.loss_scale
    return torch.tensor([norm, stats.removed, *stats.cosines, *losses.values(), *subspace.geometry.shares.flatten()])


def measure_like_the_whole(stage, offload, dtype, scope, tolerance):
    torch.manual_seed(3)
    whole = Net()
    model = copy.deepcopy(whole)
    config = zero_config(stage, offload)
    if dtype == "bfloat16" and stage > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    started = start_deepspeed(model, config, dtype)
    engine = make_engine(model, started, torch.device("cpu"))
    loss = Loss(started)
    figures = figures_of(engine, loss, scope)
    expected = figures_of(ReplicatedEngine(whole), Loss(whole), scope)
    torch.testing.assert_close(figures, expected, rtol=tolerance, atol=tolerance)
    # Nothing of the first time is left: the second gives the same, and so does the optimizer's step after it.
    assert torch.equal(figures_of(engine, loss, scope), figures)
    engine.projected()
    scale = engine.loss_scale
    started.step()
    assert not getattr(started.optimizer, "overflow", False)
    assert engine.loss_scale == scale
    if dtype == "float32":
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), CLIP)
        assert norm > CLIP
        torch.testing.assert_close(torch.as_tensor(float(started.get_global_grad_norm())), norm, rtol=1e-4, atol=0)
        make_optimizer(whole).step()
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters(param, enabled=stage == 3):
                torch.testing.assert_close(param.detach(), whole.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
