"""Raw rows of every known kind take one form; what has no form is refused by row and column."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError
from hf_sft_plugin.rows.conversation import to_conversation
from hf_sft_plugin.rows.formats import RowFormat, RowKind, detect_format
from hf_sft_plugin.types import Conversation, DataOptions, PromptFormat, Segment, TrainOn, Turn

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}
USER_TURN = Turn(USER, train=False)
ANSWER_TURN = Turn(ANSWER, train=True)
TOOLS = [{"type": "function", "function": {"name": "add"}}]
LONE_SURROGATE = "ab\ud83d"


def read(row: dict[str, Any], **options: Any) -> Conversation:
    """The conversation of row 3, whose columns tell its format."""
    made = DataOptions(**options)
    return to_conversation(row, 3, detect_format(row.keys(), made), made)


def pair_of(prompt: Any, response: Any, **options: Any) -> Conversation:
    return read({"prompt": prompt, "response": response}, **options)


def messages_of(*messages: Any, **options: Any) -> Conversation:
    return read({"messages": list(messages)}, **options)


def trains(conversation: Conversation) -> list[bool]:
    return [part.train for part in (*conversation.turns, *conversation.segments)]


def test_a_plain_prompt_and_its_response_are_joined_as_they_are() -> None:
    expected = Conversation(segments=(Segment("hello", train=False), Segment("world", train=True)))
    assert pair_of("hello", "world") == expected
    assert read({"prompt": "hello", "completion": "world"}) == expected
    options = {"prompt_column": "question", "response_column": "answer"}
    assert read({"question": "hello", "answer": "world"}, **options) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "prompt_format"),
    [
        ("hello", "world", "chat"),
        ([USER], "world", "plain"),
        ("hello", [ANSWER], "plain"),
        ([USER], [ANSWER], "plain"),
    ],
)
def test_a_prompt_and_its_response_are_turns_where_either_has_messages_or_chat_is_wanted(
    prompt: Any, response: Any, prompt_format: str
) -> None:
    conversation = pair_of(prompt, response, prompt_format=prompt_format)
    assert conversation == Conversation(turns=(USER_TURN, ANSWER_TURN))


def test_messages_within_the_prompt_are_never_trained() -> None:
    flagged = {**ANSWER, "train": True}
    conversation = pair_of([USER, ANSWER, USER, flagged], [ANSWER], train_roles=["assistant"])
    assert conversation.messages == [USER, ANSWER, USER, ANSWER, ANSWER]
    assert trains(conversation) == [False, False, False, False, True]


def test_a_response_may_be_several_turns() -> None:
    conversation = pair_of("hello", [ANSWER, USER, ANSWER])
    assert trains(conversation) == [False, True, False, True]


def test_an_empty_prompt_is_allowed() -> None:
    assert pair_of("", "world").segments[0] == Segment("", train=False)
    assert pair_of("", "world", prompt_format="chat").messages[0] == {"role": "user", "content": ""}


def test_a_conversation_keeps_its_turns_and_trains_the_assistants() -> None:
    system = {"role": "system", "content": ""}
    conversation = messages_of(system, USER, ANSWER, USER)
    assert conversation.messages == [system, USER, ANSWER, USER]
    assert trains(conversation) == [False, False, True, False]
    assert conversation.tools is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [False, True, False, True]),
        ({"train_on": "last_response"}, [False, False, False, True]),
        ({"train_on": "all"}, [False, True, False, True]),
        ({"use_loss_mask": False}, [False, True, False, True]),
        ({"train_roles": ["user"]}, [True, False, True, False]),
        ({"train_roles": ["user"], "train_on": "last_response"}, [False, False, True, False]),
    ],
)
def test_options_choose_the_turns_that_are_trained(
    options: dict[str, Any], expected: list[bool]
) -> None:
    assert trains(messages_of(USER, ANSWER, USER, ANSWER, **options)) == expected


def test_flags_choose_the_turns_that_are_trained() -> None:
    conversation = messages_of(
        {**USER, "train": True}, {**ANSWER, "train": False}, USER, {**ANSWER, "train": True}
    )
    assert trains(conversation) == [True, False, False, True]
    assert conversation.messages == [USER, ANSWER, USER, ANSWER]


def test_the_last_response_is_the_last_that_is_trained() -> None:
    conversation = messages_of(
        USER, ANSWER, USER, {**ANSWER, "train": False}, train_on="last_response"
    )
    assert trains(conversation) == [False, True, False, False]


@pytest.mark.parametrize(
    "options", [{"train_on": "all"}, {"use_loss_mask": False, "train_on": "last_response"}]
)
def test_a_chat_without_a_response_is_fine_where_everything_is_trained(
    options: dict[str, Any],
) -> None:
    assert trains(messages_of(USER, USER, **options)) == [False, False]
    assert trains(read({"segments": [{"text": "a", "train": False}]}, **options)) == [False]


@pytest.mark.parametrize("roles", [["user"], ["human", "gpt"], ["user", "Assistant"], ["system"]])
def test_a_conversation_without_an_assistant_names_the_roles_it_has(roles: list[str]) -> None:
    turns = [{"role": role, "content": "a"} for role in roles]
    found = rf"no message to train has the role 'assistant' \(the roles are {', '.join(roles)};"
    with pytest.raises(RowError, match=found) as info:
        messages_of(*turns)
    assert info.value.reason == "no message to train"


def test_a_conversation_without_a_message_to_train_names_the_roles_it_wants() -> None:
    with pytest.raises(RowError, match=r"the role 'tool' or 'model' \(the roles are user, assis"):
        messages_of(USER, ANSWER, train_roles=["tool", "model"])
    with pytest.raises(RowError, match="no message to train has the role 'assistant'"):
        pair_of([USER, ANSWER], [USER])
    with pytest.raises(RowError, match="no message to train has the role 'assistant'"):
        messages_of(USER, {**ANSWER, "train": False})


@pytest.mark.parametrize("response", ["", " ", "\n\t ", "\u3000"])
def test_an_empty_response_is_refused(response: str) -> None:
    empty = {"role": "assistant", "content": response}
    for refused in (
        lambda: pair_of("hello", response),
        lambda: pair_of("hello", response, prompt_format="chat"),
        lambda: messages_of(USER, empty),
        lambda: messages_of(USER, ANSWER, USER, empty),
        lambda: read({"conversations": [{"from": "gpt", "value": response}]}),
        lambda: read({"instruction": "a", "output": response}),
        lambda: read({"segments": [{"text": "a", "train": False}, {"text": " ", "train": True}]}),
    ):
        with pytest.raises(RowError, match=r"Row 3: the response is empty.*Fill or remove") as info:
            refused()
        assert info.value.reason == "empty response"


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": [{"function": {"name": "add"}}]},
        {"reasoning_content": "because"},
        {"reasoning": "because"},
        {"thinking": "because"},
    ],
)
def test_a_response_without_text_may_call_a_tool_or_think(more: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "", **more}
    assert messages_of(USER, message).turns[1] == Turn(message, train=True)


def test_an_empty_response_that_is_not_trained_is_context() -> None:
    empty = {"role": "assistant", "content": ""}
    conversation = messages_of(USER, empty, USER, ANSWER, train_on="last_response")
    assert trains(conversation) == [False, False, False, True]
    assert trains(messages_of(USER, {**empty, "train": False}, ANSWER)) == [False, False, True]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (TOOLS, TOOLS),
        (json.dumps(TOOLS), TOOLS),
        ([{**TOOLS[0], "strict": None}], TOOLS),
        (None, None),
        ("", None),
        ("null", None),
        ([], None),
        ("[]", None),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tools_come_as_a_list_or_as_its_json_text(column: str, tools: Any, expected: Any) -> None:
    found = read({column: [USER, ANSWER], "tools": tools}).tools
    assert found == (None if expected is None else tuple(expected))


@pytest.mark.parametrize(
    ("tools", "message", "reason"),
    [
        ("add(1)", "column 'tools' holds text that is not JSON", "tools is not JSON"),
        ("{}", "column 'tools' holds {}, but a list of", "tools is not a list of schemas"),
        ({"name": "add"}, "column 'tools' holds {'name'", "tools is not a list of schemas"),
        (["add"], "column 'tools' holds ['add']", "tools is not a list of schemas"),
        (0, "column 'tools' holds 0", "tools is not a list of schemas"),
        ('[{"name": "\\ud800"}]', "column 'tools' holds half of a surrogate", "broken Unicode"),
        ([{"name": b"a"}], "column 'tools' holds bytes", "a message holds bytes"),
        ("[" * 100_000, "nested too deep", "nested too deep"),
    ],
)
def test_tools_of_another_shape_are_refused(tools: Any, message: str, reason: str) -> None:
    with pytest.raises(RowError) as info:
        read({"messages": [USER, ANSWER], "tools": tools})
    assert message in str(info.value)
    assert info.value.reason == reason


def test_tools_reach_a_chat_but_would_be_lost_in_plain_text() -> None:
    row = {"prompt": "hello", "response": "world", "tools": TOOLS}
    assert read(row, prompt_format="chat").tools == tuple(TOOLS)
    with pytest.raises(RowError, match=r"prompt_format='chat'.*ignored_columns") as info:
        read(row)
    assert info.value.reason == "tools without a chat"
    assert read(row, ignored_columns=["tools"]) == pair_of("hello", "world")
    assert read({**row, "tools": []}) == pair_of("hello", "world")


def test_the_weight_of_a_row_multiplies_every_weight() -> None:
    weighted = read({"messages": [USER, {**ANSWER, "weight": 3}], "weight": 0.5})
    assert [turn.weight for turn in weighted.turns] == [0.5, 1.5]
    segments = [{"text": "a", "train": True, "weight": 4}, {"text": "b", "train": True}]
    assert [s.weight for s in read({"segments": segments, "weight": 0.5}).segments] == [2.0, 0.5]
    for row in (
        {"prompt": "a", "response": "b"},
        {"prompt": [USER], "response": "b"},
        {"text": "a"},
        {"instruction": "a", "output": "b"},
        {"conversations": [ANSWER], "system": "a"},
    ):
        conversation = read({**row, "weight": 2})
        parts = (*conversation.turns, *conversation.segments)
        assert {part.weight for part in parts} == {2.0}
        assert read({**row, "weight": None}) == read(row)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", True, [1]])
def test_a_row_weight_of_another_kind_is_refused_by_its_column(weight: Any) -> None:
    with pytest.raises(RowError, match=r"column 'weight' has the weight .*ignored_columns"):
        read({"text": "a", "weight": weight})
    assert read({"text": "a", "weight": weight}, ignored_columns=["weight"]) == read({"text": "a"})


def test_sharegpt_takes_its_system_prompt_from_a_column() -> None:
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]
    system = Turn({"role": "system", "content": "be kind"}, train=False)
    assert read({"conversations": talk}).turns == (USER_TURN, ANSWER_TURN)
    for empty in (None, ""):
        turns = read({"conversations": talk, "system": empty}).turns
        assert turns == (USER_TURN, ANSWER_TURN)
    expected = (system, USER_TURN, ANSWER_TURN)
    assert read({"conversations": talk, "system": "be kind"}).turns == expected
    talk.insert(0, {"from": "system", "value": "be kind"})
    assert read({"conversations": talk, "system": "be kind"}).turns == expected
    with pytest.raises(RowError, match="two different system prompts"):
        read({"conversations": talk, "system": "be short"})
    with pytest.raises(RowError, match="column 'system' holds int, but text is needed"):
        read({"conversations": talk, "system": 7})


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nAdd {them}.\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {them}.\n\n### Input:\n2, {2}\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("extra", "plain", "chat"),
    [
        ({}, ALPACA, "Add {them}."),
        ({"input": ""}, ALPACA, "Add {them}."),
        ({"input": None}, ALPACA, "Add {them}."),
        ({"input": "2, {2}"}, ALPACA_WITH_INPUT, "Add {them}.\n\n2, {2}"),
    ],
)
def test_an_alpaca_row_has_the_prompt_it_was_published_with(
    extra: dict[str, Any], plain: str, chat: str
) -> None:
    row = {"instruction": "Add {them}.", "output": "4", **extra}
    assert read(row).segments == (Segment(plain, train=False), Segment("4", train=True))
    assert read(row, prompt_format="chat").turns == (
        Turn({"role": "user", "content": chat}, train=False),
        Turn({"role": "assistant", "content": "4"}, train=True),
    )


def test_a_text_is_trained_whole() -> None:
    assert read({"text": "hello"}).segments == (Segment("hello", train=True),)
    with pytest.raises(RowError, match="Row 3: the text is empty") as info:
        read({"text": " \n"})
    assert info.value.reason == "empty text"


def test_segments_are_kept_as_they_are_without_the_empty_ones() -> None:
    segments = [
        {"text": "a", "train": False},
        {"text": "", "train": True, "weight": None},
        {"text": " ", "train": True, "weight": 2},
        {"text": "b", "train": True},
    ]
    assert read({"segments": segments}).segments == (
        Segment("a", train=False),
        Segment(" ", train=True, weight=2.0),
        Segment("b", train=True),
    )


@pytest.mark.parametrize(
    ("segments", "message", "reason"),
    [
        ([], "column 'segments' holds an empty list", "segments is an empty list, not segments"),
        ("a", "column 'segments' holds str, but a list", "segments is str, not segments"),
        (["a"], "column 'segments', segment 0 is 'a', but a dict", "a segment without text"),
        ([{"text": None, "train": True}], "segment 0 is {'text': None", "a segment without text"),
        ([{"text": "a"}], "segment 0 does not say whether", "a segment without train"),
        ([{"text": "a", "train": 1}], "segment 0 has 'train': 1", "train is not true or false"),
        ([{"text": "\ud800", "train": True}], "half of a surrogate pair", "broken Unicode"),
        ([{"text": "a", "train": False}], "none of its segments is trained", "nothing is trained"),
        ([{"text": "", "train": True}], "none of its segments is trained", "nothing is trained"),
    ],
)
def test_segments_of_another_shape_are_refused_by_their_place(
    segments: Any, message: str, reason: str
) -> None:
    with pytest.raises(RowError) as info:
        read({"segments": segments})
    assert message in str(info.value)
    assert info.value.reason == reason


@pytest.mark.parametrize("value", [None, 7, 1.5, True, b"text", {"role": "user"}, ("a",)])
@pytest.mark.parametrize("column", ["prompt", "response"])
def test_a_value_that_is_no_text_is_refused_by_row_and_column(value: Any, column: str) -> None:
    row = {"prompt": "hello", "response": "world", column: value}
    kind = type(value).__name__
    with pytest.raises(RowError, match=rf"Row 3: column '{column}' holds {kind}, but text") as info:
        read(row)
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
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_column_without_messages_is_refused_by_row_and_column(
    value: Any, found: str, column: str
) -> None:
    with pytest.raises(RowError, match=f"Row 3: column '{column}' holds {found}, but a list like"):
        read({column: value})


@pytest.mark.parametrize("column", ["prompt", "response"])
def test_half_of_a_surrogate_pair_is_refused_with_its_place(column: str) -> None:
    row = {"prompt": "hello", "response": "world", column: LONE_SURROGATE}
    message = f"Row 3: column '{column}' holds half of a surrogate pair at character 2.*Repair"
    with pytest.raises(RowError, match=message) as info:
        read(row)
    assert info.value.reason == "broken Unicode"


def test_a_row_that_contains_itself_is_refused() -> None:
    message: dict[str, Any] = {**USER}
    message["self"] = message
    with pytest.raises(RowError, match="Row 3: its lists and dicts are nested too deep"):
        messages_of(message, ANSWER)


def test_a_row_that_is_no_dict_is_refused() -> None:
    row_format = detect_format(["text"], DataOptions())
    with pytest.raises(RowError, match="Row 3: the row is list, not a dict of columns"):
        to_conversation([], 3, row_format, DataOptions())  # type: ignore[arg-type]


def test_a_tokenized_row_is_no_conversation() -> None:
    with pytest.raises(ValueError, match="Tokenized rows are no conversations"):
        read({"input_ids": [1], "labels": [1]})


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
        assert [segment.text for segment in pair_of(prompt, response).segments] == [
            prompt,
            response,
        ]


TEXTS = st.one_of(
    st.sampled_from(["a", "", " ", LONE_SURROGATE, "assistant", "user", "text", '[{"name": "f"}]']),
    st.text(st.characters(), max_size=5),
)
NAMES = [
    "role",
    "content",
    "train",
    "weight",
    "tool_calls",
    "from",
    "value",
    "type",
    "text",
    "name",
]
KEYS = st.one_of(st.sampled_from(NAMES), TEXTS, st.integers())
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=3), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
        st.tuples(inner),
        st.sets(st.integers(), max_size=2),
    ),
    max_leaves=12,
)
# Rows that are right but for a value or two reach deeper than pure junk does.
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(["user", "assistant", "system"]), JUNK),
        "content": st.one_of(
            TEXTS,
            st.lists(
                st.fixed_dictionaries(
                    {"text": TEXTS},
                    optional={"type": st.just("text"), "train": st.one_of(st.booleans(), JUNK)},
                )
            ),
            JUNK,
        ),
        "from": st.one_of(st.sampled_from(["human", "gpt", "function_call"]), JUNK),
        "value": st.one_of(TEXTS, JUNK),
        "tool_calls": st.one_of(st.lists(st.dictionaries(TEXTS, JUNK)), JUNK),
        "train": st.one_of(st.booleans(), JUNK),
        "weight": st.one_of(st.floats(), JUNK),
        "text": TEXTS,
    },
)
COLUMNS: dict[str, list[str]] = {
    "prompt_response": ["prompt", "response", "tools", "weight"],
    "messages": ["messages", "tools", "weight"],
    "sharegpt": ["conversations", "system", "tools", "weight"],
    "alpaca": ["instruction", "input", "output", "weight"],
    "text": ["text", "weight"],
    "segments": ["segments", "weight"],
    "tokenized": ["input_ids", "labels"],
}


@pytest.mark.parametrize("kind", get_args(RowKind))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_junk_is_a_conversation_or_refused_as_a_row(kind: RowKind, data: st.DataObject) -> None:
    columns = COLUMNS[kind]
    value = st.one_of(TEXTS, JUNK, st.lists(MESSAGE, min_size=1, max_size=3))
    row = data.draw(st.one_of(st.dictionaries(st.sampled_from(columns), value), JUNK))
    options = DataOptions(
        train_on=data.draw(st.sampled_from(get_args(TrainOn))),
        prompt_format=data.draw(st.sampled_from(get_args(PromptFormat))),
        use_loss_mask=data.draw(st.booleans()),
    )
    row_format: RowFormat = detect_format(columns, options)
    assert row_format.kind == kind
    try:
        conversation = to_conversation(row, 3, row_format, options)
    except ValueError as error:
        # Errors are printed and written to files, so they have to be text that can be encoded.
        str(error).encode()
        known = type(error) is RowError or kind == "tokenized"
    else:
        known = bool(conversation.turns) != bool(conversation.segments)
        json.dumps([conversation.messages, conversation.tools], ensure_ascii=False).encode()
    assert known
