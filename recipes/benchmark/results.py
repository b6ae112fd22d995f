"""What a benchmark leaves behind: a table, a file of all measurements, a chart."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

# Relative difference from which on losses do not count as equal.
_LOSS_TOLERANCE = 1e-3


@dataclass
class Result:
    """What was measured, ready to be shown.

    Attributes:
        table: What is printed; its title and caption are those of the chart.
        ratios: The bars of the chart: measured ratios by label.
        unit: What the ratios are of.
        setup: What was asked for.
        records: All measurements.
    """

    table: Table
    ratios: Mapping[str, Sequence[float]]
    unit: str
    setup: Any
    records: Any


def make_table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """An empty table; the first column is for names."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The ratio of each measurement to the one that was taken beside it."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def median_and_range(values: Sequence[float]) -> tuple[str, str]:
    """Two cells of a table.

    Examples:
        >>> median_and_range([1.0, 4.0, 2.0])
        ('2.00', '1.00-4.00')
    """
    return f"{statistics.median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}"


def note_on_losses(losses: Mapping[str, float], what: str) -> str:
    """A sentence about losses that differ; none where they are equal.

    Examples:
        >>> note_on_losses({"ours": 2.0, "plain": 2.001}, "first losses")
        ''
        >>> note_on_losses({"ours": 2.0, "plain": 2.01}, "first losses")
        '; first losses differ from that of ours: plain by 0.5%'
    """
    name, reference = next(iter(losses.items()))
    differences = {other: abs(loss - reference) / abs(reference) for other, loss in losses.items()}
    # A loss that is not a number differs from any other.
    unequal = [
        f"{other} by {difference:.1%}"
        for other, difference in differences.items()
        if not difference <= _LOSS_TOLERANCE
    ]
    return f"; {what} differ from that of {name}: {', '.join(unequal)}" if unequal else ""
