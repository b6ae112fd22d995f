"""What of a chat is trained, for templates in the manner of every family that people train."""

from collections.abc import Callable
from typing import Any

import pytest

from hf_sft_plugin import tokenize_example
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows

IM, EOT, END = "<|im_end|>", "<|eot|>", "<|end_of_text|>"
EMPTY = "<think>\n\n</think>\n\n"
FINAL = "<|channel|>final<|message|>"
# What stands around a trained content that the template writes as it is (or trimmed).
AROUND = {
    "chatml": ("", IM),
    "default_system": ("", IM),
    "llama3": ("", EOT),
    "gemma": ("", EOT),
    "mistral": (" ", "</s>"),
    "llama2": (" ", " </s>"),
    "phi": ("", "<|end|>"),
    "deepseek": ("", END),
    "deepseek_forgets": ("", END),
    "qwen3": (EMPTY, IM),
    "qwen3_no_thinking": ("", IM),
    "channels": (FINAL, "<|return|>"),
    "hermes": ("", IM),
    "words": ("", "</s>"),
    "marked": ("", IM),
}
TRIMS = {"llama3", "gemma", "mistral", "llama2", "words"}
TRIMS_NEWLINES = {"qwen3", "qwen3_no_thinking"}
# The generation prompt opens a thought that these answers do not have.
SHARED = {"deepseek", "deepseek_forgets"}
# An earlier response is written otherwise than the last one.
EARLIER = {
    "qwen3": "first<|im_end|>",
    "qwen3_no_thinking": "first<|im_end|>",
    "channels": FINAL + "first<|end|>",
}
CONTENTS = [
    "a",
    "assistant",
    "echo",
    "  edged on both sides \n",
    "\n\nedged by lines\n\n",
    "\u3000wide space\u00a0",
    "\U0001f468\u200d\U0001f469 e\u0301 \u0301 \u05d0\u0627 \ufb01",
    '<b>{"json": [1]}</b>',
    "<tool_response>x</tool_response>",
    "NUL \x00 and \x1f",
    "#",
    "\U000f0000 \U000f0001 \U00100000 \ue000",
]
THOUGHT = "<think>\nwhy\n</think>\n\nso"
THINKING = {
    "mistral": ("exact", " " + THOUGHT + "</s>"),
    "llama2": ("exact", " " + THOUGHT + " </s>"),
    "deepseek": ("exact", "why\n</think>\n\nso" + END),
    "qwen3": ("exact", THOUGHT + IM),
    "channels": ("exact", FINAL + THOUGHT + "<|return|>"),
}


