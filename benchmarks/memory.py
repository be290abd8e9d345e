"""What OGPSA's basis takes in memory, by the formula of docs/distributed.md, and what the recipes take, for real models.

    python -m benchmarks.memory [--inputs | --recipes]

The parameters are counted on models and adapters built without weights (on PyTorch's meta device). Nothing here is
measured on a GPU.
"""

import argparse
from collections.abc import Sequence

from llamafactory_ogpsa.inputs import DEFAULT_RANK, most_directions
from llamafactory_ogpsa.inputs.record import tokens_per_sample

from .models import count_parameters, trainable_shapes


MODELS = ("Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.1-70B")
DIRECTIONS = 2
GPUS = (1, 8, 64)
LORA_RANK = 8
SAMPLES = 400  # two general sets, 200 each
# Of each matrix's inputs, in a refresh of scope `inputs`.
ROWS = SAMPLES * tokens_per_sample(SAMPLES)
# What the recipes' GPU-hours are reckoned with.
TOKENS = 300
FLOPS = 400e12


def basis_bytes(parameters: int, bytes_per_element: int, shards: int = 1, directions: int = DIRECTIONS) -> float:
    """Return the bytes of the basis in one process: directions × parameters × bytes an element / shards."""
    return directions * parameters * bytes_per_element / shards


def inputs_bytes(shapes: Sequence[tuple[int, ...]], rank: int = DEFAULT_RANK) -> int:
    """Return the bytes that the bases of scope `inputs` take at most: float32 `[k, in]` for each matrix.

    The figure of the start line. Matrices with the same inputs share one, and an embedding that is not tied has none.
    """
    return sum(4 * directions(shape, rank) * shape[1] for shape in shapes if len(shape) == 2)


def coefficients_bytes(shapes: Sequence[tuple[int, ...]], rank: int = DEFAULT_RANK) -> int:
    """Return the bytes that a step of scope `inputs` takes for coefficients: float32 `[out, k]` for each matrix."""
    return sum(4 * directions(shape, rank) * shape[0] for shape in shapes if len(shape) == 2)


def directions(shape: tuple[int, ...], rank: int) -> int:
    """Return the directions that a run keeps of a tensor: at most half of a matrix's inputs, none of a vector."""
    return most_directions(shape[1], rank) if len(shape) == 2 else 0


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


def print_inputs() -> None:
    """Print what scope `inputs` takes for each model beside scope `parameter`, in Markdown."""
    print(
        "| model | training | basis, scope `parameter`, rank 2 | bases, scope `inputs` | coefficients of a step |",
        end="",
    )
    print(" rows kept in a refresh, host |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        for training, itemsize in (("full", 2), (f"LoRA r={LORA_RANK}", 4)):
            shapes = trainable_shapes(f"{name} {training}")
            _, trainable = count_parameters(name, LORA_RANK if training.startswith("LoRA") else None)
            # Inputs of the weights are bfloat16, also where an adapter is float32. Those of LoRA's `B` are few.
            rows = sum(ROWS * 2 * shape[1] for shape in shapes if len(shape) == 2)
            sizes = [basis_bytes(trainable, itemsize), inputs_bytes(shapes), coefficients_bytes(shapes), rows]
            print(f"| {name} | {training} | " + " | ".join(map(readable, sizes)) + " |")


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
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--inputs", action="store_true", help="what scope `inputs` takes")
    tables.add_argument("--recipes", action="store_true", help="what the recipes take")
    options = parser.parse_args()
    (print_inputs if options.inputs else print_recipes if options.recipes else print_basis)()


if __name__ == "__main__":
    main()
