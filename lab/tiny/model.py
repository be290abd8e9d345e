"""Save a word-level tokenizer and an untrained Qwen2 of about 0.7M parameters.

The vocabulary is every word and punctuation mark in `data/tiny/`. The chat template is the one that LLaMA-Factory calls
`template: chatml`.

    python -m lab.tiny.model outputs/tiny/init
"""

import argparse
import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from .. import ROOT


SEED = 42
DATA_DIR = ROOT / "data" / "tiny"
PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"
# A word or one punctuation mark. Python and the tokenizer both read this expression.
PIECE = r"\w+|[^\w\s]"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_texts(data_dir):
    """Yield every prompt and answer of the data sets that `dataset_info.json` names."""
    for entry in json.loads((data_dir / "dataset_info.json").read_text()).values():
        for rec in json.loads((data_dir / entry["file_name"]).read_text()):
            if "conversations" in rec:
                yield from (turn["value"] for turn in (*rec["conversations"], rec["chosen"], rec["rejected"]))
            else:
                yield from (rec["instruction"], rec["output"])


def build_tokenizer(data_dir):
    """Build the tokenizer: one id for each word, punctuation mark and special token.

    Args:
        data_dir: Folder of the data sets.

    Returns:
        A fast tokenizer with a chat template.
    """
    words = sorted({piece for text in read_texts(data_dir) for piece in re.findall(PIECE, text)})
    pieces = dict.fromkeys([PAD, UNKNOWN, START, END, "system", "user", "assistant", *words])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    # The WordPiece decoder is the one that joins words by spaces and leaves none before punctuation; it forgets ":".
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
    )


def build_model(tokenizer, seed=SEED):
    """Build the untrained model.

    Args:
        tokenizer: Tokenizer that gives the vocabulary size and the special tokens.
        seed: Seed of the random weights.

    Returns:
        A Qwen2 of 3 layers and width 128, its output weights tied to the embedding.
    """
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def main(argv=None):
    """Save the tokenizer and the model in the given folder.

    Args:
        argv: Command-line arguments, `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(description="Save a tiny untrained Qwen2 and its word-level tokenizer.")
    parser.add_argument("output_dir", type=Path, help="folder to save in")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the data sets")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the random weights")
    args = parser.parse_args(argv)

    tokenizer = build_tokenizer(args.data_dir)
    model = build_model(tokenizer, args.seed)
    tokenizer.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in {args.output_dir}")


if __name__ == "__main__":
    main()
