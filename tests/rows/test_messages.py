"""Messages of every dialect become turns: what the template sees, and what is trained of it."""

import json
from typing import Any

import pytest

from hf_sft_plugin import RowError
from hf_sft_plugin.rows.formats import detect_format
from hf_sft_plugin.rows.messages import read_messages
from hf_sft_plugin.rows.values import RowSource
from hf_sft_plugin.types import DataOptions, Turn

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def read(*messages: Any, column: str = "messages", weight: float = 1.0, **options: Any) -> Any:
    row = {column: list(messages)}
    row_format = detect_format([column], DataOptions())
    return read_messages(column, RowSource(row, 3, row_format, DataOptions(**options)), weight)


def share(*messages: Any) -> Any:
    return read(*messages, column="conversations")


def parts(*texts: Any) -> list[dict[str, Any]]:
    """Parts of a content; a pair is a text with its flag."""
    return [
        {"type": "text", "text": text, "train": None}
        if isinstance(text, str)
        else {"type": "text", "text": text[0], "train": text[1]}
        for text in texts
    ]


def test_messages_that_are_clean_are_not_copied() -> None:
    turns = read(USER, ANSWER)
    assert turns == [Turn(USER, train=False), Turn(ANSWER, train=True)]
    assert turns[0].message is USER
    assert turns[1].message is ANSWER


def test_keys_that_arrow_filled_with_none_are_absent_again() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": None}}, "id": None}
    turns = read(
        {**USER, "tool_calls": None, "name": None, "train": None, "weight": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "2", "tool_calls": [], "name": "add"},
    )
    assert [turn.message for turn in turns] == [
        USER,
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "name": "add"},
    ]
    assert call["id"] is None


def test_arguments_that_are_text_stay_text() -> None:
    calls = [{"function": {"name": "add", "arguments": '{"a": null}'}}]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    assert read(message)[0].message is message


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_passes_to_the_template(key: str) -> None:
    message = {**ANSWER, key: "because"}
    assert read(message)[0].message is message
    # It is trained where no part of the content is.
    (turn,) = read({**message, "content": parts(("world", False))})
    assert turn == Turn(message, train=True, weighted=((0, 5, 0.0),))
    assert not read({**ANSWER, "content": parts(("world", False))})[0].train


@pytest.mark.parametrize(
    ("role", "flag", "train"),
    [
        ("assistant", None, True),
        ("assistant", True, True),
        ("assistant", False, False),
        ("user", None, False),
        ("user", True, True),
        ("user", False, False),
        ("tool", None, True),
    ],
)
def test_the_role_decides_what_is_trained_unless_a_flag_does(
    role: str, flag: bool | None, train: bool
) -> None:
    message = {"role": role, "content": "a", "train": flag}
    turn = read(message, train_roles=["assistant", "tool"])[0]
    assert turn == Turn({"role": role, "content": "a"}, train=train)


def test_the_weight_of_a_message_multiplies_that_of_its_row() -> None:
    turns = read({**ANSWER, "weight": 2}, {**ANSWER, "weight": None}, ANSWER, weight=0.5)
    assert [turn.weight for turn in turns] == [1.0, 0.5, 0.5]
    assert [turn.message for turn in turns] == [ANSWER] * 3


@pytest.mark.parametrize(
    ("role", "content", "text", "train", "weighted"),
    [
        ("assistant", parts("ab", "cd"), "abcd", True, ()),
        ("assistant", parts("ab", ("cd", False)), "abcd", True, ((2, 4, 0.0),)),
        (
            "assistant",
            parts(("ab", False), "cd", ("e", False)),
            "abcde",
            True,
            ((0, 2, 0.0), (4, 5, 0.0)),
        ),
        (
            "assistant",
            parts(("ab", False), ("", True), ("cd", False), "e"),
            "abcde",
            True,
            ((0, 4, 0.0),),
        ),
        ("assistant", parts(("ab", False), ("cd", False)), "abcd", False, ()),
        ("assistant", parts(("", False), "ab"), "ab", True, ()),
        ("assistant", [], "", True, ()),
        ("user", parts("ab", "cd"), "abcd", False, ()),
        ("user", parts("ab", ("cd", True)), "abcd", True, ((0, 2, 0.0),)),
    ],
)
def test_parts_are_joined_and_say_which_characters_are_not_trained(
    role: str, content: Any, text: str, train: bool, weighted: Any
) -> None:
    turn = read({"role": role, "content": content})[0]
    assert turn.message == {"role": role, "content": text}
    assert turn.train is train
    assert turn.weighted == weighted


