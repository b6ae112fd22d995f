"""Measures how much memory a step takes beyond the weights, for growing micro-batches."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from measuring import versions
from results import Result, make_table, median_and_range, note_on_losses, ratios
from rich.table import Table
from steps import StepRecord, make_step_rows, measure_steps
from turns import ContestantEnded
from workload import Rows, Setup, describe, row_lengths

# By rows of a micro-batch and contestant; None where there was not memory enough.
Measured = dict[int, dict[str, list[StepRecord] | None]]

_COLUMNS = (
    *("", "rows", "beyond GiB", "(range)", "ratio", "(range)"),
    *("peak GiB", "wall s", "cpu s", "first loss"),
)


def measure_memory(
    setup: Setup, contestants: Sequence[str], batch_sizes: Sequence[int]
) -> tuple[Rows, Measured]:
    """Measures every contestant at every size, each time in a process of its own.

    One runs after the other, so that nobody takes the memory of anybody else. Who ended by memory
    is not tried at larger sizes.

    Returns:
        The rows of the largest micro-batches that were tried, and the measured steps.
    """
    measured: Measured = {}
    ended: set[str] = set()
    for size in sorted(batch_sizes):
        if len(ended) == len(contestants):
            break
        sized = replace(setup, batch_size=size)
        rows = make_step_rows(sized)
        measured[size] = {}
        for name in contestants:
            if name in ended:
                continue
            try:
                measured[size][name] = measure_steps(sized, [name], rows)[name]
            except ContestantEnded as end:
                if not end.is_by_memory:
                    raise
                ended.add(name)
                measured[size][name] = None
    return rows, measured


def memory_result(setup: Setup, rows: Rows, measured: Measured) -> Result:
    """Medians with their range, and the ratio over the first contestant, size by size."""
    sizes = list(measured)
    largest = describe(replace(setup, batch_size=sizes[-1]), row_lengths(rows))
    limit = "" if setup.memory_limit is None else f", limit {setup.memory_limit:g} GiB"
    table = make_table(
        f"Memory of one optimizer step beyond the weights; the largest of {largest}{limit}"
        f", medians of {setup.repetitions}",
        f"{versions()}; {who_ends_first(measured)}{_notes(measured)}",
        _COLUMNS,
    )
    bars: dict[str, list[float]] = {}
    for size, records in measured.items():
        first = next(iter(records.values()))
        for name, record in records.items():
            if record is None:
                table.add_row(name, str(size), "out of memory")
                continue
            larger = [] if first is None else ratios(_beyond(record), _beyond(first))
            if larger:
                bars[f"{name}, {size}"] = larger
            _add_row(table, name, size, record, larger)
        table.add_section()
    unit = f"memory beyond the weights over that of {next(iter(measured[sizes[0]]))}, by rows"
    return Result(table, bars, unit, setup, measured)


def who_ends_first(measured: Measured) -> str:
    """One clause about the contestants that end by memory before the others."""
    for size, records in measured.items():
        names = [name for name, record in records.items() if record is None]
        if names:
            return f"first to end by memory, at {size} rows: {', '.join(names)}"
    return "nobody ends by memory"


def _beyond(steps: Sequence[StepRecord]) -> list[float]:
    # The first step has no optimizer states yet while its activations are there.
    return [step.beyond_weights / 2**30 for step in steps[1:]]


def _notes(measured: Measured) -> str:
    notes = ""
    for size, records in measured.items():
        losses: Mapping[str, float] = {
            name: steps[0].loss for name, steps in records.items() if steps is not None
        }
        if losses:
            notes += note_on_losses(losses, f"first losses at {size} rows")
    return notes


def _add_row(
    table: Table, name: str, size: int, record: list[StepRecord], larger: Sequence[float]
) -> None:
    first, *steps = record
    table.add_row(
        name,
        str(size),
        *median_and_range(_beyond(record)),
        *(median_and_range(larger) if larger else ("", "")),
        f"{statistics.median(step.peak for step in steps) / 2**30:.2f}",
        f"{statistics.median(step.wall for step in steps):.3f}",
        f"{statistics.median(step.cpu for step in steps):.2f}",
        f"{first.loss:.4f}",
    )
