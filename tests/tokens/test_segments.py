"""Texts without a template are joined as they are written."""

from typing import Any

from hf_sft_plugin import tokenize_example
from hf_sft_plugin.tokens.segments import join_segments
from hf_sft_plugin.types import Segment, TrainedSpan

STOPS = {2: "<|im_end|>"}


def join(*segments: Segment, tokenizer: Any) -> Any:
    (joined,) = join_segments([segments], tokenizer, STOPS)
    return joined


def test_each_segment_is_tokenized_alone_and_the_last_ends_with_a_stop_token(
    tokenizer: Any,
) -> None:
    first, second, third = (tokenizer(text)["input_ids"] for text in ("hello", " world", "!"))
    joined = join(
        Segment("hello", False), Segment(" world", True), Segment("!", False), tokenizer=tokenizer
    )
    assert joined.example == {
        "input_ids": first + second + third,
        "response_mask": [0] * len(first) + [1] * len(second) + [0] * len(third),
    }
    assert joined.spans == [TrainedSpan(len(first), len(first + second), 1, "text")]
    assert joined.proofs == [(second, " world")]
    trained = join(Segment("hello", False), Segment(" world", True), tokenizer=tokenizer)
    assert trained.example["input_ids"] == [*first, *second, 2]
    assert trained.example["response_mask"][-1] == 1


def test_neighbours_that_are_trained_alike_are_one_text(tokenizer: Any) -> None:
    apart = join(
        Segment("hel", False),
        Segment("lo", False),
        Segment("wor", True),
        Segment("ld", True),
        tokenizer=tokenizer,
    )
    together = join(Segment("hello", False), Segment("world", True), tokenizer=tokenizer)
    assert apart == together


def test_weights_stand_on_the_tokens_of_their_segment(tokenizer: Any) -> None:
    joined = join(Segment("a", False), Segment("b", True, 0.5), tokenizer=tokenizer)
    assert joined.example["loss_weights"] == [1.0, 0.5, 0.5]
    ignored = join(Segment("a", False), Segment("b", True, 0.0), tokenizer=tokenizer)
    assert ignored.example["response_mask"] == [0, 0, 0]


def test_a_whole_text_is_trained_but_for_its_first_token(tokenizer: Any) -> None:
    (example,) = tokenize_example({"text": "hello world"}, tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "hello world<|im_end|>"
    assert example["response_mask"] == [0] + [1] * (len(example["input_ids"]) - 1)


def test_a_second_bos_goes(tokenizer_factory: Any) -> None:
    tokenizer = tokenizer_factory(bos_token="<|endoftext|>")
    row = {"prompt": "<|endoftext|><|endoftext|>a", "response": "b"}
    (example,) = tokenize_example(row, tokenizer)
    assert example["input_ids"].count(0) == 1
