"""Steps are measured alone, and their ratios are medians of steps taken side by side."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import steps
from steps import StepRecord, TurnsOfOneStep, make_step_rows, step_result
from turns import Usage
from workload import Setup

SETUP = Setup("tiny", None, 4, 1, 3, "float32", 2)


def test_ratios_are_medians_of_steps_taken_side_by_side(cells_of: Any) -> None:
    unmeasured = StepRecord(wall=99.0, cpu=99.0, peak=99 * 2**30, loss=5.0, beyond_weights=0)
    fast = [StepRecord(wall, 1.0, 2**30, 4.0, 0) for wall in (1.0, 2.0, 4.0)]
    slow = [StepRecord(wall, 2.0, 2**31, 4.0, 0) for wall in (3.0, 4.0, 20.0)]
    records = {"ours": [unmeasured, *fast], "other": [unmeasured, *slow]}
    result = step_result(SETUP, make_step_rows(SETUP), records)
    assert cells_of(result.table) == [
        ["ours", "2.000", "1.00", "1.00-1.00", "1.00", "1.00", "1.00", "5.0000"],
        ["other", "4.000", "3.00", "2.00-5.00", "2.00", "2.00", "2.00", "5.0000"],
    ]
    assert result.ratios == {"ours": [1.0, 1.0, 1.0], "other": [3.0, 2.0, 5.0]}
    assert "differ" not in str(result.table.caption)
    records["other"] = [replace(unmeasured, loss=5.1), *slow]
    caption = str(step_result(SETUP, make_step_rows(SETUP), records).table.caption)
    assert caption.endswith("; first losses differ from that of ours: other by 2.0%")


class CountingStopwatch:
    """Every turn takes one second more, and a peak of 100 bytes."""

    def __init__(self, num_turns: int) -> None:
        self.num_turns, self.begun, self.sent = num_turns, 0, []

    def begin(self) -> None:
        if self.begun == self.num_turns:
            raise SystemExit(0)
        self.begun += 1

    def read(self) -> Usage:
        return Usage(float(self.begun), 0.5, 100)

    def end(self, record: Any) -> None:
        self.sent.append(record)


def test_a_turn_is_one_step_with_its_log() -> None:
    stopwatch = CountingStopwatch(2)
    callback = TurnsOfOneStep(stopwatch, held=30)
    callback.on_train_begin()
    callback.on_log(logs={"loss": 3.0})
    # The summary after the last step is no step.
    callback.on_log(logs={"train_runtime": 1.0})
    with pytest.raises(SystemExit):
        callback.on_log(logs={"loss": 2.0})
    assert stopwatch.sent == [
        StepRecord(1.0, 0.5, 100, 3.0, 70),
        StepRecord(2.0, 0.5, 100, 2.0, 70),
    ]


def test_one_process_takes_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = CountingStopwatch(4)
    peaks = iter([1000])
    monkeypatch.setattr(steps, "peak_memory", lambda: next(peaks))
    monkeypatch.setattr(steps, "reset_peak_memory", SimpleNamespace)
    with pytest.raises(SystemExit):
        steps.take_part("plain", SETUP, make_step_rows(SETUP), stopwatch)
    assert [record.wall for record in stopwatch.sent] == [1.0, 2.0, 3.0, 4.0]
    # The weights of `tiny`, in float32, with the embedding that is the head as well.
    layer = 3 * 128 * 384 + 128 * (128 + 64 + 64 + 128) + 2 * 128 + 2 * 32
    weights = 8192 * 128 + 2 * layer + 128
    held = {100 - record.beyond_weights for record in stopwatch.sent}
    assert min(held) == max(held) >= 1000 + 4 * weights
    assert max(held) < 1000 + 4 * weights + 2000
