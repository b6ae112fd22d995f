"""A response ends where inference stops, even where the chat template writes no stop token."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from hf_sft_plugin import prepare_dataset
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows

EOS, USER, SEEN, S = "<|endoftext|>", "<|user|>", "<|observation|>", "</s>"
# What stands around a response; whether the template ends one that others follow.
AROUND = {
    "glm4": ("\n", USER, True),
    "falcon": (" ", EOS, False),
    "solar": ("", S, False),
    "lines": (" ", S, False),
    "ended_later": ("", S, True),
    "tulu": ("", EOS, True),
}
FAMILY = pytest.mark.parametrize("name", list(AROUND))


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant") * 3) -> Any:
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def expected(name: str, content: str) -> tuple[str, str]:
    before, after, _ = AROUND[name]
    return ("exact", before + content + after)


@FAMILY
@pytest.mark.parametrize("system", [False, True])
def test_a_response_is_trained_through_the_token_at_which_inference_stops(
    name: str,
    system: bool,
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    messages = [{"role": "system", "content": "be brief"}] * system
    messages += chat("hello", "first", "again", "second")
    outcome = tokenize_with(name, messages)
    first, second = expected(name, "first"), expected(name, "second")
    is_joint = AROUND[name][2]
    assert trained_of(name, outcome) == ([[first, second]] if is_joint else [[first], [second]])
    check_inference(name, messages, outcome)
    assert outcome.num_stopped == len(outcome.examples)


@FAMILY
def test_nothing_but_the_stop_token_is_added_to_what_the_template_writes(
    name: str, tokenize_with: Callable[..., Any], tokenizer_of_family: Callable[[str], Any]
) -> None:
    messages, tokenizer = chat("hello", "first"), tokenizer_of_family(name)
    outcome = tokenize_with(name, messages)
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    text = tokenizer.decode(outcome.examples[0]["input_ids"])
    assert outcome.added_stops == ([] if name == "tulu" else [AROUND[name][1]])
    response = "first" + AROUND[name][1]
    assert text == (written if name == "tulu" else written.replace("first", response))


@FAMILY
def test_space_at_the_end_of_a_response_is_kept_before_its_stop_token(
    name: str, tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    outcome = tokenize_with(name, chat("hello", "first \n"))
    content = "first" if name == "falcon" else "first \n"
    assert trained_of(name, outcome) == [[expected(name, content)]]


@FAMILY
def test_a_response_before_turns_that_are_not_trained_stops_too(
    name: str, tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    for messages in (
        chat("hello", "first", "again"),
        [*chat("hello", "first", "again"), {"role": "assistant", "content": "no", "train": False}],
    ):
        outcome = tokenize_with(name, messages)
        assert trained_of(name, outcome) == [[expected(name, "first")]]


@FAMILY
def test_one_example_of_responses_that_the_template_does_not_end_is_refused(
    name: str, tokenize_with: Callable[..., Any]
) -> None:
    outcome = tokenize_with(name, chat("hello", "first", "again", "second"), multi_turn="joint")
    if AROUND[name][2]:
        assert outcome.error is None
    else:
        assert outcome.error.reason == "no stop token after the response"
        assert "multi_turn" in str(outcome.error)


@FAMILY
def test_each_response_of_one_side_in_a_row_stops_before_the_header_of_the_next(
    name: str, tokenize_with: Callable[..., Any], tokenizer_of_family: Callable[[str], Any]
) -> None:
    messages = chat("hello", "first", "more", roles=("user", "assistant", "assistant"))
    outcome = tokenize_with(name, messages)
    assert outcome.error is None, outcome.error
    spans = [
        tokenizer_of_family(name).decode(example["input_ids"][span.start : span.end])
        for example, made in zip(outcome.examples, outcome.spans, strict=True)
        for span in made
    ]
    assert spans == [expected(name, "first")[1], expected(name, "more")[1]]


def test_a_header_that_only_the_turns_before_open_is_not_trained(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
        "<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template)
    messages = chat("hello", "first", "more", roles=("user", "assistant", "assistant"))
    (outcome,) = tokenize_rows([{"messages": messages}], [0], tokenizer, make_options({}))
    told = [
        (span.kind, tokenizer.decode(example["input_ids"][span.start : span.end]))
        for example, made in zip(outcome.examples, outcome.spans, strict=True)
        for span in made
    ]
    assert told == [("exact", "first<|im_end|>"), ("shared_prefix", "more<|im_end|>")]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_call_stops_where_the_answer_of_the_tool_begins(
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    messages = [
        *chat("hello"),
        {"role": "assistant", "tool_calls": [call("look", at="it")]},
        {"role": "tool", "content": "seen"},
        {"role": "assistant", "content": "so"},
    ]
    asked, told = ("exact", '\nlook\n{"at": "it"}' + SEEN), ("exact", "\nso" + USER)
    outcome = tokenize_with("glm4", messages)
    assert trained_of("glm4", outcome) == [[asked, told]]
    check_inference("glm4", messages, outcome)
    # Behind a call that ends the chat stands what would follow it.
    assert trained_of("glm4", tokenize_with("glm4", messages[:2])) == [[asked]]


def test_a_call_that_is_written_in_place_of_a_content_stops_where_its_answer_begins(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template, eos_token=EOS)
    tokenizer.add_tokens([USER, SEEN, "<|assistant|>"], special_tokens=True)
    stops = tokenizer.convert_tokens_to_ids([EOS, USER, SEEN])
    messages = [
        *chat("hello"),
        {"role": "assistant", "content": "", "tool_calls": [call("look", at="it")]},
        {"role": "tool", "content": "seen"},
    ]
    for row in (messages, messages[:2]):
        (outcome,) = tokenize_rows([{"messages": row}], [0], tokenizer, make_options({}), stops)
        assert outcome.error is None, outcome.error
        (example,), ((span,),) = outcome.examples, outcome.spans
        told = tokenizer.decode(example["input_ids"][span.start : span.end])
        assert told == '{"name": "look", "arguments": {"at": "it"}}' + SEEN
        assert example["response_mask"][span.start : span.end] == [1] * (span.end - span.start)


def test_reasoning_that_a_later_turn_makes_the_template_drop_does_not_hide_the_stop_token(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    messages = chat("hello", "first", "again", "second")
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "why"
    outcome = tokenize_with("glm4", messages)
    assert trained_of("glm4", outcome) == [
        [("exact", "\n<think>why</think>\nfirst" + USER)],
        [("exact", "\n<think>why</think>\nsecond" + USER)],
    ]


@pytest.mark.parametrize("control_tokens", ["text", "keep"])
def test_a_stop_token_that_a_response_speaks_of_is_not_its_own(
    control_tokens: str, tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    messages = chat(f"hello {USER}", f"say {USER} now", "again", "second")
    outcome = tokenize_with("glm4", messages, control_tokens=control_tokens)
    said, second = expected("glm4", f"say {USER} now"), expected("glm4", "second")
    assert trained_of("glm4", outcome) == [[said, second]]


@pytest.mark.parametrize(
    ("name", "stop_token", "stop"),
    [("glm4", USER, USER), ("glm4", EOS, EOS), ("falcon", EOS, EOS), ("solar", S, S)],
)
def test_a_stop_token_that_is_named_ends_every_response(
    name: str,
    stop_token: str,
    stop: str,
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
) -> None:
    outcome = tokenize_with(name, chat("hello", "first", "again", "second"), stop_token=stop_token)
    told = [text for example in trained_of(name, outcome) for _, text in example]
    before = AROUND[name][0]
    assert told == [before + "first" + stop, before + "second" + stop]


def test_a_template_that_ends_turns_in_another_token_is_still_refused(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(eos_token="<|endoftext|>")
    rows = [{"messages": chat("hello", "first")}]
    (outcome,) = tokenize_rows(rows, [0], tokenizer, make_options({}))
    assert outcome.error is not None
    assert outcome.error.reason == "no stop token after the response"
    (outcome,) = tokenize_rows(rows, [0], tokenizer, make_options({"stop_token": "<|im_end|>"}))
    assert outcome.num_stopped == 1


def test_the_ledger_says_which_stop_token_was_added(
    tokenizer_of_family: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_of_family("glm4")
    rows = Dataset.from_list([{"messages": chat(f"q {n}", f"a {n}")} for n in range(8)])
    ids = tokenizer.convert_tokens_to_ids([EOS, USER, SEEN])
    _, ledger = prepare_dataset(rows, tokenizer, stop_token_ids=ids)
    assert ledger.num_stopped == 8
    (remark,) = ledger.num_remarks
    assert repr(USER) in remark
    assert ledger.num_remarks[remark] == 8
    # Where nothing is known of the model, its tokenizer's eos token is what inference waits for.
    _, ledger = prepare_dataset(rows, tokenizer)
    (remark,) = ledger.num_remarks
    assert repr(EOS) in remark
