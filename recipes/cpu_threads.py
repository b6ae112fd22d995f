"""Threads that leave the CPU to others while they wait; to be imported before torch."""

import os
from pathlib import Path

# Read when torch is loaded. Threads that wait in a loop of their own take a core from whatever
# else runs, and the one that they wait for may be what they keep from running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def count_usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may use: those it is bound to, or fewer by a container's quota.

    Args:
        cgroup: Where Linux shows the limits of a container.
    """
    is_bound = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if is_bound else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(num_cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        # There is no limit, which reads "max", or no such file.
        return num_cores
