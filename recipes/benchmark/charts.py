"""Ratios as bars in a PNG file; needs matplotlib, the extra `report`."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import Result

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_FIRST_COLOR = "#0072B2"
_OTHERS_COLOR = "#D55E00"
_LINE = 100


def draw_ratios(path: Path, results: Sequence[Result]) -> None:
    """Draws horizontal bars, one chart above the other: medians, and the range as an error bar.

    Args:
        path: Where the PNG goes.
        results: What was measured; the first bar of each is the one that others are compared with.
    """
    heights = [2 + 0.4 * len(result.ratios) for result in results]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(results), squeeze=False, height_ratios=heights)
    for axes, result in zip(grid[:, 0], results, strict=True):
        _draw(axes, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, result: Result) -> None:
    names, measured = list(result.ratios), list(result.ratios.values())
    medians = [statistics.median(values) for values in measured]
    below = [median - min(values) for median, values in zip(medians, measured, strict=True)]
    above = [max(values) - median for median, values in zip(medians, measured, strict=True)]
    is_first = [set(values) == {1.0} for values in measured]
    colors = [_FIRST_COLOR if first else _OTHERS_COLOR for first in is_first]
    axes.barh(names, medians, xerr=[below, above], color=colors, capsize=3, height=0.6)
    for row, (median, values) in enumerate(zip(medians, measured, strict=True)):
        end = (max(values), row)
        axes.annotate(f"{median:.2f}", end, (6, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_title("\n".join(textwrap.wrap(str(result.table.title), _LINE)), fontsize=9, loc="left")
    caption = "\n".join(textwrap.wrap(str(result.table.caption), _LINE))
    axes.set_xlabel(f"{result.unit}\n{caption}", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
