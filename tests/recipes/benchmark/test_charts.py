"""A chart shows medians as bars, ranges as error bars, and what was measured."""

from pathlib import Path
from typing import Any

import pytest
from results import Result, make_table

charts: Any = pytest.importorskip("charts", exc_type=ImportError)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    drawn: list[Any] = []
    save = charts.Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(charts.Figure, "savefig", keep)
    return drawn


def test_bars_are_medians_and_error_bars_are_ranges(figures: list[Any], tmp_path: Path) -> None:
    table = make_table("tiny, float32, some machine", "torch 2", ("",))
    ratios = {"ours": [1.0, 1.0, 1.0], "other": [2.0, 5.0, 3.0]}
    path = tmp_path / "new" / "chart.png"
    charts.draw_ratios(path, [Result(table, ratios, "wall time", None, None)] * 2)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert [bar.get_width() for bar in axes.containers[-1]] == [1.0, 3.0]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "other"]
        (segments,) = [container for container in axes.collections if container.get_segments()]
        assert [line[:, 0].tolist() for line in segments.get_segments()] == [[1, 1], [2, 5]]
        assert axes.get_title(loc="left") == "tiny, float32, some machine"
        assert axes.get_xlabel() == "wall time\ntorch 2"
        # The first bar is on top.
        assert axes.yaxis_inverted()


def test_a_chart_without_bars_is_drawn(tmp_path: Path) -> None:
    table = make_table("nobody had memory enough", "torch 2", ("",))
    charts.draw_ratios(tmp_path / "chart.png", [Result(table, {}, "memory", None, None)])
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
