"""A training step of a model with random weights, with OGPSA and without, and what a refresh adds."""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from llamafactory_ogpsa import Subspace
from llamafactory_ogpsa.engines.replicated import ReplicatedEngine
from llamafactory_ogpsa.run.refresh_inputs import InputBasis

from .. import models
from ..devices import counters
from ..memory import basis_bytes
from ..timing import clear_memory, measure


MAX_NORM = 1.0
REFERENCE_SETS = 2
# Batches of each reference set in a refresh.
REFERENCE_BATCHES = 2


def measure_step(
    training: str,
    checkpointing: bool,
    scope: str,
    *,
    device: torch.device,
    batch: int,
    length: int,
    repeats: int,
) -> dict[str, float]:
    """Measure stock and OGPSA steps, in turn on the same model: AdamW, one batch of random tokens a step, clipping.

    Full training is in pure bfloat16; with LoRA the frozen weights are bfloat16 and the adapter's float32, under
    autocast, as LLaMA-Factory has them.

    Args:
        training: the model and its tuning, such as "Qwen2.5-0.5B LoRA r=8".
        checkpointing: gradient checkpointing.
        scope: of the subspace.
        device: where all of it lies.
        batch: samples of a step, and of a reference batch.
        length: tokens of a sample.
        repeats: how often each step is timed.

    Returns:
        `stock_step`, `ogpsa_step`, `training_sample` (forward and backward), `reference_sample` (the same, with the
        copy of the gradients; with scope `inputs` forward alone) and `basis` (its making) in seconds; `stock_peak`, `ogpsa_peak` (of a step without
        refresh) and `basis_bytes`, the basis by the formula, in bytes.
    """
    name, lora_rank = models.split(training)
    torch.manual_seed(0)
    model = models.build(name, device, torch.bfloat16, lora_rank).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-6, fused=True)
    tokens = torch.randint(0, models.CONFIGS[name].vocab_size, (batch, length), device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=lora_rank is not None):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def backward() -> None:
        forward().backward()

    def update(clip: Callable[[], object]) -> None:
        backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()

    def stock() -> None:
        update(lambda: torch.nn.utils.clip_grad_norm_(trainable.values(), MAX_NORM, foreach=True))

    def reference_gradient() -> dict[str, torch.Tensor]:
        for _ in range(REFERENCE_BATCHES):
            backward()
        gradient = {name: param.grad for name, param in trainable.items()}
        optimizer.zero_grad()
        return gradient

    def passes() -> None:
        backward()
        optimizer.zero_grad()

    stock()  # makes the optimizer's state
    stock_peak = peak(stock, device)
    references: list[dict[str, torch.Tensor]] = []
    subspaces: list[Subspace] = []

    # The old ones go first: both together need not fit the memory.
    def reference_passes() -> None:
        references.clear()
        references.extend(reference_gradient() for _ in range(REFERENCE_SETS))

    def make_basis() -> None:
        subspaces.clear()
        subspaces.append(Subspace.from_gradients(references, scope=scope))

    inputs: dict[str, Callable[[], object]] = {}
    if scope == "inputs":
        engine = ReplicatedEngine(model)
        settings = SimpleNamespace(rank=None, kernel="auto", method="orthogonal", scope=scope)
        maker, recorded = InputBasis(settings, engine, model), _ForwardPasses(forward, tokens)

        def compute() -> None:
            subspaces.clear()
            subspaces.append(maker.compute(recorded)[0])

        inputs = {"reference": lambda: recorded.run_forward(lambda *_: None, lambda _: None), "basis": compute}
        formula = maker.num_bytes
    else:
        element = next(iter(trainable.values())).itemsize
        formula = basis_bytes(sum(p.numel() for p in trainable.values()), element, directions=REFERENCE_SETS)

    refreshing = {"training": passes, "reference": reference_passes, "basis": make_basis} | inputs
    refresh_times = measure(refreshing, device, repeats)
    making = refresh_times["basis"].seconds - (refresh_times["reference"].seconds if inputs else 0)
    references.clear()
    subspace = subspaces.pop()
    project = subspace.projection()

    def ogpsa() -> None:
        update(lambda: project([trainable[name].grad for name in subspace.names], max_norm=MAX_NORM))

    ogpsa()
    ogpsa_peak = peak(ogpsa, device)
    times = measure({"stock": stock, "ogpsa": ogpsa}, device, repeats)
    return {
        "stock_step": times["stock"].seconds,
        "ogpsa_step": times["ogpsa"].seconds,
        "training_sample": refresh_times["training"].seconds / batch,
        "reference_sample": refresh_times["reference"].seconds / (REFERENCE_SETS * REFERENCE_BATCHES * batch),
        "basis": making,
        "stock_peak": stock_peak,
        "ogpsa_peak": ogpsa_peak,
        "basis_bytes": formula,
    }


class _ForwardPasses:
    """The reference passes of scope `inputs`, over the same batch each time."""

    def __init__(self, forward: Callable[[], torch.Tensor], tokens: torch.Tensor) -> None:
        self._forward, self._tokens = forward, tokens
        self._batches = REFERENCE_SETS * REFERENCE_BATCHES
        self.indices = [range(REFERENCE_BATCHES * len(tokens))] * REFERENCE_SETS

    @torch.no_grad()
    def run_forward(self, begin_batch: Callable, end_batch: Callable) -> dict[str, float]:
        """Run them; see `ReferencePasses.run_forward`."""
        for _ in range(self._batches):
            begin_batch({"attention_mask": torch.ones_like(self._tokens)}, len(self._tokens))
            self._forward()
            end_batch(True)
        return {}


def peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes in use during one call, all that lies there counted."""
    clear_memory(device)
    step()
    counters(device).synchronize(device)
    return counters(device).max_memory_allocated(device)
