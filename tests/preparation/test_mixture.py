"""Several datasets become one, in stated proportions, and every row says where it came from."""

from collections import Counter
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_sft_plugin.preparation.mixture import mix_datasets


def make(first: int, num_rows: int, **columns: Any) -> Dataset:
    return Dataset.from_list(
        [{"input_ids": [first + i, 2], "response_mask": [0, 1], **columns} for i in range(num_rows)]
    )


def test_without_weights_every_row_comes_exactly_once_with_its_source() -> None:
    mixed = mix_datasets({"a": make(0, 40), "b": make(100, 7), "c": make(200, 1)})
    assert sorted(ids[0] for ids in mixed["input_ids"]) == [*range(40), *range(100, 107), 200]
    assert Counter(mixed["source"]) == {"a": 40, "b": 7, "c": 1}
    assert mixed["source"][:40] != ["a"] * 40


def test_the_order_depends_on_the_seed_alone() -> None:
    datasets = {"a": make(0, 20), "b": make(100, 20)}
    first = mix_datasets(datasets, seed=1).to_list()
    assert mix_datasets(datasets, seed=1).to_list() == first
    assert mix_datasets(datasets, seed=2).to_list() != first


def test_weights_are_the_proportions_to_the_end_and_no_row_comes_twice() -> None:
    mixed = mix_datasets({"a": make(0, 3000), "b": make(5000, 3000)}, {"a": 3, "b": 1})
    counts = Counter(mixed["source"])
    assert counts["a"] / len(mixed) == pytest.approx(0.75, abs=0.03)
    assert len(mixed.unique("source")) == 2
    firsts = [ids[0] for ids in mixed["input_ids"]]
    assert len(set(firsts)) == len(firsts)


def test_a_source_of_its_own_is_replaced_by_the_name_of_the_dataset() -> None:
    mixed = mix_datasets({"a": make(0, 2, source="x"), "b": make(10, 2)})
    assert set(mixed["source"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("datasets", "weights", "message"),
    [
        ({}, None, "no datasets to mix"),
        ({"a": make(0, 2).select([])}, None, "dataset 'a' is empty"),
        ({"a": make(0, 2)}, {"b": 1}, "weights for b"),
        ({"a": make(0, 2)}, {"a": 0}, "not all 0"),
        ({"a": make(0, 2), "b": make(5, 2)}, {"a": 2, "b": -1}, "0 or more"),
    ],
)
def test_what_cannot_be_mixed_is_refused(datasets: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix_datasets(datasets, weights)


def test_only_datasets_by_name_are_mixed() -> None:
    rows = make(0, 2)
    for datasets, message in (
        ([rows, rows], "datasets is a list, but a mapping"),
        ({"a": DatasetDict({"train": rows})}, "'a' is a DatasetDict"),
        ({"a": rows, "b": rows.to_iterable_dataset()}, "'b' is a IterableDataset"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_datasets(datasets)
