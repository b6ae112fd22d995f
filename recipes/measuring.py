"""What a benchmark reads of the machine: memory, names and versions."""

import importlib.metadata
import platform
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Begins a new measurement of `peak_memory`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Writing 5 makes Linux forget the highest resident size so far.
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes at the highest point since `reset_peak_memory`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def device_name(threads: int) -> str:
    """What the measurements were taken on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU with {threads} threads"


def version(library: str) -> str:
    """Version of a library that may not be there."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
