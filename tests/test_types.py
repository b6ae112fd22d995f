"""The nouns of the walk: errors that name a row, and options that no row contradicts."""

import dataclasses
import pickle
from typing import Any

import pytest

from hf_sft_plugin import IGNORE_INDEX, RowError, visible_lines
from hf_sft_plugin.types import Conversation, DataOptions, Segment, Turn, visible

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


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


def test_the_defaults_cut_nothing_wrap_nothing_and_train_the_responses() -> None:
    assert dataclasses.asdict(DataOptions()) == {
        "max_length": None,
        "overflow": "keep_start",
        "data_format": "auto",
        "prompt_column": None,
        "response_column": None,
        "messages_column": None,
        "prompt_format": "plain",
        "stop_token": None,
        "ignored_columns": None,
        "chat_template_kwargs": None,
        "train_on": "response",
        "train_roles": ["assistant"],
        "use_loss_mask": True,
        "multi_turn": "auto",
        "boundary": "split",
        "control_tokens": "text",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1, but a row needs at least 2 tokens"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": -5}, "max_length is -5"),
        ({"overflow": "cut"}, "overflow is 'cut'; choose one of keep_start, keep_end, "),
        ({"prompt_format": "chatml"}, "prompt_format is 'chatml'; choose one of plain, chat"),
        ({"data_format": "csv"}, "data_format is 'csv'; choose one of auto, prompt_response, "),
        ({"train_on": "prompt"}, "train_on is 'prompt'; choose one of response, last_response, "),
        ({"multi_turn": "one"}, "multi_turn is 'one'; choose one of auto, joint, split"),
        ({"boundary": "cut"}, "boundary is 'cut'; choose one of split, include, exclude"),
        ({"control_tokens": "no"}, "control_tokens is 'no'; choose one of text, keep, error"),
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


def test_two_options_do_not_share_their_roles() -> None:
    DataOptions().train_roles.append("tool")
    assert DataOptions().train_roles == ["assistant"]


def test_a_conversation_cannot_be_changed() -> None:
    conversation = Conversation(turns=(Turn({"role": "user", "content": "a"}, train=False),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        conversation.turns = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        conversation.turns[0].train = True  # type: ignore[misc]


def test_the_messages_of_a_conversation_are_those_of_its_turns() -> None:
    message = {"role": "user", "content": "a"}
    assert Conversation(turns=(Turn(message, train=False),)).messages == [message]
    assert Conversation(segments=(Segment("a", train=True),)).messages == []


def test_a_part_counts_once_unless_it_says_otherwise() -> None:
    assert Segment("a", train=True).weight == 1.0
    assert Turn({}, train=True).weight == 1.0
    assert Turn({}, train=True).weighted == ()
    assert Conversation().tools is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\u21b5\nb"),
        ("a\tb", "a\u2192\tb"),
        ("\x1b[31m\x07\x00\x7f\r", "\u241b[31m\u2407\u2400\u2421\u240d"),
        ("\x9b31m", "<U+009B>31m"),
        ("\u202e\u2066\u2028\ufeff", "<U+202E><U+2066><U+2028><U+FEFF>"),
        ("\ud83d", "<U+D83D>"),
        (FAMILY, FAMILY),
        ("[red]x[/red]", "[red]x[/red]"),
    ],
)
def test_what_cannot_be_seen_or_would_act_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_lines_stay_lines_where_text_is_made_visible() -> None:
    assert visible_lines("a\x1b[31m\nb\u202e\n") == "a\u241b[31m\nb<U+202E>\n"


def test_text_that_is_visible_already_stays_as_it_is() -> None:
    once = visible_lines("a\tb\t\t\x1b\n\u202e\t")
    assert once == "a\u2192\tb\u2192\t\u2192\t\u241b\n<U+202E>\u2192\t"
    assert visible_lines(once) == once


def test_an_error_that_quotes_a_row_cannot_act_on_the_terminal() -> None:
    error = RowError(2, "its role is '\x1b[2J'.", "unknown role")
    assert str(error) == "Row 2: its role is '\u241b[2J'."
    assert error.problem == "its role is '\x1b[2J'."
