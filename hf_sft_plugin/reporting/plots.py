"""Curves of a run as PNG files; needs matplotlib, the extra `report`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_TRAIN_COLOR = "#0072B2"
_EVAL_COLOR = "#D55E00"


def plot_curve(
    path: Path, records: Sequence[Mapping[str, Any]], key: str, title: str, unit: str
) -> None:
    """Draws one logged value over the optimizer steps, training and evaluation together.

    Args:
        path: Where the PNG goes.
        records: Log lines, each with `step`.
        key: Log key of training; evaluation has the same with `eval_` before it.
        title: What is drawn.
        unit: Unit of the vertical axis.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, color, marker in (
        (key, "training", _TRAIN_COLOR, ""),
        (f"eval_{key}", "evaluation", _EVAL_COLOR, "o"),
    ):
        points = [
            (record["step"], record[name]) for record in records if record.get(name) is not None
        ]
        if points:
            steps, values = zip(*points, strict=True)
            # A line through a single point would draw nothing.
            axes.plot(steps, values, label=label, color=color, marker=marker if points[1:] else "o")
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
