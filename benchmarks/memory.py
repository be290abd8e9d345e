"""What OGPSA's basis takes in memory, by the formula of docs/distributed.md, and what the recipes take, for real models.

    python -m benchmarks.memory [--recipes]

The parameters are counted on models and adapters built without weights (on PyTorch's meta device). Nothing here is
measured on a GPU.
"""

import argparse

from .models import count_parameters


MODELS = ("Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.1-70B")
DIRECTIONS = 2
GPUS = (1, 8, 64)
LORA_RANK = 8
# What the recipes' GPU-hours are reckoned with.
TOKENS = 300
FLOPS = 400e12


def basis_bytes(parameters: int, bytes_per_element: int, shards: int = 1, directions: int = DIRECTIONS) -> float:
    """Return the bytes of the basis in one process: directions × parameters × bytes an element / shards."""
    return directions * parameters * bytes_per_element / shards


def readable(size: float) -> str:
    """Write a number of bytes in GiB, or in MiB below one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def print_basis() -> None:
    """Print the basis's size for each model, in Markdown."""
    print("| model | training | trainable parameters | basis, whole (DDP) |", end="")
    print("".join(f" a process of {n}, sharded |" for n in GPUS[1:]))
    print("|---|---|---|---|" + "---|" * len(GPUS[1:]))
    for name in MODELS:
        # Under ZeRO in bf16 gradients are bf16; LLaMA-Factory keeps LoRA's weights, and so gradients, in float32.
        for training, bytes_per_element in (("full, bf16 basis", 2), (f"LoRA, rank {LORA_RANK}, float32 basis", 4)):
            _, trainable = count_parameters(name, LORA_RANK if training.startswith("LoRA") else None)
            sizes = [readable(basis_bytes(trainable, bytes_per_element, n)) for n in GPUS]
            print(f"| {name} | {training} | {trainable:,} | " + " | ".join(sizes) + " |")


def print_recipes() -> None:
    """Print what each recipe of docs/recipes.md takes, in Markdown; see there for the formulae."""
    print("| recipe | GPUs | weights, gradients, optimizer | basis | GPU-hours naive | with OGPSA |")
    print("|---|---|---|---|---|---|")
    for name in ("Qwen2.5-7B", "Llama-3.1-8B"):
        for tuning, gpus in (("full", 8), ("lora", 1)):
            total, trainable = count_parameters(name, LORA_RANK if tuning == "lora" else None)
            for stage in ("sft", "dpo"):
                frozen = 2 * total if tuning == "lora" or stage == "dpo" else 0
                state = (16 * trainable + frozen) / gpus
                basis = basis_bytes(trainable, 2 if tuning == "full" else 4, gpus)
                # Forward 2, backward 4 (2 where weights have no gradient), recomputed activations 2.
                passes = 8 if tuning == "full" else 6
                samples, sequences, cost = (
                    (30_000, 1, 400 / (30 * 16)) if stage == "sft" else (10_000, 2, 400 / (5 * 16))
                )
                passes += 2 if stage == "dpo" else 0  # the reference model's forward
                hours = passes * total * samples * sequences * TOKENS / FLOPS / 3600
                print(
                    f"| {name} {tuning} {stage} | {gpus} | {readable(state)} | {readable(basis)} | {hours:.1f} | "
                    f"{hours * (1 + cost):.1f} |"
                )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", action="store_true", help="what the recipes take, instead of the basis alone")
    print_recipes() if parser.parse_args().recipes else print_basis()


if __name__ == "__main__":
    main()
