"""The quickstart's tasks are right, and no answer of the held-out rows could have been learned."""

import re
from typing import Any

import pytest
import quickstart
from datasets import Dataset


@pytest.fixture(scope="module")
def tasks() -> tuple[Dataset, Dataset]:
    return quickstart.make_tasks()


def texts(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


def solve(turns: list[str]) -> str:
    """Answers the last question, worked out from its text alone."""
    question = turns[-1]
    words = turns[0].partition(": ")[2].rstrip("?").split()
    if question.startswith("Repeat"):
        return " ".join(words)
    if question.startswith("Reverse") or question == "Now backwards.":
        return " ".join(words[::-1])
    position = re.match(r"Which (?:is|was) (first|second|third)", question)
    if position:
        return words[["first", "second", "third"].index(position[1])]
    if question.startswith("Which is larger"):
        return max(re.findall(r"\d+", question), key=int)
    if "jars" in question:
        return str(sum(map(int, re.findall(r"\d+", question))))
    day, length = re.findall(r"on (\w+) for (\d+) days", question)[0]
    days = quickstart.WEEKDAYS
    return days[(days.index(day) + int(length)) % 7]


def test_every_answer_is_right(tasks: tuple[Dataset, Dataset]) -> None:
    for dataset in tasks:
        for row in dataset:
            turns = texts(row)
            for end in range(1, len(turns), 2):
                assert turns[end] == solve(turns[:end])


def test_no_held_out_prompt_occurs_in_training(tasks: tuple[Dataset, Dataset]) -> None:
    training, held_out = tasks
    trained = {
        tuple(texts(row)[:end]) for row in training for end in range(1, len(texts(row)) + 1, 2)
    }
    assert not trained & {tuple(texts(row)[:-1]) for row in held_out}
    assert len({tuple(texts(row)[:-1]) for row in held_out}) == len(held_out) == 400
    assert len(training) == 4000


def test_skills_take_turns(tasks: tuple[Dataset, Dataset]) -> None:
    for dataset in tasks:
        sources = dataset["source"]
        assert set(sources) == set(quickstart.SKILLS)
        counts = [sources.count(skill) for skill in quickstart.SKILLS]
        assert max(counts) - min(counts) <= len(dataset) // 20
    assert any(len(row["messages"]) > 2 for row in tasks[1])


def test_the_tasks_are_the_same_every_time(tasks: tuple[Dataset, Dataset]) -> None:
    again = quickstart.make_tasks()
    assert [dataset.to_list() for dataset in again] == [dataset.to_list() for dataset in tasks]
    assert quickstart.make_tasks(seed=1)[1].to_list() != tasks[1].to_list()


def test_the_tokenizer_loses_nothing_and_gives_each_digit_a_token() -> None:
    tokenizer = quickstart.train_tokenizer(["Which is larger, 12 or 345?"] * 3, vocab_size=300)
    for text in ("What is 9876?", "gr\u00fc\u00dfe \U0001f600\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([i]) for i in tokenizer("9876")["input_ids"]] == list("9876")
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_a_model_fits_its_tokenizer() -> None:
    tokenizer = quickstart.train_tokenizer(["some text"], vocab_size=300)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = quickstart.build_model({"model_type": "llama", **sizes}, tokenizer)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
