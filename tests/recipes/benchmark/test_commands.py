"""The benchmarks run from their commands, and refuse what cannot be measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import pytest
import torch

TINY = ("--shape", "tiny", "--precision", "float32", "--threads", "1")


def results_of(*argv: str, output: Path) -> Any:
    commands.main([*argv, "--output", str(output)])
    (result,) = json.loads(output.read_text())["results"]
    return result["records"]


@pytest.mark.usefixtures("forked_contestants")
def test_a_benchmark_measures_all_contestants(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step = ("step", *TINY, "--batch_size", "2", "--repetitions", "2")
    records = results_of(*step, "--contestants", "ours", "plain", output=tmp_path / "result.json")
    printed = capfd.readouterr().out
    assert "ours" in printed
    assert "plain" in printed
    assert [len(steps) for steps in records.values()] == [3, 3]
    ours, plain = records["ours"][0], records["plain"][0]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert all(step["wall"] > 0 and step["peak"] > 2**26 for step in records["ours"])


@pytest.mark.usefixtures("forked_contestants")
def test_a_whole_run_is_measured(tmp_path: Path) -> None:
    train = ("train", *TINY, "--batch_size", "1", "--repetitions", "2", "--steps_per_turn", "1")
    records = results_of(*train, "--contestants", "ours", output=tmp_path / "result.json")
    run = records["ours"]
    assert len(run["turns"]) == 2
    assert run["start"]["wall"] > run["constructor"]["wall"] > 0
    assert all(turn["wall"] > 0 for turn in run["turns"])


@pytest.mark.usefixtures("forked_contestants")
def test_memory_ends_at_its_limit(tmp_path: Path) -> None:
    # Hardly enough for the libraries alone.
    memory = ("memory", *TINY, "--repetitions", "1", "--batch_sizes", "1", "2")
    limit = ("--memory_limit", "0.05", "--contestants", "ours")
    records = results_of(*memory, *limit, output=tmp_path / "result.json")
    # Nobody is left for 2 rows.
    assert records == {"1": {"ours": None}}


@pytest.mark.usefixtures("forked_contestants")
def test_heads_are_measured_at_every_precision(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    head = ("head", "--shape", "tiny", "--num_rows", "8", "--repetitions", "1", "--threads", "1")
    commands.main([*head, "--contestants", "ours", "--output", str(output)])
    setups = [result["setup"] for result in json.loads(output.read_text())["results"]]
    assert [setup["precision"] for setup in setups] == ["bf16", "autocast", "float32"]


def test_the_help_of_every_command_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("step", "train", "memory", "head", "prepare", "processes")
    cases = [(["--help"], "take turns"), *(([name, "--help"], "--chart") for name in names)]
    for argv, words in cases:
        with pytest.raises(SystemExit) as end:
            commands.main(argv)
        assert end.value.code == 0
        assert words in capsys.readouterr().out


def test_the_folder_is_a_program() -> None:
    program = [sys.executable, "recipes/benchmark", "step", "--help"]
    root = Path(__file__).parents[3]
    run = subprocess.run(program, cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: benchmark step")


@pytest.mark.parametrize("command", ["step", "train", "memory"])
def test_five_repetitions_are_the_default(command: str) -> None:
    options = commands.make_parser().parse_args([command])
    assert options.repetitions == 5
    assert options.contestants[:4] == ["ours", "plain", "trl-default", "trl-best"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["step", "--contestants", "ours", "liger"], "'liger' runs on CUDA alone"),
        (["head", "--contestants", "ours", "liger"], "'liger' runs on CUDA alone"),
        (
            ["step", "--contestants", "ours", "--rows", "a.jsonl", "--prompt_to_response", "1:1"],
            "--prompt_to_response is for rows made up",
        ),
        (["step", "--contestants", "ours", "--chart", "a.png"], "--chart needs matplotlib"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    argv: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        commands.main(argv)
    assert end.value.code == 2
    assert reason in capsys.readouterr().err
