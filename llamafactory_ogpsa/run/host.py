"""What a run knows of the trainer that drives it."""

from dataclasses import dataclass

import torch

from ..engines import Engine


@dataclass(frozen=True)
class Host:
    """What a run knows of the trainer.

    Attributes:
        engine: where the gradients are.
        model: the bare model.
        output_dir: where the log goes.
        max_steps: the optimizer steps of the run.
        samples_per_step: the training samples of an optimizer step, over all processes.
        main: whether this process logs and writes.
        show_progress: whether this process shows progress bars.
    """

    engine: Engine
    model: torch.nn.Module
    output_dir: str
    max_steps: int
    samples_per_step: int
    main: bool
    show_progress: bool
