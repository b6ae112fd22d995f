"""Contestants in processes of their own, which take turns: one works while the others wait."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

import torch
from datasets import disable_caching, disable_progress_bars
from measuring import (
    is_out_of_memory,
    limit_memory,
    peak_memory,
    reset_peak_memory,
    wait_for_device,
)
from rich.progress import track

if TYPE_CHECKING:
    from workload import Setup

# How a process ends that had no memory left.
_OUT_OF_MEMORY = 77


@dataclass
class Usage:
    """What one turn of one contestant took.

    Attributes:
        wall: Seconds.
        cpu: Processor seconds of the whole process.
        peak: Bytes at the highest point: of the process, or of the GPU where there is one.
    """

    wall: float
    cpu: float
    peak: int


class ContestantEnded(SystemExit):
    """A contestant is gone before its last turn, and with it the benchmark.

    Attributes:
        is_by_memory: Whether it needed more memory than there is.
    """

    def __init__(self, name: str, exit_code: int | None) -> None:
        super().__init__(why_it_ended(name, exit_code))
        self.is_by_memory = exit_code in (-signal.SIGKILL, _OUT_OF_MEMORY)


def why_it_ended(name: str, exit_code: int | None) -> str:
    """One sentence about a contestant that is gone."""
    cure = "Choose a smaller --batch_size or --shape, or fewer --contestants."
    if exit_code == _OUT_OF_MEMORY:
        return f"'{name}' asked for more memory than there is. {cure}"
    if exit_code == -signal.SIGKILL:
        return (
            f"'{name}' was killed, most likely because all contestants together need more memory "
            f"than there is. {cure}"
        )
    return f"'{name}' could not take part; its error is above."


class Stopwatch:
    """Waits for a turn, and measures what it takes.

    Args:
        connection: To the process that gives the turns.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def begin(self) -> None:
        """Waits until it is this contestant's turn; ends the process if there is none left."""
        try:
            self.connection.recv()
        except EOFError:
            raise SystemExit(0) from None
        reset_peak_memory()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Usage:
        """What the turn has taken so far."""
        wait_for_device()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return Usage(wall, cpu, peak_memory())

    def end(self, record: Any) -> None:
        """Ends the turn with what there is to say of it."""
        self.connection.send(record)


def take_turns(
    contestants: Sequence[str],
    num_turns: int,
    task: Callable[..., None],
    setup: "Setup",
    *arguments: Any,
) -> dict[str, list[Any]]:
    """Lets every contestant take so many turns, one after the other, again and again.

    Args:
        contestants: Their names.
        num_turns: How many each has.
        task: What runs in each process: a function of a module, called with the name, the setup,
            the other arguments and a `Stopwatch`.
        setup: Says how many threads and how much memory a process has.
        *arguments: Whatever else the task takes.

    Returns:
        What each contestant said of its turns.

    Raises:
        ContestantEnded: If one is gone before its last turn.
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes: dict[str, SpawnProcess] = {}
    for name in contestants:
        connections[name], theirs = context.Pipe()
        process = context.Process(
            target=_take_part, args=(task, name, setup, arguments, theirs), daemon=True
        )
        process.start()
        theirs.close()
        processes[name] = process
    records: dict[str, list[Any]] = {name: [] for name in contestants}
    try:
        for _ in track(range(num_turns), description="Measuring", transient=True):
            for name, connection in connections.items():
                try:
                    connection.send("go")
                    records[name].append(connection.recv())
                except (EOFError, OSError):
                    processes[name].join()
                    raise ContestantEnded(name, processes[name].exitcode) from None
    finally:
        # Whoever waits for another turn ends here.
        for connection in connections.values():
            connection.close()
        for process in processes.values():
            process.join()
    return records


def _take_part(
    task: Callable[..., None],
    name: str,
    setup: "Setup",
    arguments: tuple[Any, ...],
    connection: Connection,
) -> None:
    torch.set_num_threads(setup.threads)
    disable_caching()
    disable_progress_bars()
    # The log lines of four trainers at once would hide the result.
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    try:
        if setup.memory_limit is not None:
            limit_memory(setup.memory_limit)
        task(name, setup, *arguments, Stopwatch(connection))
    except Exception as error:
        if is_out_of_memory(error):
            raise SystemExit(_OUT_OF_MEMORY) from None
        raise
