"""A response begins behind its header, however much of the generation prompt is written."""

from collections.abc import Callable
from typing import Any

import pytest

from hf_sft_plugin.masks.response_openings import TAGS, after_opening, may_leave_out
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows

BEFORE = "<|user|>q"


@pytest.mark.parametrize(
    ("written", "opening", "expected"),
    [
        # The template writes all of it, or all but the thought that it opens.
        ("<|a|>so", "<|a|>", "<|a|>"),
        ("<|a|>so", "<|a|><think>", "<|a|>"),
        ("<|a|><table>", "<|a|><think>", "<|a|>"),
        # The turn before is closed otherwise where more follows.
        ("\n<|a|>so", "<|a|>", "\n<|a|>"),
        ("</s>\n<|a|>so", "<|a|>", "</s>\n<|a|>"),
        ("<|a|>so", "\n<|a|>", "<|a|>"),
        # Two tags that begin alike are two tags.
        ("<|b|>so", "<|a|>", None),
        ("so", "<|a|>", None),
        ("</s>so", "<|a|>", None),
    ],
)
def test_the_response_begins_where_text_and_generation_prompt_part(
    written: str, opening: str, expected: str | None
) -> None:
    found = after_opening(BEFORE + written, len(BEFORE), opening, ["</s>"])
    assert (found and found[0]) == (None if expected is None else len(BEFORE + expected))


def test_a_header_that_is_itself_a_stop_token_is_not_taken_for_the_end_of_the_turn_before() -> None:
    stops = ["<|im_end|>", "<|im_start|>"]
    opening, header = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>"
    for before in ("", "\n", "<|im_end|>\n"):
        text = f"q{before}{header}</think>so"
        assert after_opening(text, 1, opening, stops) == (len(f"q{before}{header}"), "\n")


@pytest.mark.parametrize(
    ("rest", "text", "expected"),
    [
        ("", "why", True),
        ("<think>\n", "<call>", True),
        ("\n</think>\n\n", "</think>\n<call>", True),
        # The thought that the opening closes goes on.
        ("\n</think>\n\n", "why\n</think>\n<call>", False),
        ("final<|message|>", "commentary<|message|>", False),
    ],
)
def test_a_response_without_a_content_may_leave_out_an_empty_thought_alone(
    rest: str, text: str, expected: bool
) -> None:
    assert may_leave_out(rest, "<|a|>" + text, len("<|a|>")) == expected


def test_a_user_turn_that_only_a_response_closes_is_no_prompt_of_inference(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% if not loop.last %}<|im_end|>\n{% endif %}"
        "{% else %}<|im_start|>a\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>a\n{% endif %}"
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hi"}]
    tokenizer = tokenizer_factory(chat_template=template)
    (outcome,) = tokenize_rows([{"messages": messages}], [0], tokenizer, make_options({}))
    assert outcome.error is not None
    assert outcome.error.reason == "response does not continue the generation prompt"


def test_an_empty_thought_may_stand_before_a_content_but_no_role() -> None:
    assert TAGS.fullmatch("\n<think>\n\n</think>\n\n")
    assert not TAGS.fullmatch("<|header|>assistant<|/header|>")
