"""Load a saved checkpoint and let it answer, greedily and in batches."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_checkpoint(folder):
    """Load a full model or a LoRA adapter with its base.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The model, ready to generate, and its tokenizer, padding on the left.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as auto
    elif (folder / "config.json").is_file():
        auto = AutoModelForCausalLM
    else:
        raise FileNotFoundError(f"{folder} holds no checkpoint: neither config.json nor adapter_config.json.")
    model = auto.from_pretrained(folder).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def prompt_of(record):
    """Join the instruction and the input of a record as LLaMA-Factory does."""
    return "\n".join(filter(None, (record["instruction"], record.get("input"))))


def tokens_of(tokenizer, record):
    """Give the tokens of a record's prompt, up to where the answer begins, and of its answer with the turn's end."""
    turn = [{"role": "user", "content": prompt_of(record)}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    answer = record.get("output", "") + tokenizer.eos_token
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in (text, answer))


@torch.inference_mode()
def generate(model, tokenizer, prompts, batch_size=64, max_new_tokens=32):
    """Answer prompts greedily.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer, with the chat template used in training.
        prompts: List of user messages.
        batch_size: Prompts generated at once.
        max_new_tokens: Longest answer.

    Returns:
        List of answers, without special tokens.
    """
    answers = []
    for start in range(0, len(prompts), batch_size):
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
