"""The memory allocator of a process that trains: glibc's on a CPU, torch's on a GPU."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Options of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MAX_INT = 2**31 - 1
# Holes in the heap that a tensor may go into.
_LARGEST_HOLE, _SMALLEST_HOLE = 2**30, 2**12
_is_kept = False


def keep_freed_memory() -> bool:
    """Has glibc keep freed blocks instead of giving them back to the system.

    By default every large tensor is memory fresh from the system, which the kernel clears page by
    page as it is written to for the first time; in training that takes about as long as the work
    itself. The same as starting with the environment variables `MALLOC_MMAP_MAX_=0` and
    `MALLOC_TRIM_THRESHOLD_=2147483647`. It holds for the whole process, from now on.

    Returns:
        Whether it took effect; False where the C library is not glibc.
    """
    global _is_kept
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    _is_kept = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _MAX_INT))
    return _is_kept


class _MallocInfo(ctypes.Structure):
    """What `mallinfo2` of glibc's malloc.h returns."""

    # All that comes before is there for its place.
    _fields_ = [*((f"other_{n}", ctypes.c_size_t) for n in range(8)), ("fordblks", ctypes.c_size_t)]
    _fields_ += [("keepcost", ctypes.c_size_t)]


def freed_memory() -> int:
    """Bytes of blocks that were freed and are kept; 0 where the C library does not say."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    # It came with glibc 2.33.
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _MallocInfo
    return int(ask().fordblks)


@contextmanager
def without_holes() -> Iterator[Callable[[], int]]:
    """Fills the holes in the heap for a while, so that whatever is taken makes it grow.

    Does nothing unless freed memory is kept, for else large tensors are no part of the heap.

    Yields:
        Says by how many bytes the heap has grown, gaps included.
    """
    if not _is_kept:
        yield lambda: 0
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    fillings: list[int] = []
    size, left = _LARGEST_HOLE, freed_memory()
    # A block for which the heap had to grow goes back to the system at once.
    libc.mallopt(_M_TRIM_THRESHOLD, 0)
    while size >= _SMALLEST_HOLE:
        end = libc.sbrk(0)
        block = libc.malloc(size) if size <= left else None
        if block is None or libc.sbrk(0) != end:
            libc.free(block)
            size //= 2
        else:
            fillings.append(block)
            left -= size
    libc.mallopt(_M_TRIM_THRESHOLD, _MAX_INT)
    start = libc.sbrk(0)
    try:
        yield lambda: int(libc.sbrk(0) - start)
    finally:
        for block in fillings:
            libc.free(block)


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
