"""The rule for optimizers: an allowed one is handed the projected gradient, whatever it then makes of it."""

from importlib.util import find_spec

import oracle
import pytest
import torch
from conftest import OGPSA, run_here
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback


# The optimizers of the table in docs/optimizers.md that can run here, with the package that each needs.
ALLOWED = {
    "sgd": ({"optim": "sgd"}, "torch"),
    "adamw": ({"optim": "adamw_torch"}, "torch"),
    "adafactor": ({"optim": "adafactor"}, "torch"),
    "muon": ({"use_muon": True}, "torch"),
    "adam-mini": ({"use_adam_mini": True}, "adam_mini"),
    "galore": ({"optim": "adamw_torch", "use_galore": True, "galore_rank": 4}, "galore_torch"),
    "apollo": ({"optim": "adamw_torch", "use_apollo": True, "apollo_rank": 4}, "apollo_torch"),
    "8-bit": ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
}


class Handed(TrainerCallback):
    """Remembers the gradients with which the optimizer's first step begins, by parameter name."""

    def __init__(self):
        self.gradients = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.names = {id(param): name for name, param in model.named_parameters()}

    def look(self, optimizer, *_):
        for group in optimizer.param_groups:
            for param in group["params"]:
                self.gradients.setdefault(self.names[id(param)], param.grad.double().flatten())


@pytest.fixture
def one_step(base_args):
    return {
        **base_args,
        **OGPSA,
        "max_samples": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "pure_bf16": False,
    }


@pytest.mark.parametrize("name", ALLOWED)
def test_an_allowed_optimizer_is_handed_the_projected_gradient(one_step, name):
    options, package = ALLOWED[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    handed = Handed()
    hook = register_optimizer_step_pre_hook(handed.look)
    try:
        run_here({**one_step, **options}, callbacks=[handed])
    finally:
        hook.remove()

    expected, _ = oracle.projected_gradient(one_step, "sft", "parameter", 2)
    assert handed.gradients.keys() == expected.keys()
    error = torch.cat([handed.gradients[key] - expected[key] for key in expected]).norm()
    assert error / torch.cat(list(expected.values())).norm() <= 1e-4
