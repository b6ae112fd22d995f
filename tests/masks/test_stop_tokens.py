"""Every response ends with a token at which inference stops."""

from collections.abc import Callable
from typing import Any

import pytest

from hf_sft_plugin.masks.stop_tokens import end_token, find_stop_token, resolve_stop_tokens


def test_a_stop_token_is_found_by_name_or_refused(tokenizer: Any) -> None:
    assert find_stop_token(tokenizer, "<|endoftext|>") == 0
    with pytest.raises(ValueError, match=r"stop_token '<\|eot\|>' is not a token"):
        find_stop_token(tokenizer, "<|eot|>")


@pytest.mark.parametrize(
    ("stop_token", "given", "expected"),
    [
        (None, None, {2: "<|im_end|>"}),
        ("<|endoftext|>", None, {0: "<|endoftext|>"}),
        ("<|endoftext|>", [1, 2], {0: "<|endoftext|>"}),
        (None, [2, 0], {0: "<|endoftext|>", 2: "<|im_end|>"}),
        (None, [], {}),
    ],
)
def test_a_name_comes_first_then_what_is_given_then_the_eos_token(
    stop_token: str | None, given: list[int] | None, expected: dict[int, str], tokenizer: Any
) -> None:
    assert resolve_stop_tokens(tokenizer, stop_token, given) == expected


def test_a_token_that_the_tokenizer_does_not_have_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="The stop token 300 is not one of the 300 tokens"):
        resolve_stop_tokens(tokenizer, None, [2, 300])


def test_a_text_ends_with_the_eos_token_where_inference_stops_at_it(
    tokenizer: Any, tokenizer_factory: Callable[..., Any]
) -> None:
    assert end_token(tokenizer, {1: "a", 2: "b"}) == 2
    assert end_token(tokenizer, {1: "a", 5: "b"}) == 1
    assert end_token(tokenizer, {}) == 2
    with pytest.raises(ValueError, match="no eos token"):
        end_token(tokenizer_factory(eos_token=None), {})
