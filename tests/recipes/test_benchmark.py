"""The benchmark runs, lets everyone take turns, and computes the ratios it prints."""

import json
from io import StringIO
from pathlib import Path

import benchmark
import pytest
from benchmark import StepRecord, result_table
from contestants import Setup
from rich.console import Console

SETUP = Setup("tiny", None, 4, 1, 2, "float32", 2)


def test_a_benchmark_measures_all_contestants(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    benchmark.main(
        [
            *("step", "--shape", "tiny", "--batch_size", "2", "--repetitions", "2"),
            *("--precision", "float32", "--threads", "1", "--contestants", "ours", "plain"),
            *("--output", str(output)),
        ]
    )
    printed = capfd.readouterr().out
    assert "ours" in printed
    assert "plain" in printed
    records = json.loads(output.read_text())["records"]
    assert [len(steps) for steps in records.values()] == [3, 3]
    ours, plain = records["ours"][0], records["plain"][0]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert all(step["wall"] > 0 and step["peak"] > 2**26 for step in records["ours"])


def test_ratios_are_medians_of_steps_taken_side_by_side() -> None:
    unmeasured = StepRecord(wall=99.0, cpu=99.0, peak=99 * 2**30, loss=5.0)
    fast = [StepRecord(wall, 1.0, 2**30, 4.0) for wall in (1.0, 2.0, 4.0)]
    slow = [StepRecord(wall, 2.0, 2**31, 4.0) for wall in (3.0, 4.0, 20.0)]
    records = {"ours": [unmeasured, *fast], "other": [unmeasured, *slow]}
    printed = StringIO()
    Console(file=printed, width=120).print(result_table(SETUP, records))
    line = next(line for line in printed.getvalue().splitlines() if "other" in line)
    cells = [cell.strip() for cell in line.strip("\u2502").split("\u2502")]
    assert cells == ["other", "4.000", "3.00", "2.00-5.00", "2.00", "2.00", "2.00", "5.0000"]


def test_a_contestant_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="'nobody' could not take part"):
        benchmark.measure_steps(SETUP, ["nobody"])


def test_the_help_of_every_command_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in ((["--help"], "take turns"), (["step", "--help"], "--repetitions")):
        with pytest.raises(SystemExit) as end:
            benchmark.main(argv)
        assert end.value.code == 0
        assert words in capsys.readouterr().out


def test_a_contestant_that_was_killed_is_told_from_one_that_failed() -> None:
    assert "was killed, most likely because" in benchmark.why_it_ended("plain", -9)
    assert "could not take part; its error is above" in benchmark.why_it_ended("plain", 1)
