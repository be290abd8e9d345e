"""The models whose sizes the benchmarks use, by configuration: built with random weights, or counted without any."""

import functools
import math

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config


def _qwen(
    layers: int, hidden: int, intermediate: int, heads: int, key_values: int, tied: bool, vocabulary: int
) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        tie_word_embeddings=tied,
    )


def _llama(layers: int, hidden: int, intermediate: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


CONFIGS = {
    "Qwen2.5-0.5B": _qwen(24, 896, 4864, 14, 2, tied=True, vocabulary=151936),
    "Qwen2.5-1.5B": _qwen(28, 1536, 8960, 12, 2, tied=True, vocabulary=151936),
    "Qwen2.5-7B": _qwen(28, 3584, 18944, 28, 4, tied=False, vocabulary=152064),
    "Llama-3.1-8B": _llama(32, 4096, 14336, 32),
    "Llama-3.1-70B": _llama(80, 8192, 28672, 64),
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    # What stands for all of them where only the code is tried.
    "tiny": _qwen(1, 32, 64, 2, 1, tied=True, vocabulary=96),
}


def build(name: str, device: torch.device | str, dtype: torch.dtype, lora_rank: int | None = None) -> PreTrainedModel:
    """Build a model of `CONFIGS` with random weights; with `lora_rank`, an adapter on every linear layer."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
        if lora_rank:
            model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear"))
    return model


def count_parameters(name: str, lora_rank: int | None = None) -> tuple[int, int]:
    """Return the number of parameters without an adapter's, and of trainable ones: all, or the adapter's."""
    params = list(build(name, "meta", torch.bfloat16, lora_rank).parameters())
    trainable = sum(param.numel() for param in params if param.requires_grad)
    return sum(param.numel() for param in params) - (trainable if lora_rank else 0), trainable


def split(training: str) -> tuple[str, int | None]:
    """Split "Qwen2.5-7B full" or "Qwen2.5-7B LoRA r=8" into the model's name and the adapter's rank."""
    name, _, tuning = training.partition(" ")
    return name, None if tuning == "full" else int(tuning.removeprefix("LoRA r="))


@functools.cache
def trainable_shapes(training: str) -> list[tuple[int, ...]]:
    """Return the shape of each trainable tensor of a model and tuning, such as "Qwen2.5-7B LoRA r=8"."""
    name, lora_rank = split(training)
    params = build(name, "meta", torch.bfloat16, lora_rank).parameters()
    return [tuple(param.shape) for param in params if param.requires_grad]


def trainable_numels(training: str) -> list[int]:
    """Return the number of elements of each trainable tensor; see `trainable_shapes`."""
    return [math.prod(shape) for shape in trainable_shapes(training)]
