"""Raw rows of every known kind take one form; what has no form is refused by row and column."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError
from hf_sft_plugin.data.conversation import (
    RowFormat,
    check_texts,
    check_unicode,
    detect_format,
    to_conversation,
)
from hf_sft_plugin.types import Conversation, DataOptions

PAIR = RowFormat("prompt_response", prompt_column="prompt", response_column="response")
MESSAGES = RowFormat("messages", messages_column="messages")
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}
LONE_SURROGATE = "ab\ud83d"


def pair_of(prompt: Any, response: Any, **options: Any) -> Conversation:
    row = {"prompt": prompt, "response": response}
    return to_conversation(row, 3, PAIR, DataOptions(**options))


def messages_of(*messages: Any) -> Conversation:
    return to_conversation({"messages": list(messages)}, 3, MESSAGES, DataOptions())


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (["prompt", "response"], {}, PAIR),
        (["prompt", "completion"], {}, RowFormat("prompt_response", "prompt", "completion")),
        (["prompt", "response", "completion"], {}, PAIR),
        (["prompt", "response", "id", "source"], {}, PAIR),
        (["messages"], {}, MESSAGES),
        (["messages", "response", "id"], {}, MESSAGES),
        (["input_ids", "response_mask"], {}, RowFormat("tokenized")),
        (["input_ids", "labels", "attention_mask"], {}, RowFormat("tokenized")),
        (["input_ids", "labels", "prompt", "response"], {}, RowFormat("tokenized")),
        (
            ["question", "answer"],
            {"prompt_column": "question", "response_column": "answer"},
            RowFormat("prompt_response", "question", "answer"),
        ),
        (
            ["question", "completion"],
            {"prompt_column": "question"},
            RowFormat("prompt_response", "question", "completion"),
        ),
        (
            ["prompt", "answer"],
            {"response_column": "answer"},
            RowFormat("prompt_response", "prompt", "answer"),
        ),
        (["chat"], {"messages_column": "chat"}, RowFormat("messages", messages_column="chat")),
        (["prompt", "messages", "response"], {"messages_column": "messages"}, MESSAGES),
        (["prompt", "messages", "response"], {"prompt_column": "prompt"}, PAIR),
        (["input_ids", "labels", "prompt", "response"], {"prompt_column": "prompt"}, PAIR),
    ],
)
def test_the_columns_tell_the_format_and_options_overrule_them(
    columns: list[str], options: dict[str, Any], expected: RowFormat
) -> None:
    assert detect_format(columns, DataOptions(**options)) == expected


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ([], {}, r"No known format.*The columns are none\."),
        (["text"], {}, r"No known format: rows need prompt.*prompt_column.*columns are text\."),
        (["response"], {}, r"No known format.*The columns are response\."),
        (["prompt"], {}, r"no column 'response'\. The columns are prompt\. Name the right ones"),
        (
            ["b", "a"],
            {"prompt_column": "q", "response_column": "a"},
            r"no column 'q'\. The columns are a, b\.",
        ),
        (["q"], {"prompt_column": "q", "response_column": "a"}, "no column 'a'"),
        (["a"], {"response_column": "a"}, "no column 'prompt'"),
        (["messages"], {"messages_column": "chat"}, r"no column 'chat'\. The columns are mess"),
        (
            ["messages", "prompt", "response"],
            {},
            "both a prompt and a messages column. Say which one to train on: messages_column=",
        ),
        (
            ["input_ids", "attention_mask"],
            {},
            "input_ids but neither response_mask nor labels.*Add one of the two columns",
        ),
    ],
)
def test_columns_without_one_format_are_refused_with_the_columns_and_the_cure(
    columns: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        detect_format(columns, DataOptions(**options))


@pytest.mark.parametrize(
    ("prompt", "response", "prompt_format", "num_context", "is_chat"),
    [
        ("hello", "world", "plain", 1, False),
        ("hello", "world", "chat", 1, True),
        ([USER], "world", "plain", 1, True),
        ("hello", [ANSWER], "plain", 1, True),
        ([USER], [ANSWER], "plain", 1, True),
    ],
)
def test_a_prompt_and_its_response_become_two_turns(
    prompt: Any, response: Any, prompt_format: str, num_context: int, is_chat: bool
) -> None:
    assert pair_of(prompt, response, prompt_format=prompt_format) == Conversation(
        (USER, ANSWER), num_context, is_chat
    )


def test_a_response_within_the_prompt_is_context() -> None:
    conversation = pair_of([USER, ANSWER, USER], [ANSWER])
    assert conversation.num_context == 3
    assert conversation.messages == (USER, ANSWER, USER, ANSWER)


def test_a_response_may_be_several_turns() -> None:
    conversation = pair_of("hello", [ANSWER, USER, ANSWER])
    assert conversation == Conversation((USER, ANSWER, USER, ANSWER), 1, True)


def test_an_empty_prompt_is_allowed() -> None:
    assert pair_of("", "world").messages[0] == {"role": "user", "content": ""}


def test_a_conversation_keeps_its_turns_and_trains_all_of_them() -> None:
    system = {"role": "system", "content": ""}
    conversation = messages_of(system, USER, ANSWER, USER)
    assert conversation == Conversation((system, USER, ANSWER, USER), 0, True)


def test_keys_that_arrow_filled_with_none_are_absent_again() -> None:
    calls = [{"name": "add"}]
    conversation = messages_of(
        {**USER, "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": calls, "name": None},
        {"role": "tool", "content": "2", "tool_calls": None, "name": "add"},
    )
    assert conversation.messages == (
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2", "name": "add"},
    )


@pytest.mark.parametrize("value", [None, 7, 1.5, True, b"text", {"role": "user"}, ("a",)])
@pytest.mark.parametrize("column", ["prompt", "response"])
def test_a_value_that_is_no_text_is_refused_by_row_and_column(value: Any, column: str) -> None:
    row = {"prompt": "hello", "response": "world", column: value}
    kind = type(value).__name__
    with pytest.raises(RowError, match=rf"Row 3: column '{column}' holds {kind}, but text") as info:
        to_conversation(row, 3, PAIR, DataOptions())
    assert info.value.reason == f"{column} is {kind}, not text"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "NoneType"),
        ("[]", "str"),
        ({}, "dict"),
        ([], "an empty list"),
        ((USER, ANSWER), "tuple"),
    ],
)
def test_a_column_without_messages_is_refused_by_row_and_column(value: Any, found: str) -> None:
    with pytest.raises(RowError, match=f"Row 3: column 'messages' holds {found}, but a list like"):
        to_conversation({"messages": value}, 3, MESSAGES, DataOptions())


@pytest.mark.parametrize(
    ("turn", "message", "reason"),
    [
        (None, "message 1 is None, but a dict with 'role'", "a message without a role"),
        ("text", "message 1 is 'text', but a dict with 'role'", "a message without a role"),
        ({}, "message 1 is {}, but a dict with 'role'", "a message without a role"),
        ({"content": "a"}, "message 1 is {'content': 'a'}, but", "a message without a role"),
        ({"role": None, "content": "a"}, "message 1 is {'role': None", "a message without a role"),
        ({"from": "gpt", "value": "a"}, "message 1 is {'from': 'gpt'", "a message without a role"),
        ({"role": "user"}, "content of type NoneType", "message content is not text"),
        ({"role": "user", "content": 7}, "content of type int", "message content is not text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            "message 1 has content of type list, but text is needed",
            "message content is not text",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": []},
            "content of type NoneType",
            "message content is not text",
        ),
        ({"role": "user", "content": LONE_SURROGATE}, "surrogate pair at char", "broken Unicode"),
    ],
)
def test_a_turn_without_role_or_text_is_refused_by_its_place(
    turn: Any, message: str, reason: str
) -> None:
    with pytest.raises(RowError) as info:
        messages_of(USER, turn, ANSWER)
    assert str(info.value).startswith("Row 3: column 'messages', message 1 ")
    assert message in str(info.value)
    assert info.value.reason == reason


@pytest.mark.parametrize("column", ["prompt", "response"])
def test_half_of_a_surrogate_pair_is_refused_with_its_place(column: str) -> None:
    row = {"prompt": "hello", "response": "world", column: LONE_SURROGATE}
    message = f"Row 3: column '{column}' holds half of a surrogate pair at character 2.*Repair"
    with pytest.raises(RowError, match=message) as info:
        to_conversation(row, 3, PAIR, DataOptions())
    assert info.value.reason == "broken Unicode"


@pytest.mark.parametrize("response", ["", " ", "\n\t ", "\u3000"])
def test_an_empty_response_is_refused(response: str) -> None:
    for refused in (
        lambda: pair_of("hello", response),
        lambda: messages_of(USER, {"role": "assistant", "content": response}),
        lambda: messages_of(USER, ANSWER, USER, {"role": "assistant", "content": response}),
    ):
        with pytest.raises(RowError, match=r"Row 3: the response is empty.*Fill or remove") as info:
            refused()
        assert info.value.reason == "empty response"


@pytest.mark.parametrize("roles", [["user"], ["human", "gpt"], ["user", "Assistant"], ["system"]])
def test_a_conversation_without_an_assistant_names_the_roles_it_has(roles: list[str]) -> None:
    turns = [{"role": role, "content": "a"} for role in roles]
    found = rf"no message to train has the role 'assistant' \(the roles are {', '.join(roles)}\)"
    with pytest.raises(RowError, match=found) as info:
        messages_of(*turns)
    assert info.value.reason == "no assistant message"


def test_an_assistant_within_the_prompt_alone_is_nothing_to_train() -> None:
    with pytest.raises(RowError, match="no message to train has the role 'assistant'"):
        pair_of([USER, ANSWER], [USER])


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters()), st.text(alphabet=st.characters()))
def test_any_two_texts_are_kept_as_they_are_or_refused_for_a_known_reason(
    prompt: str, response: str
) -> None:
    broken = any("\ud800" <= char <= "\udfff" for char in prompt + response)
    if broken or not response.strip():
        with pytest.raises(RowError) as info:
            pair_of(prompt, response)
        assert info.value.reason == ("broken Unicode" if broken else "empty response")
    else:
        turns = pair_of(prompt, response).messages
        assert [turn["content"] for turn in turns] == [prompt, response]


def test_text_that_can_be_encoded_passes() -> None:
    check_unicode("a\u00e9\U0001f600\x00", 0, "prompt")
    check_texts(["", "a\U0001f600"], "prompts")
    check_texts([], "prompts")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("abc", "prompts is one text, but a list of texts is needed"),
        (["a", None], "Row 1: prompts holds NoneType, but text is needed"),
        ([["a", "b"]], "Row 0: prompts holds list, but text is needed"),
        (["a", "\udc00"], "Row 1: prompts holds half of a surrogate pair at character 0"),
    ],
)
def test_a_list_of_anything_but_text_is_refused_by_its_row(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_texts(texts, "prompts")
