"""What the comparisons of implementations share: building their steps, and printing a row of results."""

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch

from .timing import Step, peak_memory


def build_steps(
    rows: Sequence[dict[str, Any]],
    build: Callable[[str], Step],
    device: torch.device,
    rivals: Container[str] = (),
) -> tuple[dict[str, Step], dict[str, int]]:
    """Build the step of each row's `implementation` and call it once, unless the row is skipped already.

    Args:
        rows: those whose step cannot run get the reason as `skipped`.
        build: makes an implementation's step; a ValueError says why it cannot.
        device: where the steps run.
        rivals: implementations that are not ours, which may fail in any way and cost only their own row.

    Returns:
        the steps, and the bytes that each takes at its peak, by implementation.
    """
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    for row in rows:
        name = row["implementation"]
        if row["skipped"] is not None:
            continue
        try:
            step = build(name)
            step()
            peaks[name] = peak_memory(step, device)
            steps[name] = step
        except torch.OutOfMemoryError:
            row["skipped"] = "does not fit the memory"
        except ValueError as err:
            row["skipped"] = str(err)
        except Exception as err:
            if name not in rivals:
                raise
            row["skipped"] = f"fails: {type(err).__name__}"
    return steps, peaks


def print_result(start: str, row: dict[str, Any], figures: Callable[[], str]) -> None:
    """Print a row: what it is of, and its figures or why it has none."""
    text = f"  {row['skipped']}" if row["skipped"] else figures()
    print(f"{start}{text}", flush=True)
