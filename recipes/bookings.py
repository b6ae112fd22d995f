"""A small task for a trained model: a booking, as people write it, becomes JSON of a given shape.

A chat model that is asked for it writes some other JSON, or much else. What it has to learn is the
shape: four keys in a line, and a number for a word. Everything is deterministic.
"""

import json
import random

from datasets import Dataset

TASK = "Write this booking as JSON with the keys name, people, day and time."
NAMES = """
    Ada Alan Anna Ben Carla Clara David Dora Elsa Emil Eva Felix Fred Greta Hans Ida Ivan Jack Jane
    Karl Kate Leo Lucy Mark Mary Max Nina Nora Oscar Paul Peter Rosa Ruth Sam Sara Tom Vera Walter
""".split()  # noqa: SIM905  # as in quickstart.py
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FORMS = (
    "{name} wants a table for {people} on {day} at {time}.",
    "A table for {people}, {day} at {time}, for {name}.",
    "On {day} {name} comes at {time}, {people} people in all.",
    "{people} of us will come on {day} at {time}. Ask for {name}.",
    "Hi, this is {name}. Do you have room for {people} at {time} on {day}?",
)


def make_bookings(
    num_train: int = 480, num_eval: int = 64, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Makes the training rows and the held-out rows; no booking of these occurs in those.

    Returns:
        Two datasets with the column `messages`: a question and its answer.
    """
    rng = random.Random(seed)  # noqa: S311  # nothing secret is drawn
    questions: dict[str, str] = {}
    while len(questions) < num_train + num_eval:
        question, answer = _draw(rng)
        questions.setdefault(answer, question)
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for answer, question in questions.items()
    ]
    return Dataset.from_list(rows[num_eval:]), Dataset.from_list(rows[:num_eval])


def _draw(rng: random.Random) -> tuple[str, str]:
    """A booking in words and as JSON."""
    name, day = rng.choice(NAMES), rng.choice(DAYS)
    people, clock = rng.randint(2, 9), f"{rng.randint(12, 22)}:{rng.choice((0, 15, 30, 45)):02}"
    text = rng.choice(FORMS).format(name=name, people=NUMBERS[people - 2], day=day, time=clock)
    booking = {"name": name, "people": people, "day": day, "time": clock}
    return f"{TASK}\n{text[0].upper()}{text[1:]}", json.dumps(booking)
