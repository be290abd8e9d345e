"""How a step is timed, and the bandwidth and memory it is held against."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from .devices import counters


Step = Callable[[], object]
# Seconds after which a step has been timed enough: the published rule takes many of them at once.
LONGEST = 10.0


class Time(NamedTuple):
    """Seconds of a step on the device, and of the call that queues it; on a CPU they are the same."""

    seconds: float
    launching: float


def _once(step: Step, device: torch.device, flush: torch.Tensor) -> Time:
    api = counters(device)
    flush.zero_()
    begin, end = api.Event(enable_timing=True), api.Event(enable_timing=True)
    api.synchronize(device)
    begin.record()
    start = time.perf_counter()
    step()
    launching = time.perf_counter() - start
    end.record()
    api.synchronize(device)
    return Time(begin.elapsed_time(end) / 1e3, launching)


def measure(
    steps: Mapping[str, Step],
    device: torch.device,
    repeats: int,
    typical: Callable[[Sequence[float]], float] | None = None,
    longest: float = LONGEST,
) -> dict[str, Time]:
    """Time steps in turn, so that whatever else the machine does falls on all of them.

    Args:
        steps: functions by name.
        device: where they run.
        repeats: how often each is timed, after two calls that are not; after `longest` seconds no more, but at least once.
        typical: which of the times counts; None: the median on a GPU; on a CPU, which is rarely alone with the
            benchmark, the least.
        longest: seconds after which a step has been timed enough.

    Returns:
        the times by name.
    """
    # Larger than any cache, so that a step starts with none of its data there.
    flush = torch.empty((256 << 20) if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times: dict[str, list[Time]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    for i in range(-2, repeats):
        for name, step in steps.items():
            if spent[name] > longest and (times[name] or i < 0):
                continue
            once = _once(step, device, flush)
            spent[name] += once.seconds
            if i >= 0:
                times[name].append(once)
    typical = typical or (statistics.median if device.type == "cuda" else min)
    return {name: Time(*map(typical, zip(*taken, strict=True))) for name, taken in times.items()}


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Return the bytes a second of a large copy on the device, counting both those read and those written."""
    size = (2 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure({"copy": lambda: target.copy_(source)}, device, repeats)["copy"].seconds


def clear_memory(device: torch.device) -> None:
    """Give back what was freed, and start counting the peak from here."""
    gc.collect()
    counters(device).empty_cache()
    counters(device).reset_peak_memory_stats(device)


def peak_memory(step: Step, device: torch.device) -> int:
    """Return the most bytes that one call of a step takes beyond what lies there before it."""
    api = counters(device)
    api.synchronize(device)
    before = api.memory_allocated(device)
    api.reset_peak_memory_stats(device)
    step()
    api.synchronize(device)
    return api.max_memory_allocated(device) - before
