"""The bookings say what their JSON says, and none that is held out could have been learned."""

import json
import re
from typing import Any

import bookings
import pytest
from datasets import Dataset


@pytest.fixture(scope="module")
def tasks() -> tuple[Dataset, Dataset]:
    return bookings.make_bookings()


def read_booking(text: str) -> dict[str, Any]:
    """Works the booking out from its words."""
    (people,) = [n for n, word in enumerate(bookings.NUMBERS, 2) if word in text.lower()]
    return {
        "name": next(name for name in bookings.NAMES if re.search(rf"\b{name}\b", text)),
        "people": people,
        "day": next(day for day in bookings.DAYS if day in text),
        "time": re.findall(r"\d\d:\d\d", text)[0],
    }


def test_every_answer_says_in_json_what_the_booking_says(tasks: tuple[Dataset, Dataset]) -> None:
    for dataset in tasks:
        for row in dataset:
            question, answer = row["messages"]
            assert (question["role"], answer["role"]) == ("user", "assistant")
            task, _, text = question["content"].partition("\n")
            assert task == bookings.TASK
            assert list(json.loads(answer["content"]).items()) == list(read_booking(text).items())


def test_no_held_out_booking_occurs_in_training(tasks: tuple[Dataset, Dataset]) -> None:
    training, held_out = ({row["messages"][1]["content"] for row in part} for part in tasks)
    assert not training & held_out
    assert (len(training), len(held_out)) == tuple(map(len, tasks))


def test_the_bookings_are_the_same_every_time(tasks: tuple[Dataset, Dataset]) -> None:
    again = bookings.make_bookings()
    assert [part.to_list() for part in again] == [part.to_list() for part in tasks]
    assert bookings.make_bookings(seed=1)[1].to_list() != tasks[1].to_list()
