"""Tokens decoded one by one give the text that the tokenizer gives of all of them."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from hf_sft_plugin.encoding.decoding import TokenDecoder


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.lists(st.integers(0, 299), max_size=12), min_size=1, max_size=8))
def test_any_ids_have_the_text_that_the_tokenizer_gives_them(
    rows: list[list[int]], tokenizer: Any
) -> None:
    backend = tokenizer.backend_tokenizer
    whole = [backend.decode(ids, skip_special_tokens=False) for ids in rows]
    assert TokenDecoder(tokenizer)(rows) == whole


def test_characters_of_several_tokens_are_decoded_whole(tokenizer: Any) -> None:
    texts = ["plain", "\U0001f30d caf\u00e9", "plain", "\ufffd"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert TokenDecoder(tokenizer)(rows) == texts


def test_other_decoders_are_asked_themselves(tokenizer_factory: Callable[..., Any]) -> None:
    tokenizer = tokenizer_factory()
    rows = [[67, 68], [67]]
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    # This one puts a space between tokens, so texts of single tokens do not add up.
    assert TokenDecoder(tokenizer)(rows) == ["a b", "a"]


def test_a_text_that_is_not_that_of_its_tokens_is_noticed(tokenizer: Any) -> None:
    decode = TokenDecoder(tokenizer)
    assert decode([[67, 68]]) == ["ab"]
    assert decode._texts is not None
    decode._texts[68] = "x"
    with pytest.raises(AssertionError, match="tokens make another text than 'ab'"):
        decode([[67, 68]])


def test_control_tokens_are_decoded_as_they_are_written(tokenizer: Any) -> None:
    assert TokenDecoder(tokenizer)([[1, 67, 2], [], [0]]) == [
        "<|im_start|>a<|im_end|>",
        "",
        "<|endoftext|>",
    ]
