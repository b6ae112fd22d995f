"""Rows that come tokenized are taken as they are, or refused for what is impossible in them."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import (
    IGNORE_INDEX,
    DataCollatorForPromptResponse,
    RowError,
    prepare_dataset,
    preview_rows,
    tokenize_example,
)
from hf_sft_plugin.preparation.streaming import prepare_stream
from hf_sft_plugin.tokens.tokenized_rows import check_tokenized_row

VOCAB_SIZE = 300
MASKS = ["response_mask", "completion_mask", "assistant_masks"]
IDS = [5, 6, 7, 2]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize(
    "marks",
    [
        {"response_mask": [0, 0, 1, 1]},
        {"response_mask": [0.0, 0.0, 1.0, 1.0]},
        {"response_mask": [False, False, True, True]},
        {"labels": [-100, -100, 7, 2]},
        {"completion_mask": [0, 0, 1, 1]},
        {"assistant_masks": [0, 0, 1, 1]},
        {"response_mask": [0, 0, 1, 1], "labels": [-100, -100, 7, 2]},
        {"completion_mask": [0, 0, 1, 1], "assistant_masks": [0.0, 0.0, 1.0, 1.0]},
        {"labels": [-100, -100, 7, 2], "attention_mask": [1, 1, 1, 1]},
    ],
)
def test_lists_arrays_and_tensors_say_the_same(kind: Any, marks: dict[str, Any]) -> None:
    row = {"input_ids": kind(IDS), **{name: kind(values) for name, values in marks.items()}}
    example = check_tokenized_row(row, 0, VOCAB_SIZE)
    assert example == {"input_ids": IDS, "response_mask": [0, 0, 1, 1]}
    assert {type(value) for values in example.values() for value in values} == {int}


def test_labels_stand_in_for_a_mask_that_is_none() -> None:
    row = {"input_ids": IDS, "response_mask": None, "labels": [-100, 6, -100, 2]}
    assert check_tokenized_row(row, 0, VOCAB_SIZE)["response_mask"] == [0, 1, 0, 1]


def test_weights_come_along_as_floats_and_absent_ones_stay_absent() -> None:
    row = {"input_ids": IDS, "response_mask": [0, 0, 1, 1]}
    weighted = check_tokenized_row({**row, "loss_weights": [0, 1, 2, 0.5]}, 0, VOCAB_SIZE)
    assert weighted["loss_weights"] == [0.0, 1.0, 2.0, 0.5]
    assert "loss_weights" not in check_tokenized_row({**row, "loss_weights": None}, 0, VOCAB_SIZE)


def test_the_edges_of_the_vocabulary_are_inside() -> None:
    row = {"input_ids": [0, VOCAB_SIZE - 1], "response_mask": [0, 1]}
    assert check_tokenized_row(row, 0, VOCAB_SIZE)["input_ids"] == [0, 299]


@pytest.mark.parametrize("bad", [300, -1, -100, 5.0, None, "5", True, [5]])
def test_an_id_outside_the_vocabulary_is_refused(bad: Any) -> None:
    row = {"input_ids": [5, bad], "response_mask": [0, 1]}
    message = f"Row 4: input_ids holds {bad!r}, but the tokenizer's ids are the integers 0 to 299."
    with pytest.raises(RowError, match=re.escape(message)) as info:
        check_tokenized_row(row, 4, VOCAB_SIZE)
    assert info.value.reason == "token id outside the vocabulary"


@pytest.mark.parametrize("bad", [300, 6, -1, None, 5.5])
def test_a_label_that_is_not_its_own_token_is_refused(bad: Any) -> None:
    message = f"Row 4: labels holds {bad!r} where input_ids holds 5. Labels are not shifted here"
    with pytest.raises(RowError, match=re.escape(message)) as info:
        check_tokenized_row({"input_ids": [9, 5], "labels": [-100, bad]}, 4, VOCAB_SIZE)
    assert info.value.reason == "labels differ from input_ids"


def test_shifted_labels_are_refused() -> None:
    with pytest.raises(RowError, match="Labels are not shifted here"):
        check_tokenized_row({"input_ids": IDS, "labels": [-100, 7, 2, -100]}, 0, VOCAB_SIZE)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bad", [2, 7, 256, -1, 0.5, None, "1", -100, [1]])
def test_a_mask_that_neither_trains_nor_ignores_is_refused(bad: Any, name: str) -> None:
    message = f"Row 4: {name} holds {bad!r}; a token is trained (1) or not (0). Use the column loss"
    with pytest.raises(RowError, match=re.escape(message)) as info:
        check_tokenized_row({"input_ids": [5, 6], name: [0, bad]}, 4, VOCAB_SIZE)
    assert info.value.reason == f"{name} is not 0 or 1"


@pytest.mark.parametrize(
    ("marks", "message", "reason"),
    [
        (
            {"response_mask": [0, 0, 1, 1], "labels": IDS},
            "labels trains token 0 of the row (padding not counted) and response_mask does not",
            "response_mask and labels contradict each other",
        ),
        (
            {"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 1, 1, 0]},
            "completion_mask trains token 3 of the row (padding not counted) and assistant_masks",
            "completion_mask and assistant_masks contradict each other",
        ),
        (
            {"completion_mask": [0, 1, 1, 1], "labels": [-100, 6, 7, 2], "response_mask": [0] * 4},
            "completion_mask trains token 1 of the row (padding not counted) and response_mask",
            "response_mask and completion_mask contradict each other",
        ),
    ],
)
def test_columns_that_contradict_each_other_are_refused(
    marks: dict[str, Any], message: str, reason: str
) -> None:
    with pytest.raises(RowError, match=re.escape(f"Row 4: {message}")) as info:
        check_tokenized_row({"input_ids": IDS, **marks}, 4, VOCAB_SIZE)
    assert info.value.reason == reason
    assert "Remove one of the two columns." in str(info.value)


@pytest.mark.parametrize("shown", [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0.0, 1.0, 1.0, 0.0]])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_padding_on_either_side_is_taken_out_of_all_lists(kind: Any, shown: list[float]) -> None:
    def padded(values: list[Any], pad: Any) -> Any:
        left = iter(values)
        return kind([next(left) if is_token else pad for is_token in shown])

    row = {
        # What stands at padding is nobody's business, a mask of all ones included.
        "input_ids": padded([5, 6], -1),
        "labels": padded([-100, 6], -100),
        "completion_mask": padded([0, 1], 1),
        "loss_weights": padded([1.0, 0.5], -1.0),
        "attention_mask": kind(shown),
    }
    assert check_tokenized_row(row, 0, VOCAB_SIZE) == {
        "input_ids": [5, 6],
        "response_mask": [0, 1],
        "loss_weights": [1.0, 0.5],
    }


def test_a_row_of_nothing_but_padding_is_empty() -> None:
    row = {"input_ids": [0, 0], "labels": [-100, -100], "attention_mask": [0, 0]}
    assert check_tokenized_row(row, 0, VOCAB_SIZE) == {"input_ids": [], "response_mask": []}


@pytest.mark.parametrize("bad", [2, -1, 0.5, None, "1"])
def test_an_attention_mask_that_is_none_is_refused(bad: Any) -> None:
    row = {"input_ids": [5, 6], "response_mask": [0, 1], "attention_mask": [1, bad]}
    message = f"Row 4: attention_mask holds {bad!r}; a position holds a token (1) or padding (0)."
    with pytest.raises(RowError, match=re.escape(message)) as info:
        check_tokenized_row(row, 4, VOCAB_SIZE)
    assert info.value.reason == "attention_mask is not 0 or 1"


def test_the_row_itself_stays_as_it_was() -> None:
    row: Any = {
        "input_ids": [0, 5, 6],
        "response_mask": [0, 1, 1],
        "attention_mask": [0, 1, 1],
        "loss_weights": [1.0, 1.0, 2.0],
    }
    before = copy.deepcopy(row)
    for mask in ({}, {"attention_mask": None}):
        example = check_tokenized_row({**row, **mask}, 0, VOCAB_SIZE)
        example["response_mask"][:] = []
        example["loss_weights"][:] = []
    assert row == before


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf"), None, "1"])
def test_an_impossible_weight_is_refused(bad: Any) -> None:
    row = {"input_ids": [5, 6], "response_mask": [0, 1], "loss_weights": [1.0, bad]}
    message = f"Row 4: loss_weights holds {bad!r}; use finite numbers of 0 or more."
    with pytest.raises(RowError, match=re.escape(message)) as info:
        check_tokenized_row(row, 4, VOCAB_SIZE)
    assert info.value.reason == "loss_weights are negative or not finite"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input_ids": IDS, "response_mask": [1]},
            "input_ids has 4 tokens but response_mask has 1 entries",
        ),
        (
            {"input_ids": IDS, "labels": [*IDS, 5]},
            "input_ids has 4 tokens but labels has 5 entries",
        ),
        (
            {"input_ids": IDS, "labels": IDS, "attention_mask": [1]},
            "input_ids has 4 tokens but attention_mask has 1 entries",
        ),
        (
            {"input_ids": IDS, "labels": IDS, "loss_weights": [1.0]},
            "input_ids has 4 tokens but loss_weights has 1 entries",
        ),
    ],
)
def test_lists_of_unequal_length_are_refused_with_both_lengths(
    row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=f"Row 4: {message}") as info:
        check_tokenized_row(row, 4, VOCAB_SIZE)
    assert info.value.reason == "lists of unequal length"


@pytest.mark.parametrize(
    ("row", "column", "found"),
    [
        ({"input_ids": None, "labels": IDS}, "input_ids", "NoneType"),
        ({"input_ids": "5 6", "labels": IDS}, "input_ids", "str"),
        ({"input_ids": 5, "labels": IDS}, "input_ids", "int"),
        ({"input_ids": torch.tensor(5), "labels": IDS}, "input_ids", "int"),
        ({"input_ids": IDS, "labels": None}, "labels", "NoneType"),
        ({"input_ids": IDS, "labels": None, "response_mask": None}, "labels", "NoneType"),
        ({"input_ids": IDS, "response_mask": None}, "response_mask", "NoneType"),
        ({"input_ids": IDS, "response_mask": 1}, "response_mask", "int"),
        ({"input_ids": IDS, "assistant_masks": None}, "assistant_masks", "NoneType"),
        ({"input_ids": IDS, "completion_mask": "0011"}, "completion_mask", "str"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": 1}, "attention_mask", "int"),
        ({"input_ids": IDS, "labels": IDS, "loss_weights": 1.0}, "loss_weights", "float"),
    ],
)
def test_a_column_that_holds_no_list_is_named(row: dict[str, Any], column: str, found: str) -> None:
    message = f"Row 4: column '{column}' holds {found}, but a list of numbers is needed."
    with pytest.raises(RowError, match=message) as info:
        check_tokenized_row(row, 4, VOCAB_SIZE)
    assert info.value.reason == f"{column} is not a list"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 299), st.booleans())))
def test_a_mask_and_the_labels_it_gives_are_the_same_row(tokens: list[tuple[int, bool]]) -> None:
    input_ids = [token for token, _ in tokens]
    labels = [token if trained else IGNORE_INDEX for token, trained in tokens]
    expected = {"input_ids": input_ids, "response_mask": [int(trained) for _, trained in tokens]}
    by_labels = {"input_ids": input_ids, "labels": labels}
    assert check_tokenized_row(by_labels, 0, VOCAB_SIZE) == expected
    assert check_tokenized_row(expected, 0, VOCAB_SIZE) == expected


EVERYTHING: list[dict[str, Any]] = [{"use_loss_mask": False}, {"train_on": "all"}]


@pytest.mark.parametrize("options", EVERYTHING)
def test_rows_of_ids_alone_are_trained_whole_where_everything_is(
    options: dict[str, Any], tokenizer: Any
) -> None:
    rows = [{"input_ids": IDS}, {"input_ids": [0, 0, *IDS[1:]], "attention_mask": [0, 0, 1, 1, 1]}]
    expected = [
        {"input_ids": IDS, "response_mask": [0, 1, 1, 1]},
        {"input_ids": IDS[1:], "response_mask": [0, 1, 1]},
    ]
    assert [tokenize_example(row, tokenizer, **options)[0] for row in rows] == expected
    alike = Dataset.from_list([rows[0]] * 3)
    for num_proc in (1, 2):
        prepared, ledger = prepare_dataset(alike, tokenizer, num_proc=num_proc, **options)
        assert prepared.to_list() == [expected[0]] * 3
        assert ledger.num_response_tokens == 9
    (made, *_) = prepare_stream(alike.to_iterable_dataset(), tokenizer, **options)
    assert {name: made[name] for name in expected[0]} == expected[0]
    batch = DataCollatorForPromptResponse(tokenizer, **options)(rows[:1])
    assert batch["labels"].tolist() == [[-100, 6, 7, 2]]
    assert preview_rows([rows[0]], tokenizer, **options)[0].num_trained == 3


def test_a_row_whose_marks_are_none_is_trained_whole_where_everything_is(tokenizer: Any) -> None:
    row = {"input_ids": IDS, "labels": None}
    (example,) = tokenize_example(row, tokenizer, use_loss_mask=False)
    assert example["response_mask"] == [0, 1, 1, 1]
    with pytest.raises(RowError, match="'labels' holds NoneType"):
        tokenize_example(row, tokenizer)


def test_rows_of_ids_alone_are_refused_with_what_to_set_where_only_some_are_trained(
    tokenizer: Any,
) -> None:
    with pytest.raises(ValueError, match=r"which tokens to train.*use_loss_mask=False"):
        prepare_dataset(Dataset.from_list([{"input_ids": IDS}]), tokenizer)


def test_rows_of_ids_alone_cannot_be_evaluated_over_responses(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"input_ids": IDS}])
    options = {"use_loss_mask": False}
    prepare_dataset(rows, tokenizer, eval_masks=["all"], **options)
    with pytest.raises(ValueError, match="without the column eval_masks"):
        prepare_dataset(rows, tokenizer, eval_masks=["response"], **options)