def test_the_flag_of_a_message_stands_above_those_of_its_parts() -> None:
    content = parts(("ab", True), "cd")
    assert not read({"role": "assistant", "content": content, "train": False})[0].train


def test_tool_calls_are_trained_beside_a_text_that_is_not() -> None:
    message = {"role": "assistant", "content": parts(("ab", False)), "tool_calls": CALLS}
    turn = read(message)[0]
    assert turn == Turn(
        {"role": "assistant", "content": "ab", "tool_calls": CALLS}, True, 1.0, ((0, 2, 0.0),)
    )


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": "a.png"}, "a content part is image_url"),
        ({"type": "text", "text": None}, "a content part is not text"),
        ({"text": "a"}, "a content part is not text"),
        ("a", "a content part is not text"),
        (None, "a content part is not text"),
        ({"type": "text", "text": "a", "train": 1}, "train is not true or false"),
        ({"type": "text", "text": "\ud800"}, "broken Unicode"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_its_place(part: Any, reason: str) -> None:
    with pytest.raises(RowError, match="Row 3: column 'messages', message 1") as info:
        read(USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]})
    assert info.value.reason == reason
    if reason != "broken Unicode":
        assert "message 1, part 1 " in str(info.value)


@pytest.mark.parametrize(
    ("turn", "message", "reason"),
    [
        (None, "message 1 is None, but a dict with 'role'", "a message without a role"),
        ("text", "message 1 is 'text', but a dict with 'role'", "a message without a role"),
        ({}, "message 1 is {}, but a dict with 'role'", "a message without a role"),
        ({"content": "a"}, "message 1 is {'content': 'a'}, but", "a message without a role"),
        ({"role": None, "content": "a"}, "message 1 is {'role': None", "a message without a role"),
        ({"from": "gpt", "value": "a"}, "are data_format 'sharegpt'", "a message without a role"),
        ({"role": "user"}, "content of type NoneType", "message content is not text"),
        ({"role": "user", "content": 7}, "content of type int", "message content is not text"),
        (
            {"role": "assistant", "content": None, "tool_calls": []},
            "content of type NoneType",
            "message content is not text",
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": "add(1)"},
            "message 1 has tool_calls 'add(1)', but a list of dicts",
            "tool_calls is not a list of dicts",
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": [None]},
            "message 1 has tool_calls [None]",
            "tool_calls is not a list of dicts",
        ),
        ({**ANSWER, "train": "no"}, "message 1 has 'train': 'no'", "train is not true or false"),
        (
            {**ANSWER, "weight": -1},
            "message 1 has the weight -1",
            "a weight is not a finite number of 0 or more",
        ),
        ({**ANSWER, "image": b"x"}, "message 1 holds bytes", "a message holds bytes"),
        ({"role": "user", "content": "ab\ud83d"}, "surrogate pair at char", "broken Unicode"),
        ({"role": "a\ud83d", "content": "a"}, "surrogate pair at char", "broken Unicode"),
        ({**ANSWER, "name": "\ud83d"}, "surrogate pair at char", "broken Unicode"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": {"a": "\ud83d"}}}]},
            "surrogate pair at char",
            "broken Unicode",
        ),
    ],
)
def test_a_message_of_another_shape_is_refused_by_its_place(
    turn: Any, message: str, reason: str
) -> None:
    with pytest.raises(RowError) as info:
        read(USER, turn, ANSWER)
    assert str(info.value).startswith("Row 3: column 'messages', message 1 ")
    assert message in str(info.value)
    assert info.value.reason == reason


@pytest.mark.parametrize(
    ("sender", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        *[(name, "assistant") for name in ("gpt", "assistant", "chatgpt", "bard", "model")],
        ("system", "system"),
        *[(name, "tool") for name in ("tool", "function", "observation")],
    ],
)
def test_every_sender_of_sharegpt_has_its_role(sender: str, role: str) -> None:
    turn = share({"from": sender, "value": "a"})[0]
    assert turn == Turn({"role": role, "content": "a"}, train=role == "assistant")


def test_sharegpt_messages_have_flags_and_weights_too() -> None:
    turn = share({"from": "human", "value": "a", "train": True, "weight": 2})[0]
    assert turn == Turn({"role": "user", "content": "a"}, train=True, weight=2.0)


