"""How much memory a process has, and how much it may still take."""

import os
from pathlib import Path

import psutil
import torch

from hf_sft_plugin.training.allocator import freed_memory

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# Names of limit, usage and the part of the usage that would be given back, by version.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device.

    On a CPU the processes of a machine that were started together share what there is, and a limit
    of the container counts as well. What Apple calls MPS has the memory of the machine.

    Raises:
        ValueError: If the device is one that cannot be asked.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has in store for tensors to come is not free to the driver.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"nobody knows how much memory is left on a device of type {device.type}")
    free = psutil.virtual_memory().available
    limit = cgroup_memory()
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (free if limit is None else min(free, limit)) // num_processes


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on a device, without those that wait for tensors to come.

    On a CPU that is the process with its libraries; on a CUDA device tensors alone.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss - freed_memory()


def cgroup_memory(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes up to the nearest limit of the control groups that this process is in.

    Args:
        root: Where the groups are mounted.
        membership: The file that names those of the process.

    Returns:
        None where there is no limit.
    """
    if not membership.is_file():
        return None
    found = []
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        version, top = (1, root / "memory") if "memory" in controllers.split(",") else (2, root)
        if version == 2 and controllers:
            continue
        group = top / path.lstrip("/")
        # In a container the own group may be mounted as the root of all.
        for folder in (group, *group.parents):
            left = _left_in(folder, *_FILES[version])
            if left is not None:
                found.append(left)
            if folder == top:
                break
    return min(found, default=None)


def _left_in(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        usage = int((folder / usage_name).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii")
    except OSError:
        return None
    # Without a limit the first version names a number that no machine has.
    if limit == "max" or int(limit) >= 2**60:
        return None
    cache = next(
        (int(line.split()[1]) for line in statistics.splitlines() if line.split()[0] == cache_name),
        0,
    )
    return max(0, int(limit) - usage + cache)
