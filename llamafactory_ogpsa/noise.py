"""Reference passes without noise: dropout and similar off, random state unchanged, a check that no noise is left."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch


# Parts of the names of attributes that hold the strength of a noise.
_NOISE = ("drop", "jitter", "neftune")
# Two passes over one batch may differ by this much, relatively: kernels on accelerators may add in different orders.
_TOLERANCE = 1e-3


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random state of Python, NumPy, PyTorch and `device` as it was."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def without_noise(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in training mode with every dropout, jitter and NEFTune noise at zero; undone at the end.

    Not evaluation mode: gradient checkpointing works in training mode only, and mixture-of-experts models may route
    evaluation through code that gives no gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for module, _ in modes if (config := getattr(module, "config", None)) is not None}
    saved = []
    for owner in [module for module, _ in modes] + list(configs.values()):
        named_dropout = "drop" in type(owner).__name__.lower()
        for name, value in list(vars(owner).items()):
            noisy = any(word in name for word in _NOISE) or (name == "p" and named_dropout)
            # A strength may be an integer (`neftune_noise_alpha: 5`); a switch is not a strength.
            if noisy and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                saved.append((owner, name, value))
    try:
        model.train()
        for owner, name, _ in saved:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_repeatable(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], totals: Callable[[list[float]], list[float]]
) -> None:
    """Check that two passes over one batch give the same loss.

    Args:
        model: the model, inside `without_noise`.
        loss: runs one pass and returns its loss, a scalar; every process calls it equally often.
        totals: sums numbers over all processes.

    Raises:
        RuntimeError: the losses differ; names the first module whose output differs while its inputs do not.
    """
    first, second = float(loss()), float(loss())
    differs = abs(first - second) > _TOLERANCE * max(abs(first), abs(second))
    if not totals([float(differs)])[0]:
        return

    source = _find_noise(model, loss)
    raise RuntimeError(
        f"two reference passes over one batch gave the losses {first:.6g} and {second:.6g}: a random part of the model "
        f"stays on in reference passes ({source}), so the reference gradients would be wrong. Turn it off for the run."
    )


def _find_noise(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> str:
    """Name the first module, innermost first, whose outputs differ between two passes while its inputs do not."""
    records: list[list[tuple[str, float, float]]] = []

    def record(name, module, args, kwargs, output):
        records[-1].append((name, _sum([args, kwargs]), _sum(output)))

    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(partial(record, name), with_kwargs=True) for name, module in modules]
    try:
        for _ in range(2):
            records.append([])
            loss()
    finally:
        for hook in hooks:
            hook.remove()
    for (name, given, made), (_, given_again, made_again) in zip(*records, strict=False):
        if given == given_again and made != made_again:
            return f"first seen in {name}, {type(model.get_submodule(name)).__name__}"
    return "in no single module"


def _sum(value: object) -> float:
    """Return a number that differs if any floating tensor in a nested value differs."""
    if isinstance(value, torch.Tensor):
        return value.double().sum().item() if value.is_floating_point() else 0.0
    if isinstance(value, dict):
        return sum(map(_sum, value.values()))
    return sum(map(_sum, value)) if isinstance(value, (list, tuple)) else 0.0
