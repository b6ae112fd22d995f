"""Contestants work one at a time, and one that is gone is named with the reason."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import turns
from turns import ContestantEnded, Usage, take_turns, why_it_ended

# All that is read of a setup; the real one would take seconds to import in every process.
SETUP: Any = SimpleNamespace(threads=1, memory_limit=None)

# A process of its own finds its task in a file.
TASKS = """
import time
import torch

def work(name, setup, path, stopwatch):
    while True:
        stopwatch.begin()
        with open(path, "a") as file:
            file.write(name)
        time.sleep(0.05)
        stopwatch.end((name, torch.get_num_threads(), stopwatch.read()))

def fail(name, setup, stopwatch):
    raise KeyError(name)

def take_too_much(name, setup, stopwatch):
    stopwatch.begin()
    torch.ones(2**33, dtype=torch.uint8)
    stopwatch.end("there was enough")
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tasks_of_a_test.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    return "tasks_of_a_test"


def test_contestants_take_turns(tasks: str, tmp_path: Path) -> None:
    work = pytest.importorskip(tasks).work
    path = tmp_path / "order"
    records = take_turns(["a", "b"], 3, work, SETUP, str(path))
    # Everyone waits after the last turn, and ends when there is none left.
    assert path.read_text() == "ababab"
    assert list(records) == ["a", "b"]
    for name, messages in records.items():
        assert [message[:2] for message in messages] == [(name, 1)] * 3
        usages = [message[2] for message in messages]
        assert all(isinstance(usage, Usage) and usage.peak > 2**26 for usage in usages)
        # What others do in between is not counted.
        assert all(0.05 <= usage.wall < 5 for usage in usages)
        assert all(usage.cpu < usage.wall for usage in usages)


@pytest.mark.usefixtures("forked_contestants")
def test_a_contestant_that_cannot_start_is_named(tasks: str) -> None:
    with pytest.raises(ContestantEnded, match="'nobody' could not take part") as end:
        take_turns(["nobody"], 1, pytest.importorskip(tasks).fail, SETUP)
    assert not end.value.is_by_memory


@pytest.mark.usefixtures("forked_contestants")
def test_who_takes_more_memory_than_allowed_is_told_from_one_that_failed(tasks: str) -> None:
    limited: Any = SimpleNamespace(threads=1, memory_limit=4)
    with pytest.raises(ContestantEnded, match="'greedy' asked for more memory") as end:
        take_turns(["greedy"], 1, pytest.importorskip(tasks).take_too_much, limited)
    assert end.value.is_by_memory


def test_a_contestant_that_was_killed_is_told_from_one_that_failed() -> None:
    assert "was killed, most likely because" in why_it_ended("plain", -9)
    assert "could not take part; its error is above" in why_it_ended("plain", 1)
    assert ContestantEnded("plain", -9).is_by_memory
    assert not ContestantEnded("plain", 1).is_by_memory


class Connection:
    """Gives so many turns, and keeps what is said of them."""

    def __init__(self, num_turns: int) -> None:
        self.num_turns, self.sent = num_turns, []

    def recv(self) -> None:
        if not self.num_turns:
            raise EOFError
        self.num_turns -= 1

    def send(self, record: object) -> None:
        self.sent.append(record)


def test_the_process_ends_where_no_turn_is_left() -> None:
    stopwatch = turns.Stopwatch(Connection(1))
    stopwatch.begin()
    with pytest.raises(SystemExit) as end:
        stopwatch.begin()
    assert end.value.code == 0
