"""The device that is measured: its counters, its name, and a CPU's stand-in for `torch.cuda`."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


class Host:
    """What the benchmarks use of `torch.cuda`, for tensors on the CPU (Linux).

    So the same lines measure on both, and a CPU is enough to try them. Memory is that of the whole process.
    """

    class Event:
        """A moment on the clock."""

        def __init__(self, enable_timing: bool = False) -> None:
            self.seconds = 0.0

        def record(self) -> None:
            """Take the time."""
            self.seconds = time.perf_counter()

        def elapsed_time(self, end_event: "Host.Event") -> float:
            """Return the milliseconds until another event."""
            return 1e3 * (end_event.seconds - self.seconds)

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Return at once: on the CPU nothing is queued."""

    @staticmethod
    def empty_cache() -> None:
        """Return at once: PyTorch caches nothing on the CPU."""

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        """Return the process's resident memory in bytes."""
        return _kibibytes("/proc/self/status", "VmRSS") << 10

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        """Return the peak of the process's resident memory in bytes since `reset_peak_memory_stats`."""
        return _kibibytes("/proc/self/status", "VmHWM") << 10

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        """Forget the peak so far."""
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Return the machine's free and total memory in bytes."""
        return tuple(_kibibytes("/proc/meminfo", name) << 10 for name in ("MemAvailable", "MemTotal"))

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        """Return the processor's name."""
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()


def _kibibytes(file: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))


def counters(device: torch.device) -> Any:
    """Return `torch.cuda`, which is ROCm's too, or on a CPU its stand-in."""
    return torch.cuda if device.type == "cuda" else Host


def default_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what is measured on: device, driver and versions, as they stand in captions."""
    on_gpu = device.type == "cuda"
    packages = ("triton", "transformers", "accelerate", "peft", "llamafactory", "deepspeed")
    return {
        "device": counters(device).get_device_name(device),
        "driver": _driver() if on_gpu else None,
        "runtime": (f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}")
        if on_gpu
        else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Installed under another name, as Triton is for ROCm, or only on the path.
        return getattr(importlib.import_module(name), "__version__", "of unknown version")


def _driver() -> str | None:
    """Return the version of the accelerator's driver, None where nothing says it."""
    amd = Path("/sys/module/amdgpu/version")
    if torch.version.hip:
        return amd.read_text().strip() if amd.is_file() else f"the kernel's ({os.uname().release})"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None
