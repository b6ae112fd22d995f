"""Rows that are repeated for other processes are marked, run, and count for nothing."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hf_sft_plugin.batches.host_facts import HOST_FACTS, HostFacts, facts_of, find_trained_positions
from hf_sft_plugin.batches.padding_rows import (
    EvenBatches,
    MarkedRebalanceSampler,
    Repeated,
    RowsWithRepeats,
    StreamWithRepeats,
    as_repeat,
    cut_repeats,
    gather_in_order,
    gather_own_rows,
    leave_out_repeats,
    mark_repeats,
    num_own_rows,
    rows_of_dataset,
    without_repeats,
)


class Shards:
    """What `mark_repeats` is given: a data loader whose batch sampler is that of one process."""

    def __init__(self, batches: Any, count: int, index: int, splits: bool = False) -> None:
        self.batch_sampler = BatchSamplerShard(batches, count, index, split_batches=splits)


def deal(num_rows: int, size: int, count: int, *, drop: bool = False, splits: bool = False) -> Any:
    """The batches of every process."""
    found = []
    for index in range(count):
        batches = BatchSampler(SequentialSampler(range(num_rows)), size, drop)
        loader = Shards(batches, count, index, splits)
        mark_repeats(loader)
        dealt = list(loader.batch_sampler)
        assert len(loader.batch_sampler) == len(dealt)
        found.append(dealt)
    return found


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 12, 23])
def test_every_row_is_dealt_once_unmarked_in_order_and_every_process_has_as_many_batches(
    num_rows: int, size: int, count: int, splits: bool
) -> None:
    size = size * count if splits else size
    dealt = deal(num_rows, size, count, splits=splits)
    assert len({len(batches) for batches in dealt}) == 1
    rounds = zip(*dealt, strict=True)
    rows = [row for batches in rounds for batch in batches for row in batch]
    assert [row for row in rows if not isinstance(row, Repeated)] == list(range(num_rows))
    # Marked rows come after all others, so that they are the last of their batch.
    assert all(isinstance(row, Repeated) for row in rows[num_rows:])


def test_what_is_dropped_needs_no_repeats() -> None:
    assert deal(7, 2, 2, drop=True) == [[[0, 1]], [[2, 3]]]


def test_batches_of_many_sizes_stay_as_they_are() -> None:
    class Batches(BatchSampler):
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[list[int]]:
            yield from ([0, 1, 2], [3])

        def __len__(self) -> int:
            return 2

    even = EvenBatches(Batches(), num_processes=3)
    assert list(even) == [[0, 1, 2], [3], [Repeated(0)]]
    assert len(even) == 3


def test_a_sampler_of_its_own_kind_is_found_behind_it_and_told_the_epoch() -> None:
    class Sampler(SequentialSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Sampler(range(3))
    even = EvenBatches(BatchSampler(sampler, 2, False), num_processes=2)
    even.sampler.set_epoch(4)
    assert (sampler.epoch, even.batch_size, even.drop_last) == (4, 2, False)
    assert not hasattr(even, "set_epoch")


@pytest.mark.parametrize("num_rows", [0, 1, 5, 6])
def test_a_stream_ends_with_marked_rows(num_rows: int) -> None:
    rows = list(StreamWithRepeats(range(num_rows), multiple=3))
    assert len(rows) % 3 == 0
    assert rows[:num_rows] == list(range(num_rows))
    assert rows[num_rows:] == [Repeated(0)] * (len(rows) - num_rows)


def test_a_wrapped_dataset_is_asked_for_everything_else_and_travels_to_other_processes() -> None:
    class Rows(list):
        column_names = ("a",)

    rows = RowsWithRepeats(["x", "y"])
    copy = pickle.loads(pickle.dumps(rows))  # noqa: S301  # just written
    assert (copy[1], copy[Repeated(1)], len(copy)) == ("y", Repeated("y"), 2)
    assert RowsWithRepeats(Rows()).column_names == ("a",)
    assert rows_of_dataset(rows) is rows.rows
    assert rows_of_dataset(rows.rows) is rows.rows
    with pytest.raises(TypeError):
        len(StreamWithRepeats(iter([1]), 2))


def test_a_batch_is_made_of_its_own_rows_or_of_one_repeat() -> None:
    assert leave_out_repeats(["a", Repeated("b")]) == (["a"], False)
    assert leave_out_repeats([Repeated("b"), Repeated("c")]) == (["b"], True)
    assert leave_out_repeats([]) == ([], False)


def test_a_repeat_trains_nothing_and_is_no_batch_of_its_own() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6]]),
        "labels": torch.tensor([[-100, 6]]),
        "response_mask": torch.tensor([[0, 1]]),
        "loss_weights": torch.tensor([[0.0, 0.5]]),
        HOST_FACTS: HostFacts(trained=find_trained_positions(torch.tensor([[-100, 6]]))),
    }
    repeat = as_repeat(batch)
    assert repeat["labels"].tolist() == [[-100, -100]]
    assert repeat["response_mask"].tolist() == [[0, 0]]
    assert repeat["loss_weights"].tolist() == [[0.0, 0.0]]
    assert repeat["input_ids"] is batch["input_ids"]
    assert facts_of(repeat) == HostFacts(is_padding=True)
    assert batch["labels"].tolist() == [[-100, 6]]
    assert without_repeats([batch, repeat]) == [batch]
    assert num_own_rows(repeat, Accelerator(cpu=True)) == 0


class Rank:
    """An accelerator of one of two processes that is at the end of a dispatching data loader."""

    num_processes = 2

    def __init__(self, index: int, remainder: int) -> None:
        class Stream(IterableDataset):
            def __iter__(self) -> Iterator[int]:
                yield 0

        loader = DataLoaderDispatcher(Stream())
        loader.end_of_dataloader, loader.remainder = True, remainder
        self.process_index = index
        self.gradient_state = type("State", (), {"active_dataloader": loader})


@pytest.mark.parametrize(
    ("index", "remainder", "expected"), [(0, 3, 2), (1, 3, 1), (1, 2, 0), (0, 1, 1), (1, 4, 2)]
)
def test_repeats_that_were_added_to_a_batch_are_cut_off(
    index: int, remainder: int, expected: int
) -> None:
    rank: Any = Rank(index, remainder)
    batch = {"input_ids": torch.tensor([[1], [2]]), "labels": torch.tensor([[1], [2]])}
    assert num_own_rows(batch, rank) == expected
    kept = cut_repeats(batch, rank)
    assert len(kept["labels"]) == max(1, expected)
    assert facts_of(kept).is_padding is (expected == 0)
    if expected == 0:
        assert kept["labels"].tolist() == [[-100]]


def test_one_process_gathers_its_own() -> None:
    accelerator = Accelerator(cpu=True)
    found = gather_in_order([torch.tensor([1.0]), torch.tensor([2.0])], accelerator)
    assert [values.item() for values in found] == [1.0, 2.0]
    assert gather_own_rows(torch.tensor([1, 2, 3]), 2, accelerator).tolist() == [1, 2]


def test_loaders_of_one_process_and_other_samplers_are_left_alone() -> None:
    loader = DataLoader([1, 2, 3], batch_size=2)
    own = loader.batch_sampler
    mark_repeats(loader)
    assert loader.batch_sampler is own
    assert not isinstance(own, EvenBatches)


@pytest.mark.parametrize("num_rows", [1, 5, 8, 9, 23])
@pytest.mark.parametrize(("size", "accumulation", "count"), [(1, 2, 2), (2, 2, 3), (1, 4, 1)])
def test_rebalanced_batches_have_every_row_once_unmarked(
    num_rows: int, size: int, accumulation: int, count: int
) -> None:
    lengths = [1 + (7 * row) % 13 for row in range(num_rows)]
    sizes = size * accumulation * count, count, accumulation
    dealt = []
    for rank in range(count):
        plain = BatchRebalanceSampler(lengths, *sizes, seed=3, rank=rank, drop_last=False)
        sampler = MarkedRebalanceSampler(plain)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            plain.set_epoch(epoch)
            bare = [[i.value if isinstance(i, Repeated) else i for i in b] for b in sampler]
            assert bare == list(plain)
        dealt += [index for batch in sampler for index in batch]
        assert len(sampler) == len(bare)
    assert sorted(i for i in dealt if not isinstance(i, Repeated)) == list(range(num_rows))
