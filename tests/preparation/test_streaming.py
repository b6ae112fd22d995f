"""A stream is tokenized as it comes; what is left out is named, too much of it stops the run."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, IterableDatasetDict

from hf_sft_plugin import RowError, prepare_dataset
from hf_sft_plugin.preparation.streaming import prepare_stream

GOOD = {"prompt": "hello", "response": "world"}
BAD = {"prompt": "hello", "response": " "}


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate)


def test_a_stream_gives_the_examples_of_the_dataset(
    tokenizer: Any, chat_rows: list[dict[str, Any]]
) -> None:
    expected, _ = prepare_dataset(Dataset.from_list(chat_rows), tokenizer)
    examples = list(prepare_stream(stream(chat_rows), tokenizer))
    columns = ("input_ids", "response_mask")
    assert [{c: e[c] for c in columns} for e in examples] == expected.to_list()
    assert {e["loss_weights"] for e in examples} == {None}


def test_a_row_that_cannot_be_trained_is_left_out_and_named_by_its_place(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [GOOD] * 70 + [BAD] + [GOOD] * 70
    with caplog.at_level(logging.WARNING):
        assert len(list(prepare_stream(stream(rows), tokenizer))) == 140
    (message,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "Row 70: the response is empty" in message


def test_too_many_such_rows_stop_the_stream(tokenizer: Any) -> None:
    prepared = prepare_stream(stream(([GOOD] * 9 + [BAD]) * 100), tokenizer)
    with pytest.raises(ValueError, match=r"rows cannot be trained.*\n- .*empty response"):
        list(prepared)
    allowed = prepare_stream(stream(([GOOD] * 9 + [BAD]) * 100), tokenizer, max_dropped_share=0.1)
    assert len(list(allowed)) == 900


def test_a_long_row_is_cut_or_left_out_as_in_a_dataset(tokenizer: Any) -> None:
    row = {"input_ids": [5, 6, 7, 8, 2], "response_mask": [0, 0, 1, 1, 1]}
    (cut,) = prepare_stream(stream([row]), tokenizer, max_length=4)
    assert cut["input_ids"] == [5, 6, 7, 8]
    assert not list(prepare_stream(stream([row]), tokenizer, max_length=4, overflow="drop"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "The stream is empty"), ([{"words": "a"}], "No known format"), ([{"prompt": "a"}], "no")],
)
def test_a_stream_without_rows_or_known_columns_is_refused_before_it_is_read(
    rows: list[dict[str, Any]], message: str, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_stream(stream(rows), tokenizer)


def test_a_stream_that_is_not_trained_on_is_called_by_its_name(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        list(prepare_stream(stream([GOOD, BAD]), tokenizer, name="eval_web"))
    assert "A row of the eval_web stream is left out. Row 1: " in caplog.text
    prepared = prepare_stream(stream([GOOD, BAD] * 200), tokenizer, name="eval_web")
    with pytest.raises(ValueError, match=r"^eval_web data: .* rows cannot be trained"):
        list(prepared)
    rows, cut = stream([GOOD] * 3), {"max_length": 2, "overflow": "error"}
    with pytest.raises(RowError, match=r"^eval_web data: Row 0: the row has"):
        list(prepare_stream(rows, tokenizer, name="eval_web", **cut))


def test_only_a_stream_is_taken(tokenizer: Any) -> None:
    rows = Dataset.from_list([GOOD])
    several = IterableDatasetDict({"train": rows.to_iterable_dataset()})
    for other, message in ((rows, "is a Dataset, but"), (several, r"one, such as dataset\['train")):
        with pytest.raises(ValueError, match=message):
            prepare_stream(other, tokenizer)


def test_examples_that_are_thrown_away_again_are_not_tokenized_again(tokenizer: Any) -> None:
    rows = [{**(BAD if n in (3, 70) else GOOD), "source": str(n)} for n in range(200)]
    whole: Any = prepare_stream(stream(rows), tokenizer)
    expected = list(whole)
    assert whole.preparer.num_examples == [63, 63, 64, 8]
    again: Any = prepare_stream(stream(rows), tokenizer)
    # The 127th example is in the third batch of rows, which is tokenized as a whole.
    again.preparer.skip(whole.preparer.num_examples, 127)
    found = list(again)
    assert len(found) == len(expected) == 198
    assert {str(row["input_ids"]) for row in found[:126]} == {"[0, 0]"}
    assert found[126:] == expected[126:]
    assert again.preparer.num_examples == [63, 63, 64, 8]
    # In the next pass all rows are wanted.
    assert list(again) == expected


def test_what_is_to_be_known_of_rows_is_said_once_with_the_first_of_them(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = prepare_stream(stream([GOOD] * 200), tokenizer, name="eval_web")
    with caplog.at_level(logging.WARNING):
        assert len(list(prepared)) == len(list(prepared)) == 200
    (message,) = [r.getMessage() for r in caplog.records]
    assert "eval_web" in message
    assert "row 0" in message
    assert "prompt_format='chat'" in message
