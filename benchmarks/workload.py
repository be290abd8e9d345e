"""A model with random weights and a dataset of random words, for stock and OGPSA runs of LLaMA-Factory."""

import json
import random
import time
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback


DATASET = "words"
WORDS = 2000
RECORDS = 640
# Words of a prompt, and of an answer.
LENGTH = 24


def make_workload(folder: Path, hidden: int, layers: int = 4) -> tuple[dict, int]:
    """Make a Qwen2 of some width and depth, and a dataset.

    Args:
        folder: where model and dataset are written.
        hidden: width of the model, a multiple of 16.
        layers: its layers.

    Returns:
        the arguments of a stock run but for its length and output folder, and the model's number of parameters.
    """
    rng = random.Random(0)
    words = list(dict.fromkeys("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(WORDS)))
    sentence = lambda: " ".join(rng.choices(words, k=LENGTH))
    records = [{"instruction": sentence(), "input": "", "output": sentence()} for _ in range(RECORDS)]
    (folder / "words.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({DATASET: {"file_name": "words.json"}}))

    size = make_model(folder / "model", words, hidden, layers)
    args = {
        "model_name_or_path": str(folder / "model"),
        "template": "chatml",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "dataset": DATASET,
        "cutoff_len": 128,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-5,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return args, size


def make_model(folder: Path, words: Iterable[str], hidden: int, layers: int) -> int:
    """Save a Qwen2 with random weights and a tokenizer of whole words and punctuation marks.

    Args:
        folder: where both are written.
        words: the vocabulary beside the special tokens.
        hidden: width of the model, a multiple of 16.
        layers: its layers.

    Returns:
        the model's number of parameters.
    """
    specials = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: index for index, piece in enumerate([*specials, "system", "user", "assistant", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


class StepTimer(TrainerCallback):
    """Times optimizer steps. A refresh belongs to the step it precedes; the caller leaves that one out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.start)
