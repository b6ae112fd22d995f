"""The memory allocator of a process that trains: glibc's on a CPU, torch's on a GPU."""

import ctypes
import os
import platform

# Options of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MAX_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has glibc keep freed blocks instead of giving them back to the system.

    By default every large tensor is memory fresh from the system, which the kernel clears page by
    page as it is written to for the first time; in training that takes about as long as the work
    itself. The same as starting with the environment variables `MALLOC_MMAP_MAX_=0` and
    `MALLOC_TRIM_THRESHOLD_=2147483647`. It holds for the whole process, from now on.

    Returns:
        Whether it took effect; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _MAX_INT))


def allocator_hint(device_type: str) -> str | None:
    """What to set in the environment, in a few words, before a process trains on this device.

    Micro-batches of ever other sizes leave gaps between the blocks that torch takes on a CUDA
    device, which `expandable_segments` closes. Torch reads the setting when it first takes memory,
    so that it is too late for the process that reads this.

    Returns:
        None where there is nothing to set, or torch's allocator has been set up by the user.
    """
    # The second is the name that torch gave it before version 2.9.
    is_set = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    if device_type != "cuda" or is_set:
        return None
    return "less would lie idle with PYTORCH_ALLOC_CONF=expandable_segments:True"