def test_openai_messages_within_conversations_stay_as_they_are() -> None:
    assert share(USER, {**ANSWER, "from": None, "value": None}) == read(USER, ANSWER)


@pytest.mark.parametrize("wrap", [json.dumps, lambda call: call, lambda call: json.dumps([call])])
def test_a_function_call_becomes_a_tool_call_of_the_assistant(wrap: Any) -> None:
    turn = share({"from": "function_call", "value": wrap({"name": "add", "arguments": {"a": 1}})})
    assert turn == [Turn({"role": "assistant", "tool_calls": CALLS}, train=True)]


def test_a_function_without_arguments_is_called_with_none() -> None:
    turn = share({"from": "function_call", "value": '{"name": "now"}'})[0]
    assert turn.message["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("value", ["add(1)", "[]", "{}", "null", "[1]", None, 7, '{"name": 1}', ""])
def test_a_function_call_that_is_no_json_with_a_name_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="message 0 is a function_call with the value") as info:
        share({"from": "function_call", "value": value})
    assert info.value.reason == "a function_call is not JSON with a name"


@pytest.mark.parametrize("sender", ["Human", "", 7, [], {"a": 1}])
def test_an_unknown_sender_is_refused_with_the_known_ones(sender: Any) -> None:
    with pytest.raises(RowError, match=r"the known senders are human, user, gpt, .*tool") as info:
        share({"from": sender, "value": "a"})
    assert info.value.reason == "unknown sender of a message"
    assert "message 0 is from" in str(info.value)


@pytest.mark.parametrize("value", [None, 7, {"a": "b"}])
def test_a_sharegpt_value_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="'conversations', message 0 has content of type"):
        share({"from": "human", "value": value})


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image"}, "a content part is image"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a content part is image_url"),
        ({"type": "input_audio", "input_audio": {}}, "a content part is input_audio"),
        ({"type": "video", "video": "a.mp4", "text": None}, "a content part is video"),
    ],
)
def test_a_part_that_a_text_model_cannot_see_is_refused_by_what_it_is(
    part: Any, reason: str
) -> None:
    with pytest.raises(RowError, match=r"message 0, part 1 .*trains on text alone") as info:
        read({"role": "user", "content": [{"type": "text", "text": "a"}, part]}, ANSWER)
    assert info.value.reason == reason


def weigh(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    """Parts of a content with the weight of each."""
    return [{"type": "text", "text": text, "weight": weight} for text, weight in pairs]


@pytest.mark.parametrize(
    ("message", "weight", "train", "weighted"),
    [
        ({"content": weigh(("ab", 2), ("cd", None))}, 1.0, True, ((0, 2, 2.0),)),
        (
            {"content": weigh(("ab", 2), ("cd", 0.5)), "weight": 3},
            0.5,
            True,
            ((0, 2, 3.0), (2, 4, 0.75)),
        ),
        ({"content": weigh(("ab", 2), ("cd", 2), ("", 7), ("e", 1))}, 1.0, True, ((0, 4, 2.0),)),
        ({"content": weigh(("ab", 0), ("cd", 1))}, 1.0, True, ((0, 2, 0.0),)),
        (
            {"content": [*weigh(("ab", 2)), *parts(("cd", False))]},
            1.0,
            True,
            ((0, 2, 2.0), (2, 4, 0.0)),
        ),
        # Nothing is left of it.
        ({"content": weigh(("ab", 0), ("cd", 0))}, 1.0, False, ()),
        ({"content": weigh(("ab", 2)), "train": False}, 1.0, False, ()),
        ({"content": weigh(("ab", 1)), "weight": 0}, 1.0, True, ()),
    ],
)
def test_the_weight_of_a_part_multiplies_those_of_its_message_and_row(
    message: dict[str, Any], weight: float, train: bool, weighted: Any
) -> None:
    (turn,) = read({"role": "assistant", **message}, weight=weight)
    assert turn.message["content"] == "".join(part["text"] for part in message["content"])
    assert (turn.train, turn.weighted) == (train, weighted)


@pytest.mark.parametrize("weight", [-1, "2", True, float("nan"), 1e400])
def test_the_weight_of_a_part_that_is_none_is_refused_by_its_place(weight: Any) -> None:
    with pytest.raises(RowError, match=r"^Row 3: column 'messages', message 0, part 1 has the we"):
        read({"role": "assistant", "content": [*parts("ab"), *weigh(("cd", weight))]})
