"""What PyTorch's profiler saw of a step: launches, time of the CPU, and how far copies and kernels overlap."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import profile, record_function, supported_activities

from ..devices import counters
from ..timing import Step


STEP = "measured step"
Interval = tuple[float, float]


class Kinds(NamedTuple):
    """The trace's categories of kernels and of copies, and what a copy's name holds."""

    kernel: str
    copy: str
    copy_name: str


GPU = Kinds("kernel", "gpu_memcpy", "Memcpy")
# Without a GPU there are no kernels; operators stand for them where only the code is tried.
CPU = Kinds("cpu_op", "cpu_op", "aten::copy_")


class Activity(NamedTuple):
    """Means over the profiled steps, times in seconds.

    Attributes:
        launches: kernels, copies left out.
        cpu: from the call to its return, with what the profiler adds.
        kernels: when at least one kernel ran.
        copies: when at least one copy ran.
        both: when both did.
    """

    launches: float
    cpu: float
    kernels: float
    copies: float
    both: float


def record(step: Step, device: torch.device, repeats: int) -> Activity:
    """Profile a step that has been called before; `repeats` times after once that does not count.

    Raises:
        RuntimeError: the profiler saw no kernel, as where it may not read the device's counters.
    """
    api = counters(device)
    for count in (1, repeats):
        with profile(activities=supported_activities()) as profiler:
            for _ in range(count):
                with record_function(STEP):
                    step()
                api.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    activity = summarise(events, repeats, GPU if device.type == "cuda" else CPU)
    if not activity.launches:
        raise RuntimeError("PyTorch's profiler saw no kernel")
    return activity


def summarise(events: Iterable[dict[str, Any]], repeats: int, kinds: Kinds) -> Activity:
    """Work out the means from a Chrome trace's events, whose times are in microseconds."""
    spans: dict[str, list[Interval]] = {"cpu": [], "kernel": [], "copy": []}
    for event in events:
        if event.get("ph") != "X":
            continue
        span, name, category = (event["ts"], event["ts"] + event["dur"]), event["name"], event.get("cat")
        if category == "user_annotation" and name == STEP:
            spans["cpu"].append(span)
        elif category == kinds.copy and name.startswith(kinds.copy_name):
            spans["copy"].append(span)
        elif category == kinds.kernel:
            spans["kernel"].append(span)
    kernels, copies = union(spans["kernel"]), union(spans["copy"])
    means = (length(found) / repeats / 1e6 for found in (spans["cpu"], kernels, copies, common(kernels, copies)))
    return Activity(len(spans["kernel"]) / repeats, *means)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merge intervals that touch, in order of time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def common(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """Return the intervals that lie in both unions."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Return the sum of the intervals' lengths."""
    return sum(end - start for start, end in intervals)
