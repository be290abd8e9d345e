"""The seams `llamafactory.v1.trainers.<stage>_trainer`: OGPSA as a callback of LLaMA-Factory's next trainer.

Experimental, see docs/v1.md. What it uses is public in v1 and in torch: the trainer's `callbacks`, `renderer` and
`compute_loss`, the data engine, and the hooks before and after an optimizer's step.
"""

import functools
import inspect
import logging
from types import ModuleType
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..engines import make_engine
from ..options import Settings
from ..run import Host, OgpsaRun
from .replace import replaced
from .v1 import take_settings
from .v1_data import Records, make_reference_sets, read_sets


logger = logging.getLogger("llamafactory.ogpsa")

# The trainer class of each stage.
TRAINERS = {"sft": "SFTTrainer"}

_TRAINER_PARAMETERS = ["self", "args", "model", "renderer", "train_dataset", "callbacks"]


def patch(module: ModuleType) -> None:
    """Wrap the `run_*` of a `llamafactory.v1.trainers.<stage>_trainer` that has just been executed.

    The trainer class, and the function that parses the arguments, are replaced only while `run_*` executes a run that
    asks for OGPSA.

    Raises:
        AttributeError: the module has no `run_*` or no `get_args`; it is left as it was.
    """
    stage = module.__name__.rpartition(".")[2].removesuffix("_trainer")
    run, get_args, name = getattr(module, f"run_{stage}"), module.get_args, TRAINERS[stage]

    @functools.wraps(run)
    def run_stage(args=None):
        asked = take_settings(args, stage, get_args)
        if asked is None:
            return run(args)

        settings, parsed = asked
        stock = getattr(module, name)
        check_seam(stage, stock)
        names = {name: with_ogpsa(stock, settings, read_sets(settings)), "get_args": lambda args: parsed}
        with replaced([module], names):
            return run(args)

    setattr(module, f"run_{stage}", run_stage)


def check_seam(stage: str, trainer_class: type) -> None:
    """Check that the parts of v1 that OGPSA uses look as expected.

    Raises:
        RuntimeError: they do not; says what was looked for.
    """
    from llamafactory.v1.core.utils import batching
    from llamafactory.v1.utils.callbacks import TrainerCallback

    problems = []
    if list(inspect.signature(trainer_class.__init__).parameters) != _TRAINER_PARAMETERS:
        problems.append(f"{trainer_class.__name__} has other parameters")
    needed = {
        trainer_class: ("compute_loss", "fit"),
        TrainerCallback: ("on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_train_end"),
        batching: ("default_collate_fn",),
    }
    for owner, names in needed.items():
        problems += [f"{owner.__name__} has no {name}" for name in names if not callable(getattr(owner, name, None))]
    if problems:
        raise RuntimeError(
            f"OGPSA does not know this version of LLaMA-Factory's v1 trainer (stage {stage}: {'; '.join(problems)}). "
            "Use one that docs/v1.md names; stock runs are not affected."
        )


def with_ogpsa(trainer_class: type, settings: Settings, sets: Records) -> type:
    """Return a subclass of a stage's trainer, of the same name, that has OGPSA among its callbacks."""

    class OgpsaTrainer(trainer_class):
        def __init__(self, args, model, renderer, train_dataset, callbacks=None):
            refuse_processor(renderer.processor)
            callbacks = [*(callbacks or []), make_callback(self, settings, sets)]
            super().__init__(args, model, renderer, train_dataset, callbacks)

    OgpsaTrainer.__name__ = trainer_class.__name__
    OgpsaTrainer.__qualname__ = trainer_class.__qualname__
    return OgpsaTrainer


def refuse_processor(processor: Any) -> None:
    """Raise a ValueError for a multimodal model, whose processor is more than a tokenizer."""
    if hasattr(processor, "tokenizer"):
        raise ValueError(
            f"`model` has a {type(processor).__name__}: OGPSA does not train multimodal models in LLaMA-Factory's v1 "
            "trainer; allowed: a text model, or `USE_V1` unset."
        )


def make_callback(trainer: Any, settings: Settings, sets: Records) -> Any:
    """Make the callback that passes a v1 trainer's events on to an OGPSA run."""
    from llamafactory.v1.utils.callbacks import TrainerCallback

    class OgpsaCallback(TrainerCallback):
        def on_train_begin(self, args, state, optimizer=None, **kwargs):
            self.run = OgpsaRun(settings, make_reference_sets(trainer, settings, sets))
            self.run.begin(make_host(trainer))
            self.hooks = [
                optimizer.register_step_pre_hook(self.before_optimizer),
                optimizer.register_step_post_hook(self.after_optimizer),
            ]

        def on_step_begin(self, args, state, **kwargs):
            self.stepped = False
            # v1 has already counted the step that begins.
            self.run.before_step(state.global_step - 1, args.micro_batch_size)

        def before_optimizer(self, optimizer, *_):
            # v1 has clipped already, by the norm before the projection; clipping is a factor, so the order does not
            # matter.
            logged = trainer.global_step % trainer.args.logging_steps == 0
            with torch.no_grad():
                self.run.project(None, logged, optimizer)

        def after_optimizer(self, optimizer, *_):
            self.stepped = True
            self.run.after_step(any(group["lr"] > 0 for group in optimizer.param_groups))

        def on_step_end(self, args, state, **kwargs):
            if not self.stepped:  # v1 skips the optimizer if the norm is not finite
                self.run.after_step(False)

        def on_log(self, args, state, logs, **kwargs):
            figures = self.run.figures(state.global_step) if self.stepped else None
            if figures and self.run.host.main:
                listed = ", ".join(f"{name}: {value:.4g}" for name, value in figures.items())
                logger.info(f"step: {state.global_step}, {listed}")

        def on_train_end(self, args, state, **kwargs):
            for hook in self.hooks:
                hook.remove()
            self.run.end()

    return OgpsaCallback()


def make_host(trainer: Any) -> Host:
    """Make the run's view of a v1 trainer that begins to train."""
    from llamafactory.v1.accelerator.interface import DistributedInterface

    processes = DistributedInterface()
    wrapped = trainer.model
    model = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    return Host(
        engine=make_engine(model, wrapped, trainer.device),
        model=model,
        output_dir=trainer.args.output_dir,
        max_steps=trainer.num_training_steps,
        samples_per_step=trainer.train_batch_generator.global_batch_size,
        main=processes.get_rank() == 0,
        show_progress=processes.get_local_rank() == 0,
    )
