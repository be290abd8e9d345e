"""Run LLaMA-Factory with values that are not finite in the last process alone.

NaN in a reference loss of the second refresh, and inf in the safety gradient of step 4.
"""

import os

from conftest import run_here
from transformers import TrainerCallback


class Poison(TrainerCallback):
    step = -1

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        next(model.parameters()).register_hook(lambda gradient: gradient + (float("inf") if self.step == 3 else 0.0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def train(args):
    from llamafactory_ogpsa.plugin.trainer import StageLoss

    poison, stock, number = Poison(), StageLoss.__call__, 0

    def spoiled(self, batch, weight, total):
        nonlocal number
        number += poison.step == 2
        return stock(self, batch, weight, total) * (float("nan") if poison.step == 2 and number == 2 else 1.0)

    callbacks = []
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        StageLoss.__call__, callbacks = spoiled, [poison]
    run_here(args, callbacks=callbacks)
