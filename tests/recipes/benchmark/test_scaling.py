"""Groups of processes train the same steps, and are compared turn by turn."""

import json
from pathlib import Path
from typing import Any

import commands
import pytest
from scaling import SilentStopwatch, scaling_result
from training_runs import TrainingRun, make_run_rows
from turns import Usage
from workload import Setup, row_lengths

SETUP = Setup("tiny", None, 4, 1, 2, "float32", 1, steps_per_turn=1)


@pytest.mark.usefixtures("forked_contestants")
def test_one_and_two_processes_are_measured_on_the_same_steps(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    size = ("--shape", "tiny", "--batch_size", "2", "--repetitions", "1", "--steps_per_turn", "2")
    commands.main(["processes", *size, "--counts", "1", "2", "--output", str(output)])
    (result,) = json.loads(output.read_text())["results"]
    one, two = result["records"]["1"], result["records"]["2"]
    assert len(one["turns"]) == len(two["turns"]) == 1
    assert two["first_loss"] == pytest.approx(one["first_loss"], rel=1e-6)
    assert two["final_loss"] == pytest.approx(one["final_loss"], rel=1e-5)
    assert all(turn["wall"] > 0 for turn in two["turns"])


def test_the_table_shows_tokens_per_second_and_their_ratio(cells_of: Any) -> None:
    rows = make_run_rows(SETUP)
    nothing = Usage(0, 0, 0)

    def run(*walls: float) -> TrainingRun:
        turns = [Usage(wall, wall / 4, 0) for wall in walls]
        return TrainingRun(nothing, nothing, turns, nothing, 3.0, 2.0)

    result = scaling_result(SETUP, rows, {"1": run(2.0, 2.0), "2": run(1.0, 1.25)})
    tokens = [sum(row_lengths(rows)[:4]), sum(row_lengths(rows)[4:8])]
    one, two = cells_of(result.table)
    speed = (tokens[0] / 2 + tokens[1] / 2) / 2
    assert one == [
        "1",
        "4.00",
        "1.00",
        f"{speed:,.0f}",
        "1.00",
        "1.00-1.00",
        "3.000000",
        "2.000000",
    ]
    assert two[4:6] == ["1.80", "1.60-2.00"]
    assert result.ratios == {"1": [1.0, 1.0], "2": [2.0, 1.6]}


def test_whoever_goes_along_measures_nothing() -> None:
    stopwatch = SilentStopwatch()
    stopwatch.begin()
    assert stopwatch.read() == Usage(0.0, 0.0, 0)
    assert stopwatch.end("anything") is None


def test_steps_that_cannot_be_shared_out_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["processes", "--batch_size", "4", "--counts", "1", "3"])
    assert "--batch_size 4 cannot be shared out evenly" in capsys.readouterr().err
