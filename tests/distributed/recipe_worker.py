"""What every process of a distributed test of the recipe runs."""

import atexit
import sys
from pathlib import Path

import sft


def run(flags: list[str]) -> list[str]:
    """Runs the recipe as a script; returns the names of the threads that its end leaves."""
    # What the process that this one was forked from does at its end.
    atexit._clear()
    sys.argv = ["sft.py", *flags]
    sft.main()
    atexit._run_exitfuncs()
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
