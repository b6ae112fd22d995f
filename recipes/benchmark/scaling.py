"""Measures how much faster several processes train the same optimizer steps than one."""

import multiprocessing
import os
import socket
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from datasets import disable_caching, disable_progress_bars
from measuring import versions
from results import Result, make_table, median_and_range, note_on_losses, ratios
from training_runs import TrainingRun, make_run_rows, take_part
from turns import Stopwatch, Usage, take_turns
from workload import Rows, Setup, describe, row_lengths

_COLUMNS = (
    *("processes", "wall s", "cpu s", "tokens/s", "ratio", "(range)"),
    *("first loss", "final loss"),
)


class SilentStopwatch(Stopwatch):
    """That of a process which goes along with the first of its group, and is not asked."""

    def __init__(self) -> None:
        pass

    def begin(self) -> None:
        """Does not wait, since the others of the group do."""

    def read(self) -> Usage:
        """Nothing; the first process measures."""
        return Usage(0.0, 0.0, 0)

    def end(self, record: object) -> None:
        """Tells nobody."""


def measure_scaling(setup: Setup, counts: Sequence[int], rows: Rows) -> dict[str, TrainingRun]:
    """Lets groups of processes train in turns of some steps; the first turn is the start.

    Args:
        setup: `batch_size` is the number of rows of a step, over all processes.
        counts: Processes of each group.
        rows: What everyone trains.

    Returns:
        One run per group, as its first process saw it.
    """
    context = multiprocessing.get_context("spawn")
    ports = {count: _free_port() for count in counts}
    others = [
        context.Process(target=_go_along, args=(rank, count, ports[count], setup, rows))
        for count in counts
        for rank in range(1, count)
    ]
    for process in others:
        process.daemon = True
        process.start()
    names = [str(count) for count in counts]
    records = take_turns(names, setup.repetitions + 1, _lead, setup, rows, ports)
    for process in others:
        process.join()
    return {name: messages[-1] for name, messages in records.items()}


def run_scaling(setup: Setup, counts: Sequence[int]) -> Result:
    """Makes the rows, measures, and shows it."""
    rows = make_run_rows(setup)
    return scaling_result(setup, rows, measure_scaling(setup, counts, rows))


def scaling_result(setup: Setup, rows: Rows, runs: dict[str, TrainingRun]) -> Result:
    """Tokens per second of each group, and how many times those of the first, turn by turn."""
    num_rows = setup.step_size * setup.steps_per_turn
    lengths = row_lengths(rows)[: num_rows * setup.repetitions]
    tokens = [sum(lengths[i : i + num_rows]) for i in range(0, len(lengths), num_rows)]
    first = next(iter(runs.values()))
    notes = note_on_losses({name: run.first_loss for name, run in runs.items()}, "first losses")
    notes += note_on_losses({name: run.final_loss for name, run in runs.items()}, "final losses")
    table = make_table(
        f"Training in steps of {describe(setup, lengths)} for each process, {setup.repetitions} "
        f"turns of {setup.steps_per_turn} steps",
        f"{versions()}; wall: all turns; cpu: of the first process of each; ratio: tokens per "
        f"second over those of the first, median of turns{notes}",
        _COLUMNS,
    )
    faster: dict[str, list[float]] = {}
    for name, run in runs.items():
        walls = [turn.wall for turn in run.turns]
        speeds = [count / wall for count, wall in zip(tokens, walls, strict=True)]
        faster[name] = ratios([turn.wall for turn in first.turns], walls)
        table.add_row(
            name,
            f"{sum(walls):.2f}",
            f"{sum(turn.cpu for turn in run.turns):.2f}",
            f"{statistics.median(speeds):,.0f}",
            *median_and_range(faster[name]),
            f"{run.first_loss:.6f}",
            f"{run.final_loss:.6f}",
        )
    unit = f"tokens per second over those of {next(iter(runs))} process"
    return Result(table, faster, unit, setup, runs)


def _lead(name: str, setup: Setup, rows: Rows, ports: dict[int, int], stopwatch: Stopwatch) -> None:
    """The first process of a group."""
    count = int(name)
    _join_group(0, count, ports[count], setup.threads)
    take_part("ours", _share_of(setup, count), rows, stopwatch)


def _go_along(rank: int, count: int, port: int, setup: Setup, rows: Rows) -> None:
    """Any other process of a group."""
    disable_caching()
    disable_progress_bars()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    _join_group(rank, count, port, setup.threads)
    take_part("ours", _share_of(setup, count), rows, SilentStopwatch())


def _share_of(setup: Setup, count: int) -> Setup:
    return replace(setup, batch_size=setup.batch_size // count)


def _join_group(rank: int, count: int, port: int, threads: int) -> None:
    """Sets what torchrun would; a group of one is a plain process."""
    # Otherwise Accelerate gives each process of a group another number.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if count > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
