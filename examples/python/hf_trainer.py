"""OGPSA in a bare Hugging Face Trainer, without LLaMA-Factory.

    python examples/python/hf_trainer.py

A tiny GPT-2 of random weights is trained on random tokens; what is shown is where the two calls go. The refresh comes
at a step's begin, the projection after the last micro-batch of a step and before clipping. One process; for several,
and for gradients that DeepSpeed or FSDP shards, use the LLaMA-Factory plugin.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from llamafactory_ogpsa import Subspace


class RefreshCallback(TrainerCallback):
    """Recomputes the subspace every K optimizer steps, before the first micro-batch of the step."""

    def __init__(self, trainer: "ProjectingTrainer", references: list[list[dict]], interval: int) -> None:
        """Bind the callback to a trainer, with one list of samples for each capability."""
        self.trainer, self.references, self.interval = trainer, references, interval

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Refresh the subspace where it is due, and leave no gradient behind."""
        # A resumed run has no subspace yet.
        if self.trainer.subspace is None or state.global_step % self.interval == 0:
            self.trainer.subspace = Subspace.from_gradients([self.gradient(model, data) for data in self.references])
            model.zero_grad()

    def gradient(self, model, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Return the gradient of the mean loss over samples of one length."""
        model.zero_grad()
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(samples))
        self.trainer.compute_loss(model, batch).backward()
        return self.trainer.gradients()


class ProjectingTrainer(Trainer):
    """A Trainer whose accumulated gradient is projected once per optimizer step."""

    subspace: Subspace | None = None

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients by the names of the bare model: a wrapper, as torch.compile's, adds to names."""
        return {name: param.grad for name, param in self.model.named_parameters()}

    def training_step(self, model, *args, **kwargs):
        """Take a micro-batch's step; with the last one of an optimizer step the gradient is complete."""
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            stats = self.subspace.project_(self.gradients())
            print(f"step {self.state.global_step + 1}: removed {stats.removed:.3f}, residual {stats.residual:.1e}")
        return loss


def make_samples(count: int, first: int, last: int) -> list[dict]:
    """Make sequences of random tokens from first to last."""
    tokens = torch.randint(first, last, (count, 12))
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    """Train for eight steps of two micro-batches each."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=8,
            max_grad_norm=1.0,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = ProjectingTrainer(model, args, train_dataset=make_samples(64, 0, 32))
        references = [make_samples(16, 32, 64), make_samples(16, 64, 96)]
        trainer.add_callback(RefreshCallback(trainer, references, interval=4))
        trainer.train()


if __name__ == "__main__":
    main()
