"""What a benchmark reads of the machine: memory, names and versions."""

import importlib.metadata
import platform
import resource
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Begins a new measurement of `peak_memory`."""
    if torch.cuda.is_available():
        # There are no statistics before.
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    else:
        # Writing 5 makes Linux forget the highest resident size so far.
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes at the highest point since `reset_peak_memory`."""
    if torch.cuda.is_available():
        wait_for_device()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def wait_for_device() -> None:
    """Waits until a GPU has done all that it was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def limit_memory(gib: float) -> None:
    """Lets this process fail where it asks for more memory than this, of the GPU or its own."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    else:
        # Linux limits what is reserved, of which libraries never touch the most.
        untouched = _status("VmData") - _status("VmRSS")
        limit = max(0, int(gib * 2**30) + untouched)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left."""
    # What torch raises on a CPU has no class of its own.
    texts = ("can't allocate memory", "bad_alloc", "could not create a memory object")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def device_name(threads: int) -> str:
    """What the measurements were taken on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()} with {threads} {'thread' if threads == 1 else 'threads'}"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


def versions() -> str:
    """The libraries that a measurement depends on."""
    names = ("torch", "transformers", "trl", "peft")
    return ", ".join(f"{name} {version(name)}" for name in names)


def version(library: str) -> str:
    """Version of a library that may not be there."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
