"""Which optimizers OGPSA trains with.

The rule: an optimizer is allowed if it takes one complete, accumulated gradient per tensor when it steps. What it then
does with it (momentum, preconditioning, a low-rank or orthogonalised update, 8-bit state) is not guaranteed to keep
the reference losses; the log's `update_cosine` measures it. An optimizer is refused if OGPSA never has the complete
gradient before the optimizer uses it: it steps inside the backward pass, trains a part of the parameters at a time, or
makes its update from something other than the one reduced gradient.

Allowed by the rule, so without an entry here: SGD, AdamW and its 8-bit, paged and fused forms, Adafactor, Lion,
Adam-mini (`use_adam_mini`), Muon (`use_muon`), GaLore and APOLLO that are not layer-wise, LoRA+.

Every refusal is a ValueError that names the option, its value and what is allowed.
"""

from typing import Any


# LLaMA-Factory's switches that choose a refused optimizer or trainer, with the reason.
_SWITCHES = {
    "use_hyper_parallel": "the HyperParallel backend has a trainer of its own",
    "use_badam": "BAdam trains a part of the parameters at a time",
    "galore_layerwise": "layer-wise GaLore steps inside the backward pass",
    "apollo_layerwise": "layer-wise APOLLO steps inside the backward pass",
}

# Optimizers of a DeepSpeed configuration, in lower case. The 1-bit ones exchange compressed momenta instead of
# gradients. Muon turns the gradient into its update at the end of the backward pass: in DeepSpeed 0.19.6 and 0.19.8 in
# stages 1 and 2 without offload, in 0.19.6 also in stage 3. Elsewhere it does so inside the step, which the rule would
# allow; it is refused there too, so that the answer does not change with the version.
_DEEPSPEED = ("muon", "onebitadam", "onebitlamb", "zerooneadam")


def refuse_switches(finetuning_args: Any) -> None:
    """Refuse the optimizers, and the one trainer, that LLaMA-Factory's own switches choose.

    Raises:
        ValueError: names the option, its value, and what is allowed.
    """
    for name, reason in _SWITCHES.items():
        if getattr(finetuning_args, name, False):
            raise ValueError(f"`{name}` is True, which OGPSA does not support ({reason}); allowed: False.")


def refuse_optim(optim: str) -> None:
    """Refuse the optimizers that the Trainer's `optim` (e.g. `adamw_torch`) chooses.

    Raises:
        ValueError: see `refuse_switches`.
    """
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(
            f"`optim` is {optim!r}, which steps inside the backward pass, where OGPSA has no gradient to project; "
            "allowed: any other optimizer."
        )


def refuse_deepspeed_optimizer(config: dict[str, Any]) -> None:
    """Refuse the optimizers that a DeepSpeed configuration chooses.

    Raises:
        ValueError: see `refuse_switches`.
    """
    optimizer = str((config.get("optimizer") or {}).get("type", "")).lower()
    if optimizer in _DEEPSPEED:
        raise ValueError(
            f"`optimizer.type` of `deepspeed` is {optimizer!r}, whose update is not made of one reduced gradient, "
            "which OGPSA projects; allowed: any other optimizer."
        )
