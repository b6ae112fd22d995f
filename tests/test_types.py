"""The nouns of the walk: errors that name a row, and options that no row contradicts."""

import dataclasses
import pickle
from typing import Any

import pytest

from hf_sft_plugin import IGNORE_INDEX, RowError
from hf_sft_plugin.types import Conversation, DataOptions


def test_the_ignored_label_is_the_one_that_torch_ignores() -> None:
    assert IGNORE_INDEX == -100


def test_a_row_error_says_the_row_and_keeps_its_parts() -> None:
    error = RowError(17, "the response is empty.", "empty response")
    assert str(error) == "Row 17: the response is empty."
    assert (error.row, error.problem, error.reason) == (
        17,
        "the response is empty.",
        "empty response",
    )
    assert isinstance(error, ValueError)


def test_a_row_error_crosses_from_another_process_unchanged() -> None:
    error = pickle.loads(pickle.dumps(RowError(3, "too long.", "long")))  # noqa: S301
    assert type(error) is RowError
    assert str(error) == "Row 3: too long."
    assert (error.row, error.problem, error.reason) == (3, "too long.", "long")


def test_every_option_explains_itself() -> None:
    without = [f.name for f in dataclasses.fields(DataOptions) if not f.metadata.get("help")]
    assert without == []


def test_the_defaults_cut_nothing_and_wrap_nothing() -> None:
    assert dataclasses.asdict(DataOptions()) == {
        "max_length": None,
        "overflow": "keep_start",
        "prompt_column": None,
        "response_column": None,
        "messages_column": None,
        "prompt_format": "plain",
        "stop_token": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1, but a row needs at least 2 tokens"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": -5}, "max_length is -5"),
        ({"overflow": "cut"}, "overflow is 'cut'; choose one of keep_start, drop, error"),
        ({"prompt_format": "chatml"}, "prompt_format is 'chatml'; choose one of plain, chat"),
        (
            {"messages_column": "m", "prompt_column": "p"},
            "messages_column was given together with prompt_column or response_column",
        ),
        (
            {"messages_column": "m", "response_column": "r"},
            "messages_column was given together with prompt_column or response_column",
        ),
    ],
)
def test_options_that_no_row_could_satisfy_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_two_tokens_are_enough_for_a_row() -> None:
    assert DataOptions(max_length=2).max_length == 2


def test_a_conversation_cannot_be_changed() -> None:
    conversation = Conversation(messages=(), num_context=0, is_chat=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        conversation.is_chat = False  # type: ignore[misc]
