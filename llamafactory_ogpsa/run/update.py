r"""What an optimizer step did to the reference losses, to first order.

The projection makes the gradient orthogonal to the reference gradients. The optimizer's step need not be: SGD without
momentum and weight decay steps along the gradient, AdamW divides it by a running root mean square, adds earlier
gradients, and decays the weights. For the change of the weights `ΔW` in one step this module measures

- `update_share`, `‖U Uᵀ ΔW‖ / ‖ΔW‖`: the share of the change that lies in the protected subspace;
- `update_cosine`, `⟨ΔW, r_d⟩ / (‖ΔW‖ ‖r_d‖)` for each reference set `d`;
- `update_loss_change`, `⟨ΔW, r_d⟩`: what the change does to the reference loss, to first order.

`ΔW` comes from a copy of the weights if few are trainable, else from Adam's state, tensor by tensor, without a copy of
the whole model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..engines import Engine, Weight
from ..geometry import ratio


# The most trainable elements of a process that are copied: 256 MiB in float32.
MOST_COPIED = 1 << 26

# Optimizers whose step follows from `exp_avg` and `exp_avg_sq`, by package and class, with the attribute that says
# whether weight decay is decoupled (True if it always is). bitsandbytes and GaLore have an AdamW with another state.
_ADAMS = {
    ("torch", "AdamW"): True,
    ("torch", "Adam"): "decoupled_weight_decay",
    ("apex", "FusedAdam"): "adam_w_mode",
    ("deepspeed", "FusedAdam"): "adam_w_mode",
    ("deepspeed", "DeepSpeedCPUAdam"): "adam_w_mode",
}

# Yields the index of a tensor and the change of its weights, float32 `[size]`.
Changes = Iterator[tuple[int, torch.Tensor]]


def make_change_reader(engine: Engine, optimizer: torch.optim.Optimizer) -> Callable[[], Changes] | None:
    """Prepare to read the change that the next optimizer step makes; every process calls it, before the step.

    `optimizer` is without wrappers.

    Returns:
        a function to call after the step; None if many weights are trainable and the optimizer's state does not say
        what its step was, so that the change cannot be read.
    """
    weights = {
        index: weight for index, weight in enumerate(engine.weights()) if weight is not None and weight.size > 0
    }
    elements = sum(weight.size for weight in weights.values())
    if engine.processes.totals([elements])[0] <= MOST_COPIED * engine.processes.size:
        before = {index: weight.part_of(weight.optimized).clone() for index, weight in weights.items()}
        return lambda: _differences(weights, before)

    kind = type(optimizer)
    decoupled = _ADAMS.get((kind.__module__.partition(".")[0], kind.__name__))
    if isinstance(decoupled, str):
        groups = optimizer.param_groups
        decoupled = getattr(optimizer, decoupled, None) or any(group.get(decoupled) for group in groups)
    if decoupled is None or any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups):
        return None

    # A parameter without a gradient is not stepped, whatever its state from earlier steps; ZeRO steps whole partitions.
    weights = {
        index: weight
        for index, weight in weights.items()
        if weight.group is not None or weight.optimized.grad is not None
    }
    settings = {index: dict(_group_of(weight, optimizer)) for index, weight in weights.items()}
    return lambda: _adam_changes(weights, settings, optimizer.state, bool(decoupled))


def _differences(weights: dict[int, Weight], before: dict[int, torch.Tensor]) -> Changes:
    for index, weight in weights.items():
        yield index, weight.part_of(weight.optimized).float() - before[index].float()


def _group_of(weight: Weight, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's parameter group that steps a weight."""
    groups = optimizer.param_groups
    if weight.group is not None:
        return groups[weight.group]
    return next(group for group in groups if any(param is weight.optimized for param in group["params"]))


def _adam_changes(
    weights: dict[int, Weight], settings: dict[int, dict[str, Any]], state: dict, decoupled: bool
) -> Changes:
    r"""Yield the changes of a step of Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019).

    With `m`, `v` the state after the step, bias-corrected, `W` the weights after it, and `η`, `λ`, `ε` those of the
    step: `ΔW = −η m / (√v + ε) − η λ W₀`, where `W₀ = (W + η m / (√v + ε)) / (1 − η λ)` are the weights before it and
    the last term is there with decoupled decay only.
    """
    for index, weight in weights.items():
        group, moments = settings[index], state.get(weight.optimized)
        if not moments:
            continue

        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        steps = float(moments["step"] if "step" in moments else group["step"])
        corrected = group.get("bias_correction", True)
        first, second = (1 - beta1**steps, 1 - beta2**steps) if corrected else (1.0, 1.0)
        m = weight.part_of(moments["exp_avg"]).float()
        v = weight.part_of(moments["exp_avg_sq"]).float()
        change = m.mul(-rate / first).div_((v / second).sqrt_().add_(group["eps"]))
        decay = rate * group["weight_decay"] if decoupled else 0.0
        if decay:
            old = (weight.part_of(weight.optimized).float() - change) / (1 - decay)
            change.sub_(old, alpha=decay)
        yield index, change


def update_figures(subspace: Any, changes: Changes, names: list[str]) -> dict[str, Any]:
    """Measure a change of the weights; return the figures by their names in the log, all 0 for a change of zero."""
    coefficients, squared_norm = subspace.measure(changes)
    norm = squared_norm.sqrt()
    figures: dict[str, Any] = {"update_share": ratio(coefficients.square().sum().sqrt(), norm).item()}
    geometry = subspace.geometry
    if geometry is not None:
        overlaps = geometry.overlaps(coefficients)
        figures["update_cosine"] = dict(zip(names, ratio(overlaps, norm).tolist(), strict=True))
        figures["update_loss_change"] = dict(zip(names, (overlaps * geometry.norms).tolist(), strict=True))
    return figures
