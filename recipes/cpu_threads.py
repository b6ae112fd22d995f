"""Threads that leave the CPU to others while they wait; to be imported before torch."""

import os
from collections.abc import Iterator
from pathlib import Path

# Read when torch is loaded. Threads that wait in a loop of their own take a core from whatever
# else runs, and the one that they wait for may be what they keep from running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What a control group may use in each period, in the second version and in the first.
_LIMITS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def count_usable_cores(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """The cores that this process may use: those it is bound to, or fewer by a container's quota.

    Args:
        root: Where Linux shows the control groups, which have the limits of a container.
        membership: The file that names those of the process.
    """
    is_bound = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if is_bound else os.cpu_count() or 1
    return max(1, min([num_cores, *map(round, _quotas(root, membership))]))


def _quotas(root: Path, membership: Path) -> Iterator[float]:
    """The cores that each group of the process allows, where it has a limit."""
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        group = top / path.lstrip("/")
        # In a container the own group may be mounted as the root of all.
        for folder in (group, *group.parents):
            for names in _LIMITS:
                try:
                    values = " ".join((folder / name).read_text("ascii") for name in names).split()
                    quota, period = map(int, values)
                except (OSError, ValueError):
                    # There is no limit, which reads "max", or no such file.
                    continue
                if quota > 0:
                    yield quota / period
            if folder == top:
                break
