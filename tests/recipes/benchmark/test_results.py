"""Results are printed, written with all measurements, and drawn."""

import doctest
import json
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
import results
from commands import publish
from results import Result, make_table, median_and_range, note_on_losses, ratios
from rich.console import Console
from turns import Usage
from workload import Setup


def make_result() -> Result:
    table = make_table("What it is", "What it ran on", ("", "s"))
    table.add_row("ours", "1.00")
    setup = Setup("tiny", None, 4, 1, 2, "float32", 2)
    return Result(table, {"ours": [1.0]}, "time", setup, {2: {"ours": [Usage(1.0, 2.0, 3), None]}})


def test_everything_measured_is_printed_and_written(tmp_path: Path) -> None:
    text, path = StringIO(), tmp_path / "new" / "results.json"
    publish([make_result()], Console(file=text), path, None)
    assert "What it is" in text.getvalue()
    assert "What it ran on" in text.getvalue()
    contents = json.loads(path.read_text())
    assert contents["versions"]["torch"] == version("torch")
    (result,) = contents["results"]
    assert result["title"] == "What it is"
    assert result["setup"]["shape"] == "tiny"
    assert result["records"] == {"2": {"ours": [{"wall": 1.0, "cpu": 2.0, "peak": 3}, None]}}


def test_a_chart_is_drawn_where_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    publish([make_result()], Console(file=StringIO()), None, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


def test_ratios_are_taken_pair_by_pair() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])
    assert median_and_range([5.0, 1.0, 2.0]) == ("2.00", "1.00-5.00")


def test_losses_that_differ_are_named() -> None:
    assert doctest.testmod(results) == (0, 3)
    same = {"ours": 2.0, "plain": 2.0019, "trl": 1.9981}
    assert note_on_losses(same, "first losses") == ""
    note = note_on_losses({**same, "wrong": 3.0, "broken": float("nan")}, "first losses")
    assert note == "; first losses differ from that of ours: wrong by 50.0%, broken by nan%"
