"""What a template drops of a trained response costs the row; how it writes it does not."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError, prepare_dataset
from hf_sft_plugin.masks.content_markers import core_of
from hf_sft_plugin.masks.written_parts import check_written
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows
from hf_sft_plugin.types import Turn

START = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ ARGUMENTS }})]{% endfor %}"
CONTENT = "{{ m.content or '' }}"


def template(*parts: str, arguments: str = "c.function.arguments | tojson") -> str:
    return START + "".join(parts).replace("ARGUMENTS", arguments) + END


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def answer(**message: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", **message}]


@pytest.fixture(scope="module")
def reason_with(tokenizer_factory: Callable[..., Any]) -> Callable[..., str | None]:
    """Why a row is set aside under a template; None where it is trained."""

    def reason(source: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
        tokenizer = tokenizer_factory(chat_template=source)
        rows = [{"messages": messages}]
        (outcome,) = tokenize_rows(rows, [0], tokenizer, make_options(options))
        return None if outcome.error is None else outcome.error.reason

    return reason


CALLING = {"tool_calls": [call("look", {"at": "Bern"})]}
TWO = {"tool_calls": [call("look", {"at": "Bern"}), call("look", {"at": "Oslo"})]}
DROPS_CALLS = "the chat template drops tool calls of a response"
DROPS_REASONING = "the chat template drops reasoning of a response"
DROPS_CONTENT = "the chat template drops a content of a response"
STOPPED = "a stop token within a response"
CONTINUES = "response does not continue the generation prompt"


@pytest.mark.parametrize(
    ("parts", "message", "reason"),
    [
        ((CONTENT,), {"content": "", **CALLING}, DROPS_CALLS),
        ((CONTENT,), {"content": "I look at Bern.", **CALLING}, DROPS_CALLS),
        ((CONTENT,), {"reasoning_content": "look at Bern", "content": "so", **CALLING},
         DROPS_REASONING),
        ((CONTENT, CALLS), {"content": "", **CALLING}, None),
        ((CONTENT, CALLS.replace("ARGUMENTS", "''")), CALLING, DROPS_CALLS),
        ((CONTENT, CALLS.replace("c.function.name", "''")), CALLING, DROPS_CALLS),
        ((CONTENT, CALLS), TWO, None),
        ((CONTENT, CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")), TWO,
         DROPS_CALLS),
        # The content is dropped where there are calls.
        (("{% if m.tool_calls %}", CALLS, "{% else %}", CONTENT, "{% endif %}"),
         {"content": "I look.", **CALLING}, DROPS_CONTENT),
        ((CONTENT,), {"content": "so", "reasoning_content": "why"}, DROPS_REASONING),
        ((CONTENT,), {"content": "so", "thinking": "why"}, DROPS_REASONING),
        (("{{ m.reasoning_content }}", CONTENT), {"content": "so", "reasoning_content": "why"},
         None),
        (("{{ m.content.split('</think>')[-1] }}",), {"content": "<think>why</think>so"},
         DROPS_REASONING),
        (("{{ m.content.split('</think>')[-1] }}",), {"content": "<think>\n</think>so"}, None),
        # Not as it was given, but there.
        (("{{ m.content | upper }}",), {"content": "so"}, None),
        (("{{ m.content | replace('<think>', '[T]') | replace('</think>', '[/T]') }}",),
         {"content": "<think>why</think>so"}, None),
    ],
)  # fmt: skip
def test_a_row_of_which_a_trained_part_is_not_written_is_set_aside_with_the_reason(
    parts: tuple[str, ...],
    message: dict[str, Any],
    reason: str | None,
    reason_with: Callable[..., str | None],
) -> None:
    assert reason_with(template(*parts), answer(**message)) == reason


def test_what_is_dropped_of_turns_that_are_not_trained_costs_nothing(
    reason_with: Callable[..., str | None],
) -> None:
    messages = [*answer(content="", **CALLING), {"role": "tool", "content": "1"}]
    messages.append({"role": "assistant", "content": "so"})
    assert reason_with(template(CONTENT), messages) == DROPS_CALLS
    assert reason_with(template(CONTENT), messages, train_on="last_response") is None


def test_reasoning_that_is_dropped_from_earlier_turns_alone_costs_nothing(
    reason_with: Callable[..., str | None],
) -> None:
    shown = "{% if m.reasoning_content and loop.last %}{{ m.reasoning_content }}{% endif %}"
    messages = 2 * answer(content="so", reasoning_content="why")
    for multi_turn in ("auto", "joint", "split"):
        assert reason_with(template(shown, CONTENT), messages, multi_turn=multi_turn) is None
    # Never shown, it is not the earlier turns' alone.
    assert reason_with(template(CONTENT), messages) == DROPS_REASONING


def test_the_ledger_names_what_was_dropped_and_the_cure(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(chat_template=template(CONTENT))
    rows = Dataset.from_list([{"messages": answer(content="", **CALLING)}] + [
        {"messages": answer(content="so")} for _ in range(3)
    ])  # fmt: skip
    _, ledger = prepare_dataset(rows, tokenizer, max_dropped_share=0.5)
    assert ledger.num_rows_trained == 3
    assert ledger.drops[DROPS_CALLS].first_rows == [0]
    assert "tool_calls" in ledger.drops[DROPS_CALLS].example
    assert "'look'" in ledger.drops[DROPS_CALLS].example


ARGUMENTS = {
    "city": "Z\u00fc\"rich\n\\n <b> & '\U0001f600' stra\u00dfe \U0001d49c",
    "number": 3,
    "float": 2.5,
    "whole": 4.0,
    "flag": True,
    "nested": {"list": ["deep", {"off": False, "none": None}]},
    "empty": "",
    "sign": "+",
}


def python(value: Any) -> str:
    return ", ".join(f"{key}={item!r}" for key, item in value.items())


def xml(value: Any) -> str:
    told = {key: item if isinstance(item, str) else json.dumps(item) for key, item in value.items()}
    return "".join(f"<parameter={key}>\n{item}\n</parameter>" for key, item in told.items())


WRITERS: dict[str, Callable[[Any], str]] = {
    "json": json.dumps,
    "unicode": lambda value: json.dumps(value, ensure_ascii=False),
    "tight": lambda value: json.dumps(value, separators=(",", ":"), sort_keys=True),
    "indented": lambda value: json.dumps(value, indent=4),
    "within json": lambda value: json.dumps({"arguments": json.dumps(value)}),
    "within json twice": lambda value: json.dumps(json.dumps({"arguments": json.dumps(value)})),
    "escaped for html": lambda value: (
        json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    ),
    "entities": lambda value: json.dumps(value).replace("&", "&amp;").replace("<", "&lt;"),
    "python": python,
    "repr": repr,
    "xml": xml,
}


def check(arguments: Any, text: str) -> None:
    turn = Turn({"role": "assistant", "tool_calls": [call("look_up", arguments)]}, True)
    check_written(turn, 1, core_of(turn.message), None, text, (0, len(text)), True, 0)


@pytest.mark.parametrize("writer", list(WRITERS))
def test_a_call_is_found_in_whatever_notation_it_is_written(writer: str) -> None:
    text = f"call look_up: {WRITERS[writer](ARGUMENTS)}"
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, ensure_ascii=False)):
        check(arguments, text)


VALUE = st.recursive(
    st.one_of(st.text(max_size=8), st.integers(), st.booleans(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80)
@given(
    arguments=st.dictionaries(st.text(max_size=5), VALUE, max_size=4),
    writer=st.sampled_from(sorted({*WRITERS} - {"python", "xml"})),
    is_text=st.booleans(),
)
def test_no_call_that_is_written_is_refused(arguments: Any, writer: str, is_text: bool) -> None:
    given_as = json.dumps(arguments, ensure_ascii=False) if is_text else arguments
    check(given_as, "look_up " + WRITERS[writer](arguments))


@settings(deadline=None, max_examples=60)
@given(
    arguments=st.dictionaries(
        st.text("abcdefg", min_size=3, max_size=5), st.integers(100, 999), min_size=1, max_size=4
    ),
    writer=st.sampled_from(sorted(WRITERS)),
    data=st.data(),
)
def test_a_call_that_lacks_an_argument_is_refused(arguments: Any, writer: str, data: Any) -> None:
    lost = data.draw(st.sampled_from(sorted(arguments)))
    others = {key: 7000 for key in arguments if key != lost}
    with pytest.raises(RowError, match="the arguments of the tool call 'look_up'"):
        check({**others, lost: arguments[lost]}, "look_up " + WRITERS[writer](others))


def test_a_content_of_signs_alone_is_looked_for_as_it_is(
    reason_with: Callable[..., str | None],
) -> None:
    assert reason_with(template(CONTENT), answer(content="!?")) is None
    assert reason_with(template("so"), answer(content="!?")) == DROPS_CONTENT


THOUGHT_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}{{ m.reasoning_content }}<|endoftext|>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{% if m.content %}<|endoftext|>{% endif %}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}" + END
)


@pytest.mark.parametrize("multi_turn", ["auto", "joint", "split"])
@pytest.mark.parametrize(
    "message",
    [
        {"content": "", "reasoning_content": "I need it", **CALLING},
        {"content": "so", "reasoning_content": "I need it"},
        {"content": "sure", **CALLING},
    ],
)
def test_a_stop_token_before_the_end_of_a_response_costs_the_row_in_every_layout(
    message: dict[str, Any], multi_turn: str, tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory(chat_template=THOUGHT_FIRST)
    following = [{"role": "tool", "content": "42"}, {"role": "assistant", "content": "done"}]
    options = make_options({"multi_turn": multi_turn})
    for more in ([], following, following + answer(**message)):
        row = {"messages": answer(**message) + more}
        (outcome,) = tokenize_rows([row], [0], tokenizer, options, [0, 2])
        assert outcome.error is not None
        assert outcome.error.reason == STOPPED
        assert "stop_token" in str(outcome.error)
        (outcome,) = tokenize_rows([row], [0], tokenizer, options, [2])
        assert outcome.error is None, outcome.error


LAST_OR_NONE = "loop.last or not m.tool_calls"
# Each call ends in a stop token of its own, and some openings are not written.
EACH_CALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}<|endoftext|>{% endfor %}"
    "{{ '<|im_end|>\n' if LAST }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)


@pytest.mark.parametrize("multi_turn", ["auto", "joint", "split"])
@pytest.mark.parametrize("last", ["true", LAST_OR_NONE, "not m.tool_calls"])
@pytest.mark.parametrize("opening", ["", "<think>\n\n</think>\n\n", "to=user "])
def test_no_span_goes_beyond_a_stop_token(
    opening: str, last: str, multi_turn: str, tokenizer_factory: Callable[..., Any]
) -> None:
    source = EACH_CALL.replace("LAST", last).replace("OPENING", opening)
    tokenizer = tokenizer_factory(chat_template=source)
    options = make_options({"multi_turn": multi_turn})
    tool, done = {"role": "tool", "content": "42"}, {"role": "assistant", "content": "done"}
    called = '{"name": "look", "arguments": {"at": "Bern"}}<|endoftext|>'
    calling = {"role": "assistant", "content": "", **CALLING}
    for more in ([], [calling], [tool, done], [tool, calling], [tool, calling, tool, done]):
        row = {
            "messages": [*answer(content="one"), {"role": "user", "content": "q"}, calling, *more]
        }
        (outcome,) = tokenize_rows([row], [0], tokenizer, options, [0, 2])
        told = [
            tokenizer.decode(example["input_ids"][span.start : span.end])
            for example, spans in zip(outcome.examples, outcome.spans, strict=True)
            for span in spans
        ]
        assert {*told} <= {"one<|im_end|>", "done<|im_end|>", called}
        assert told or outcome.error is not None
        # Neither such an opening nor a missing end goes on as inference would.
        is_other = opening == "to=user " or (last == LAST_OR_NONE and more == [calling])
        assert (outcome.error is None) is not is_other or multi_turn == "joint"
    row = {"messages": answer(content="", **TWO)}
    (outcome,) = tokenize_rows([row], [0], tokenizer, options, [0, 2])
    assert outcome.error is not None
    assert outcome.error.reason == (STOPPED if opening != "to=user " else CONTINUES)


def test_escapes_that_are_no_characters_are_letters_like_others(
    reason_with: Callable[..., str | None],
) -> None:
    for told in ("\\Udeadbeef", "\\U00110000", "\\U0000d800", "\\U0010ffff"):
        message = {"tool_calls": [call("look", {"at": told})]}
        assert reason_with(template(CONTENT, CALLS), answer(**message)) is None
        assert reason_with(template(CONTENT), answer(**message)) == DROPS_CALLS


NO_THOUGHT = template("{{ m.content.split('</think>')[-1] }}")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [((1, 0), DROPS_REASONING), ((1, 1), DROPS_REASONING), ((0, 1), None)],
)
def test_only_reasoning_that_is_not_trained_may_be_dropped_from_a_content(
    weights: tuple[int, int], reason: str | None, reason_with: Callable[..., str | None]
) -> None:
    texts = ("<think>why</think>so ", "then")
    if not weights[0]:
        texts = ("<think>why</think>", "so then")
    parts = [
        {"type": "text", "text": text, "weight": weight}
        for text, weight in zip(texts, weights, strict=True)
    ]
    assert reason_with(NO_THOUGHT, answer(content=parts)) == reason


NAMED = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"


def test_arguments_are_not_found_in_the_names_of_calls(
    reason_with: Callable[..., str | None],
) -> None:
    for arguments in ({"level": 1}, {"level": "set"}, '{"level": 1}', "level 1"):
        calls = {"tool_calls": [call("set_level_1", arguments), call("set_level_1", arguments)]}
        assert reason_with(template(NAMED), answer(**calls)) == DROPS_CALLS
        assert reason_with(template(CALLS), answer(**calls)) is None


@pytest.mark.parametrize("order", ["{n}({a})", "({a}).{n}"])
def test_arguments_that_hold_the_names_of_calls_are_found(order: str) -> None:
    calls = [
        call("search", {"q": "search now", "search": "get"}),
        call("search", {"q": "b", "search_get": 1}),
        call("get", '{"search": "get"}'),
        call("get_search", {}),
    ]
    text = " ".join(
        order.format(n=c["function"]["name"], a=c["function"]["arguments"]) for c in calls
    )
    turn = Turn({"role": "assistant", "tool_calls": calls}, train=True)
    check_written(turn, 1, (0, 0), None, text, (0, len(text)), True, 0)


OLD_CALL = "{% if m.function_call %}{{ m.function_call | tojson }}{% endif %}"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_call_under_its_old_name_is_a_response(
    content: dict[str, Any], tokenizer_factory: Callable[..., Any]
) -> None:
    """As rows for the first API with functions have it: no content, and no tool_calls."""
    tokenizer = tokenizer_factory(chat_template=template(CONTENT, OLD_CALL))
    made = {"name": "look", "arguments": '{"at": "B"}'}
    messages = answer(**content, function_call=made, tool_calls=None)
    messages += [{"role": "function", "name": "look", "content": "42"}, *answer(content="so")[1:]]
    (outcome,) = tokenize_rows([{"messages": messages}], [0], tokenizer, make_options({}))
    assert outcome.error is None, outcome.error
    (example,), (spans,) = outcome.examples, outcome.spans
    told = [tokenizer.decode(example["input_ids"][s.start : s.end]) for s in spans]
    assert told == [json.dumps(made) + "<|im_end|>", "so<|im_end|>"]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_call_under_its_old_name_that_is_not_written_costs_the_row(
    content: dict[str, Any], reason_with: Callable[..., str | None]
) -> None:
    made = {"function_call": {"name": "look", "arguments": '{"at": "B"}'}}
    assert reason_with(template(CONTENT), answer(**content, **made)) == DROPS_CALLS
    assert reason_with(template(CONTENT, CALLS), answer(**content, **made)) == DROPS_CALLS
    none = {"function_call": {"name": None, "arguments": None}}
    reason = reason_with(template(CONTENT, OLD_CALL), answer(**content, **none))
    assert reason == (
        "empty response" if content == {"content": ""} else "message content is not text"
    )


def test_a_call_under_its_old_name_has_to_be_written(
    reason_with: Callable[..., str | None],
) -> None:
    message = {"content": "I look.", "function_call": {"name": "look", "arguments": '{"at": "B"}'}}
    old = "{% if m.function_call %}{{ m.function_call.name }}{{ m.function_call.arguments }}"
    assert reason_with(template(CONTENT), answer(**message)) == DROPS_CALLS
    assert reason_with(template(CONTENT, old, "{% endif %}"), answer(**message)) is None
    # Those who moved the call to the new key lose nothing, nor those who made none.
    both = {**message, "tool_calls": [call("look", {"at": "B"})]}
    assert reason_with(template(CONTENT, CALLS), answer(**both)) is None
    none = {"content": "so", "function_call": {"name": None, "arguments": None}}
    assert reason_with(template(CONTENT), answer(**none)) is None