def chat(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def expected(family: str, content: str) -> tuple[str, str]:
    before, after = AROUND[family]
    if family in TRIMS:
        content = content.strip()
    elif family in TRIMS_NEWLINES:
        content = content.lstrip("\n")
    return ("shared_prefix" if family in SHARED else "exact", before + content + after)


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_response_is_trained_from_the_generation_prompt_through_its_stop_token(
    family: str,
    content: str,
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    messages = chat(("user", "hello"), ("assistant", content))
    outcome = tokenize_with(family, messages)
    assert trained_of(family, outcome) == [[expected(family, content)]]
    check_inference(family, messages, outcome)


@pytest.mark.parametrize("text", ["echo", "user", "assistant", "model", "system", "\n.", "n"])
def test_what_both_sides_say_alike_is_told_apart(
    family: str,
    text: str,
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    messages = chat(("user", text), ("assistant", text), ("user", text), ("assistant", text))
    outcome = tokenize_with(family, messages)
    one = expected(family, text)
    # Where a control token swallows how a response begins, only its own example shows it cut.
    is_split = family in EARLIER or (family, text) == ("phi", "\n.")
    assert trained_of(family, outcome) == ([[one], [one]] if is_split else [[one, one]])
    check_inference(family, messages, outcome)


def test_a_straddled_earlier_response_leaves_later_contexts_as_inference_feeds_them(
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    messages = chat(("user", "q"), ("assistant", "\n."), ("user", "q"), ("assistant", "a"))
    outcome = tokenize_with("phi", messages)
    check_inference("phi", messages, outcome)
    first, second = ("exact", "\n.<|end|>"), ("exact", "a<|end|>")
    assert trained_of("phi", outcome) == [[first], [second]]
    # In one example the second context is not as inference would feed it, and is said not to be.
    outcome = tokenize_with("phi", messages, multi_turn="joint")
    assert trained_of("phi", outcome) == [[first, ("rewritten", "a<|end|>")]]


@pytest.mark.parametrize("multi_turn", ["auto", "joint", "split"])
@pytest.mark.parametrize("system", [None, "", "be brief"])
def test_a_conversation_becomes_one_example_or_one_per_response(
    family: str,
    system: str | None,
    multi_turn: str,
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    messages = chat(
        ("user", "hello"), ("assistant", "first"), ("user", "again"), ("assistant", "second")
    )
    if system is not None:
        messages = chat(("system", system)) + messages
    outcome = tokenize_with(family, messages, multi_turn=multi_turn)
    if family == "gemma" and system is not None:
        assert outcome.error.reason == "refused by the chat template"
        return
    first, second = expected(family, "first"), expected(family, "second")
    if multi_turn == "split" or (multi_turn == "auto" and family in EARLIER):
        examples = [[first], [second]]
    elif family in EARLIER:
        examples = [[("rewritten", EARLIER[family]), second]]
    else:
        examples = [[first, second]]
    assert trained_of(family, outcome) == examples
    check_inference(family, messages, outcome)


def test_reasoning_in_the_content_is_trained_where_the_template_shows_it(
    family: str,
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    messages = chat(("user", "hello"), ("assistant", THOUGHT))
    outcome = tokenize_with(family, messages)
    if family == "qwen3_no_thinking":
        assert outcome.error.reason == "response does not continue the generation prompt"
        return
    if family == "deepseek_forgets":
        assert outcome.error.reason == "the chat template drops reasoning of a response"
        return
    default = ("exact", THOUGHT + AROUND[family][1])
    assert trained_of(family, outcome) == [[THINKING.get(family, default)]]
    check_inference(family, messages, outcome)


def test_reasoning_of_earlier_turns_stands_in_no_later_context_where_templates_drop_it(
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    tokenizer_of_family: Callable[[str], Any],
) -> None:
    messages = chat(
        ("user", "hello"), ("assistant", THOUGHT), ("user", "again"), ("assistant", "fin")
    )
    outcome = tokenize_with("deepseek", messages)
    first, second = trained_of("deepseek", outcome)
    assert first == [("exact", "why\n</think>\n\nso" + END)]
    assert second == [("shared_prefix", "fin" + END)]
    assert tokenizer_of_family("deepseek").decode(outcome.examples[1]["input_ids"]) == (
        "<|bos|><|User|>hello<|Assistant|>\n\nso<|end_of_text|><|User|>again<|Assistant|>fin"
        "<|end_of_text|>"
    )


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("chatml", (("<think>why</think>", False), ("so", True)), "so" + IM),
        ("chatml", (("<think>wh", False), ("y</think>so", True)), "y</think>so" + IM),
        ("chatml", (("<think>why</think>", True), ("so", False)), "<think>why</think>" + IM),
        ("chatml", (("  ", False), ("so", True), (" \n", False)), "so" + IM),
        # Trimmed, moved behind the generation prompt, dropped, and written otherwise.
        ("llama3", (("  ", False), ("so", True), (" \n", False)), "so<|eot|>"),
        ("deepseek", (("<think>\nwhy</think>", False), ("so", True)), "so" + END),
        ("deepseek_forgets", (("<think>\nwhy</think>", False), ("so", True)), "so" + END),
        ("qwen3", (("<think>why</think>", False), ("so", True)), None),
        ("qwen3", ((" ", False), ("so", True)), "<think>\n\n</think>\n\nso" + IM),
    ],
)
def test_a_part_that_is_not_to_be_trained_is_not_even_where_it_is_reasoning_or_space(
    name: str,
    parts: tuple[tuple[str, bool], ...],
    expected: str | None,
    tokenize_with: Callable[..., Any],
    tokenizer_of_family: Callable[[str], Any],
) -> None:
    content = [{"type": "text", "text": text, "train": train} for text, train in parts]
    row = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    outcome = tokenize_with(name, row)
    if expected is None:
        assert outcome.error.reason == "parts of a content cannot be found"
        return
    (example,) = outcome.examples
    pairs = zip(example["input_ids"], example["response_mask"], strict=True)
    told = tokenizer_of_family(name).decode([token for token, mark in pairs if mark])
    assert told == expected


def test_reasoning_beside_the_content_is_trained(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    row = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so"}]
    row[1]["reasoning_content"] = "why"
    assert trained_of("qwen3", tokenize_with("qwen3", row)) == [[("exact", THOUGHT + IM)]]
    row[1]["thinking"] = "why"
    channels = "<|channel|>analysis<|message|>why<|end|><|start|>assistant" + FINAL
    outcome = tokenize_with("channels", row, stop_token="<|return|>")
    assert trained_of("channels", outcome) == [[("exact", channels + "so<|return|>")]]
    # Where inference stops behind the reasoning, it never writes the content.
    outcome = tokenize_with("channels", row)
    assert outcome.error is not None
    assert outcome.error.reason == "a stop token within a response"


def call(arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


CALL = '\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("content", [None, "", "let me see"])
def test_tool_calls_are_trained_and_answers_of_tools_are_not(
    content: str | None,
    tokenize_with: Callable[..., Any],
    trained_of: Callable[..., Any],
    check_inference: Callable[..., None],
) -> None:
    asked = {"role": "assistant", "content": content, "tool_calls": call({"a": 1})}
    messages = [
        {"role": "user", "content": "q"},
        {key: value for key, value in asked.items() if value is not None},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "one"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "assistant"}}]
    outcome = tokenize_with("hermes", {"messages": messages, "tools": tools})
    assert trained_of("hermes", outcome) == [
        [("exact", (content or "") + CALL + IM), ("exact", "one" + IM)]
    ]
    check_inference("hermes", messages, outcome, tools=tools)
    outcome = tokenize_with("qwen3", messages)
    assert trained_of("qwen3", outcome) == [
        [("exact", EMPTY + (content or "") + CALL + IM)],
        [("exact", EMPTY + "one" + IM)],
    ]


def test_a_call_before_an_empty_answer_of_a_tool_and_another_call_ends_at_its_own_stop_token(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": call({"a": 1})},
        {"role": "tool", "content": ""},
        {"role": "assistant", "tool_calls": call({"a": 1})},
    ]
    outcome = tokenize_with("hermes", messages)
    assert trained_of("hermes", outcome) == [[("exact", CALL + IM), ("exact", CALL + IM)]]


def test_private_characters_in_the_prompt_do_not_make_the_header_trained(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    outcome = tokenize_with("deepseek", chat(("user", "\U000f0000"), ("assistant", "a")))
    assert trained_of("deepseek", outcome) == [[("shared_prefix", "a" + END)]]


def test_private_characters_in_the_prompt_do_not_cost_the_row(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    outcome = tokenize_with("chatml", chat(("user", "\U000f0000"), ("assistant", "a")))
    assert trained_of("chatml", outcome) == [[("exact", "a" + IM)]]


def test_a_call_that_begins_like_the_generation_prompt_goes_on_is_trained_whole(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": call({})}]
    (example,) = tokenize_example({"messages": messages}, tokenizer)
    assert trained_text(example, tokenizer) == "<tool_call>f</tool_call><|im_end|>"


@pytest.mark.parametrize("content", ["", "sure"])
def test_a_thought_that_the_generation_prompt_has_closed_is_not_trained(
    content: str, tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    response = {"role": "assistant", "content": content, "tool_calls": call({"a": 1})}
    messages = [{"role": "user", "content": "q"}, response]
    outcome = tokenize_with("qwen3_no_thinking", messages)
    ((told,),) = trained_of("qwen3_no_thinking", outcome)
    assert told[0] == "exact"
    outcome = tokenize_with(
        "qwen3_no_thinking", [messages[0], {**response, "reasoning_content": "I need it"}]
    )
    assert outcome.error is not None
    assert outcome.error.reason == "response does not continue the generation prompt"


def test_a_content_that_begins_like_the_generation_prompt_goes_on_is_trained_whole(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    for text in ("<table>", "<think", "<", "<thin>king", "<think>so"):
        outcome = tokenize_with("deepseek", chat(("user", "q"), ("assistant", text)))
        assert trained_of("deepseek", outcome) == [[("shared_prefix", text + END)]]


def test_a_trimmed_or_upper_cased_response_is_told_from_an_altered_one(
    tokenizer_factory: Callable[..., Any], tokenize_with: Callable[..., Any]
) -> None:
    assert not tokenize_with("llama3", chat(("user", "q"), ("assistant", " a "))).is_altered
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template)
    messages = chat(("user", "q"), ("assistant", "abc"))
    (outcome,) = tokenize_rows([{"messages": messages}], [0], tokenizer, make_options({}))
    assert outcome.is_altered
    assert trained_text(outcome.examples[0], tokenizer) == "ABC<|im_end|>"


def trained_text(example: Any, tokenizer: Any) -> str:
    pairs = zip(example["input_ids"], example["response_mask"], strict=True)
    return str(tokenizer.decode([token for token, mark in pairs if mark]))


def test_short_answers_after_a_tool_response_that_the_template_looks_for_are_kept(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    messages = chat(
        ("user", "q"),
        ("assistant", "<think>\nwhy\n</think>\n\n1"),
        ("user", "<tool_response>x</tool_response>"),
        ("assistant", "a"),
    )
    assert trained_of("qwen3", tokenize_with("qwen3", messages)) == [
        [("exact", "<think>\nwhy\n</think>\n\n1" + IM), ("exact", EMPTY + "a" + IM)]
    ]


def test_an_empty_answer_of_a_tool_at_the_end_is_not_trained(
    tokenize_with: Callable[..., Any], trained_of: Callable[..., Any]
) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": call({"a": 1})},
        {"role": "tool", "content": ""},
    ]
    assert trained_of("hermes", tokenize_with("hermes", messages)) == [[("exact", CALL + IM)]]


@pytest.mark.parametrize("leading", [1, 2, 3])
@pytest.mark.parametrize("prompted", ["", " and messages[-1].role != 'assistant'"])
def test_all_responses_before_the_first_prompt_are_context(
    leading: int,
    prompted: str,
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        f"{{% endfor %}}{{% if add_generation_prompt{prompted} %}}<|im_start|>assistant\n"
        "{% endif %}"
    )
    opening = [("assistant", "hi")] * leading
    row = {"messages": chat(*opening, ("user", "q"), ("assistant", "a"))}
    (example,) = tokenize_example(row, tokenizer)
    pairs = zip(example["input_ids"], example["response_mask"], strict=True)
    assert tokenizer.decode([token for token, trained in pairs if trained]) == "a<|im_end|>"
    (outcome,) = tokenize_rows([{"messages": chat(*opening)}], [0], tokenizer, make_options({}))
    assert outcome.error is not None
    assert outcome.error.reason == "response without a prompt"


ANSWER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nAnswer: {% endif %}"
)


def test_what_the_generation_prompt_writes_of_a_content_is_not_trained(
    tokenizer_factory: Callable[..., Any],
) -> None:
    """Inference supplies it. Most rows do not have it, and all are rendered alike."""
    tokenizer = tokenizer_factory(chat_template=ANSWER)
    contents = ["none", "so", "Answer", "Answer: ", "Answer: yes", "Answer: Answer: yes"]
    rows = [
        {"messages": chat(("user", f"q{n}"), ("assistant", text))}
        for n, text in enumerate(contents * 3)
    ]
    outcomes = tokenize_rows(rows, range(len(rows)), tokenizer, make_options({}))
    for number, (text, outcome) in enumerate(zip(contents * 3, outcomes, strict=True)):
        if text == "Answer: ":
            assert outcome.error is not None
            assert outcome.error.reason == "empty response"
            continue
        (example,), ((span,),) = outcome.examples, outcome.spans
        rest = text.removeprefix("Answer: ")
        ids = example["input_ids"]
        assert tokenizer.decode(ids[span.start : span.end]) == rest + IM
        fed = tokenizer.apply_chat_template(
            rows[number]["messages"][:1], add_generation_prompt=True, return_dict=False
        )
        assert span.kind == ("exact" if rest != text else "shared_prefix")
        assert (ids[: span.start] == fed) == (span.kind == "exact")


def test_parts_of_a_content_that_the_generation_prompt_writes_are_not_trained(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(chat_template=ANSWER)
    texts = [("Ans", 2.0), ("wer: y", 3.0), ("es", 4.0)]
    parts = [{"type": "text", "text": text, "weight": weight} for text, weight in texts]
    messages = [*chat(("user", "q")), {"role": "assistant", "content": parts}]
    (example,) = tokenize_example({"messages": messages}, tokenizer)
    assert [weight for weight in example["loss_weights"] if weight] == [3.0, 4.0, 4.0, 1.0]
