"""Files of tensors that are checked when they are read."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import replacing


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22

# Reads a tensor by name and checks it.
Read = Callable[[str], torch.Tensor]


def fingerprint(tensor: torch.Tensor) -> str:
    """Describe a contiguous tensor: its dtype, its shape, and the sum of its bits as integers."""
    # In chunks: the sum makes a copy in int64 of what it sums.
    chunks = tensor.view(-1).view(_INTEGERS[tensor.dtype.itemsize]).split(_CHUNK)
    bits = sum(chunk.sum(dtype=torch.int64) for chunk in chunks)
    return f"{tensor.dtype} {list(tensor.shape)} {int(bits)}"


def save_tensors(path: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors and a few texts to a safetensors file, under a temporary name first."""
    fingerprints = {name: fingerprint(tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, "fingerprints": json.dumps(fingerprints)})


@contextmanager
def open_tensors(path: str) -> Iterator[tuple[Read, dict[str, str], set[str]]]:
    """Open a file that `save_tensors` wrote.

    Yields:
        a function that reads a tensor by name, the texts, and the names of the tensors.

    Raises:
        ValueError: the file, or a tensor in it, is missing or not as it was written; the message continues the file's
            name ("cannot be read …", "has no 'x'", "has other numbers in 'x' than were written").
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            fingerprints = json.loads(metadata.pop("fingerprints", "{}"))

            def read(name: str) -> torch.Tensor:
                if name not in fingerprints:
                    raise ValueError(f"has no {name!r}")
                tensor = file.get_tensor(name)
                if fingerprint(tensor) != fingerprints[name]:
                    raise ValueError(f"has other numbers in {name!r} than were written")
                return tensor

            yield read, metadata, set(fingerprints)
    except (OSError, SafetensorError, json.JSONDecodeError) as err:
        raise ValueError(f"cannot be read ({err})") from err
