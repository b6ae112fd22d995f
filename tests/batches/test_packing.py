"""Packed rows hold every row once, whole, and as many of them as fit."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    PackedDataset,
    RowError,
    ShardDataset,
    pack_dataset,
    prepare_dataset,
    write_shards,
)
from hf_sft_plugin.batches.packing import best_fit_decreasing, unpack_rows

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def slow_best_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    """The same in the words of the textbook: every bin is looked at."""
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        rooms = [max_length - sum(lengths[each] for each in rows) for rows in bins]
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            bins[min(fitting, key=lambda number: rooms[number])].append(row)
        else:
            bins.append([row])
    return bins


@given(LENGTHS, st.integers(30, 100))
def test_every_row_is_in_one_bin_as_best_fit_decreasing_has_it(
    lengths: list[int], max_length: int
) -> None:
    bins = best_fit_decreasing(lengths, max_length)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in rows) for rows in bins]
    assert max(loads) <= max_length
    expected = slow_best_fit(lengths, max_length)
    # Of bins with the same room either may be taken, which leaves the same rooms.
    assert sorted(loads) == sorted(sum(lengths[row] for row in rows) for rows in expected)


@given(LENGTHS, st.integers(30, 100))
def test_every_token_is_in_the_packed_rows_once(lengths: list[int], max_length: int) -> None:
    rows = [
        {"input_ids": [number] * length, "response_mask": [0] + [1] * (length - 1)}
        for number, length in enumerate(lengths)
    ]
    packed = pack_dataset(rows, max_length)
    documents = [document for row in packed for document in row["documents"]]
    assert sorted(documents, key=lambda row: row["input_ids"][0]) == rows
    for row in packed:
        assert sum(len(document["input_ids"]) for document in row["documents"]) <= max_length
        first = [document["input_ids"][0] for document in row["documents"]]
        assert first == sorted(first)
    firsts = [row["documents"][0]["input_ids"][0] for row in packed]
    assert firsts == sorted(firsts)
    assert packed.fill_share == sum(lengths) / (len(packed) * max_length)
    assert pack_dataset(rows, max_length).plan == packed.plan


def test_a_dataset_and_a_list_and_documents_in_shards_are_packed_alike(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "hello", "response": "world " * (number % 4 + 1), "source": f"s{number % 2}"}
        for number in range(9)
    ]
    prepared, _ = prepare_dataset(Dataset.from_list(rows), tokenizer)
    write_shards(tmp_path / "set", {"train": prepared}, tokenizer)
    packed = [pack_dataset(each, 24) for each in (prepared, ShardDataset(tmp_path / "set"))]
    packed.append(pack_dataset(prepared.to_list(), 24))
    assert packed[0].plan == packed[1].plan == packed[2].plan
    assert 1 < len(packed[0]) < 9
    assert list(packed[0]) == list(packed[1]) == list(packed[2])
    # Rows that were chosen and reordered keep their own lengths.
    chosen = prepared.select([7, 2, 5])
    assert pack_dataset(chosen, 24).lengths.tolist() == [len(ids) for ids in chosen["input_ids"]]


def test_the_collator_makes_a_row_of_each_document(tokenizer: Any) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "response_mask": [0, 1, 1], "loss_weights": [0.0, 0.5, 1.0]},
        {"input_ids": [8, 9], "response_mask": [1, 1], "loss_weights": [1.0, 2.0]},
        {"input_ids": [3, 4], "response_mask": [0, 1], "loss_weights": [0.0, 1.0]},
    ]
    collator = DataCollatorForPromptResponse(tokenizer)
    packed = pack_dataset(rows, 5)
    assert packed.plan == [[0, 1], [2]]
    found, expected = collator(list(packed)), collator(rows)
    assert found.keys() == expected.keys()
    assert all(found[name].tolist() == expected[name].tolist() for name in expected)
    assert unpack_rows(rows) is rows


def test_a_collator_that_knows_nothing_of_packing_cannot_train_across_rows(tokenizer: Any) -> None:
    packed = pack_dataset([{"input_ids": [5, 6], "labels": [5, 6]}] * 2, 4)
    with pytest.raises((KeyError, ValueError)):
        tokenizer.pad([packed[0]])


def test_it_says_what_was_packed() -> None:
    rows = [{"input_ids": [5] * 300, "response_mask": [1] * 300}] * 4
    text = "4 rows in 2 packed rows of up to 640 tokens, 93.8% filled"
    assert str(pack_dataset(rows, 640)) == text


def refusals(tmp_path: Path, tokenizer: Any) -> list[tuple[Any, str]]:
    prepared = Dataset.from_list([{"input_ids": [5] * 9, "response_mask": [1] * 9}] * 3)
    write_shards(tmp_path / "set", {"train": prepared}, tokenizer)
    return [
        (prepared.to_iterable_dataset(), "A stream cannot be packed"),
        (ShardDataset(tmp_path / "set", block_size=4), "was opened in blocks of 4 tokens"),
        (Dataset.from_list([{"prompt": "a", "response": "b"}]), "columns prompt, response, but no"),
        ([{"prompt": "a"}], "columns prompt, but no input_ids"),
        ([], "There are no rows to pack"),
        (prepared, r"Row 0: the row has 9 tokens, but a packed row has 8, and no row is split"),
        ({"train": prepared}, r"several datasets, train, .* Pass one of them"),
        ("rows.jsonl", r"dataset is 'rows.jsonl', but the rows themselves are needed"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_what_cannot_be_packed_is_refused_with_the_reason(
    number: int, tmp_path: Path, tokenizer: Any
) -> None:
    rows, message = refusals(tmp_path, tokenizer)[number]
    with pytest.raises(ValueError, match=message) as error:
        pack_dataset(rows, 8)
    assert isinstance(rows, IterableDataset | ShardDataset | Dataset | list | dict | str)
    assert isinstance(error.value, RowError) == (number == 5)


@pytest.mark.parametrize("max_length", [None, 0, -1, 8.0, True, "8"])
def test_a_length_of_packed_rows_that_is_no_number_of_tokens_is_refused(max_length: Any) -> None:
    rows = [{"input_ids": [5], "response_mask": [1]}]
    with pytest.raises(ValueError, match=f"max_length is {max_length!r}, but .* such as 2048"):
        pack_dataset(rows, max_length)


def test_rows_may_fill_a_packed_row_to_the_last_token() -> None:
    packed = PackedDataset([{"input_ids": [5] * 4}] * 2, [4, 4], 8)
    assert packed.plan == [[0, 1]]
    assert packed.fill_share == 1.0
