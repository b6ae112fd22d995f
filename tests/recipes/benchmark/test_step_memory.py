"""Memory is measured size by size, and whoever ends by memory is named."""

from collections.abc import Sequence
from typing import Any

import pytest
import step_memory
from step_memory import measure_memory, memory_result, who_ends_first
from steps import StepRecord
from turns import ContestantEnded
from workload import Rows, Setup

SETUP = Setup("tiny", None, 4, 1, 2, "float32", 1)
GIB = 2**30


def steps_of(*beyond: float, loss: float = 5.0) -> list[StepRecord]:
    first = StepRecord(9.0, 9.0, 9 * GIB, loss, 0)
    return [first, *(StepRecord(1.0, 2.0, 8 * GIB, loss, int(each * GIB)) for each in beyond)]


def test_everyone_is_measured_alone_until_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, list[str], int]] = []

    def measure(setup: Setup, names: Sequence[str], rows: Rows) -> dict[str, list[StepRecord]]:
        calls.append((setup.batch_size, list(names), len(rows.raw)))
        if names == ["big"] and setup.batch_size > 1:
            raise ContestantEnded("big", -9)
        return {names[0]: steps_of(1.0, 1.0)}

    monkeypatch.setattr(step_memory, "measure_steps", measure)
    rows, measured = measure_memory(SETUP, ["ours", "big"], [4, 1, 2])
    assert calls == [
        *((1, ["ours"], 3), (1, ["big"], 3)),
        *((2, ["ours"], 6), (2, ["big"], 6)),
        (4, ["ours"], 12),
    ]
    assert len(rows.raw) == 12
    assert [list(records) for records in measured.values()] == [["ours", "big"]] * 2 + [["ours"]]
    assert measured[2]["big"] is None
    assert who_ends_first(measured) == "first to end by memory, at 2 rows: big"


def test_what_is_no_lack_of_memory_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ContestantEnded("ours", 1)

    monkeypatch.setattr(step_memory, "measure_steps", fail)
    with pytest.raises(ContestantEnded, match="its error is above"):
        measure_memory(SETUP, ["ours"], [1])


def test_the_table_shows_what_is_beyond_the_weights(cells_of: Any) -> None:
    measured: step_memory.Measured = {
        1: {"ours": steps_of(1.0, 2.0, 4.0), "big": steps_of(3.0, 4.0, 4.0, loss=5.5)},
        2: {"ours": steps_of(2.0, 2.0, 2.0), "big": None},
    }
    rows = step_memory.make_step_rows(SETUP)
    result = memory_result(SETUP, rows, measured)
    assert cells_of(result.table) == [
        ["ours", "1", "2.00", "1.00-4.00", "1.00", "1.00-1.00", "8.00", "1.000", "2.00", "5.0000"],
        ["big", "1", "4.00", "3.00-4.00", "2.00", "1.00-3.00", "8.00", "1.000", "2.00", "5.5000"],
        ["ours", "2", "2.00", "2.00-2.00", "1.00", "1.00-1.00", "8.00", "1.000", "2.00", "5.0000"],
        ["big", "2", "out of memory", *[""] * 7],
    ]
    assert result.ratios == {
        "ours, 1": [1.0, 1.0, 1.0],
        "big, 1": [3.0, 2.0, 1.0],
        "ours, 2": [1.0, 1.0, 1.0],
    }
    caption = str(result.table.caption)
    assert "first to end by memory, at 2 rows: big" in caption
    assert "first losses at 1 rows differ from that of ours: big by 10.0%" in caption


def test_others_are_shown_where_the_first_ended_by_memory(cells_of: Any) -> None:
    measured: step_memory.Measured = {1: {"ours": None, "other": steps_of(3.0, 3.0)}}
    result = memory_result(SETUP, step_memory.make_step_rows(SETUP), measured)
    assert cells_of(result.table)[1][:6] == ["other", "1", "3.00", "3.00-3.00", "", ""]
    assert result.ratios == {}
    assert who_ends_first({1: {"ours": steps_of(1.0)}}) == "nobody ends by memory"
