"""Rows that are repeated to give every process as many batches: they run, and carry no weight.

Accelerate fills the last batches of an epoch with the first rows of it. Here those rows are marked,
so that a batch holds none of them, unless it holds nothing else: then it is one row without a
trained token, because a process may not do without a forward pass that the others make.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from accelerate.utils import find_batch_size, gather_object, recursively_apply, slice_tensors
from torch import Tensor
from torch.utils import data
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hf_sft_plugin.batches.host_facts import facts_of, with_facts
from hf_sft_plugin.types import IGNORE_INDEX

# What a batch says of training, and what that is where nothing is trained.
_UNTRAINED = {"labels": IGNORE_INDEX, "response_mask": 0, "loss_weights": 0}


class Repeated(NamedTuple):
    """A row, or the number of one, that this epoch has already."""

    value: Any


class _Wrapper:
    """Stands for what it holds, wherever it is asked for something that it does not have."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getattr__(self, name: str) -> Any:
        # It is not there yet while the object is unpickled.
        if name == "rows":
            raise AttributeError(name)
        return getattr(self.rows, name)

    def __len__(self) -> int:
        return len(self.rows)


class RowsWithRepeats(_Wrapper, data.Dataset[Any]):
    """A dataset that marks the rows whose numbers are marked.

    Examples:
        >>> RowsWithRepeats(["a", "b"]).__getitems__([1, Repeated(0)])
        ['b', Repeated(value='a')]
    """

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """The rows of a batch; data loaders call this."""
        numbers = [i.value if isinstance(i, Repeated) else i for i in indices]
        read_all = getattr(self.rows, "__getitems__", None)
        rows = [self.rows[i] for i in numbers] if read_all is None else read_all(numbers)
        return [
            Repeated(row) if isinstance(i, Repeated) else row
            for i, row in zip(indices, rows, strict=True)
        ]


class StreamWithRepeats(_Wrapper, data.IterableDataset[Any]):
    """A stream that ends with marked rows, so that it has a multiple of so many.

    Examples:
        >>> list(StreamWithRepeats(["a", "b", "c"], multiple=2))
        ['a', 'b', 'c', Repeated(value='a')]
    """

    def __init__(self, rows: Any, multiple: int) -> None:
        super().__init__(rows)
        self.multiple = multiple

    def __iter__(self) -> Iterator[Any]:
        count, first = 0, None
        for count, row in enumerate(self.rows, start=1):
            first = row if count == 1 else first
            yield row
        for _ in range(-count % self.multiple):
            yield Repeated(first)


class EvenBatches(_Wrapper, data.BatchSampler):
    """Batches of row numbers that end with marked ones: full, and as many for every process.

    Args:
        batches: A batch sampler.
        num_processes: What the number of batches is a multiple of.

    Examples:
        >>> batches = torch.utils.data.BatchSampler(range(3), batch_size=2, drop_last=False)
        >>> for batch in EvenBatches(batches, num_processes=3):
        ...     print(batch)
        [0, 1]
        [2, Repeated(value=0)]
        [Repeated(value=0), Repeated(value=0)]
    """

    def __init__(self, batches: Any, num_processes: int) -> None:
        super().__init__(batches)
        self.num_processes = num_processes

    def __len__(self) -> int:
        return -(-len(self.rows) // self.num_processes) * self.num_processes

    def __iter__(self) -> Iterator[list[Any]]:
        # A sampler of batches of many sizes has none.
        size = getattr(self.rows, "batch_size", None) or 1
        count, repeat = 0, None
        for count, batch in enumerate(self.rows, start=1):
            repeat = Repeated(batch[0]) if count == 1 else repeat
            yield [*batch, *[repeat] * (size - len(batch))]
        for _ in range(-count % self.num_processes):
            yield [repeat] * size


class MarkedRebalanceSampler(BatchRebalanceSampler):
    """Batches of equal cost, as `batch_rebalance` makes them, with its repeats marked.

    Where the last step of an epoch has fewer rows than there are batches to make of them, the
    sampler adds the first rows of the epoch.

    Args:
        sampler: What is to be marked.
    """

    def __init__(self, sampler: BatchRebalanceSampler) -> None:
        names = inspect.signature(BatchRebalanceSampler).parameters
        super().__init__(**{name: getattr(sampler, name) for name in names})
        self._num_left = 0

    def __iter__(self) -> Iterator[list[Any]]:
        self._num_left = len(self.lengths)
        yield from super().__iter__()

    def _assign(self, indices: Sequence[int], lengths: Sequence[int]) -> Any:
        own, repeats = indices[: self._num_left], indices[self._num_left :]
        self._num_left -= len(own)
        return super()._assign([*own, *map(Repeated, repeats)], lengths)


def mark_repeats(loader: Any) -> None:
    """Has a data loader over `RowsWithRepeats` repeat marked rows alone."""
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard) or shard.num_processes == 1 or shard.drop_last:
        return
    num_processes = 1 if shard.split_batches else shard.num_processes
    shard.batch_sampler = EvenBatches(shard.batch_sampler, num_processes)


def rows_of_dataset(dataset: Any) -> Any:
    """The dataset that a data loader was made for."""
    return dataset.rows if isinstance(dataset, RowsWithRepeats | StreamWithRepeats) else dataset


def leave_out_repeats(rows: Sequence[Any]) -> tuple[list[Any], bool]:
    """The rows of a batch that are no repeats; where there are none, one that is.

    Returns:
        The rows, and whether they are a repeat.
    """
    own = [row for row in rows if not isinstance(row, Repeated)]
    return (own, False) if own or not rows else ([rows[0].value], True)


def as_repeat(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A collated batch that trains nothing and counts for nothing."""
    untrained = {
        name: torch.full_like(batch[name], value)
        for name, value in _UNTRAINED.items()
        if isinstance(batch.get(name), Tensor)
    }
    return with_facts({**batch, **untrained}, trained=None, is_padding=True)


def without_repeats(batches: Sequence[Any]) -> list[Any]:
    """The batches that hold rows of their own."""
    return [batch for batch in batches if not facts_of(batch).is_padding]


def num_own_rows(batch: Mapping[str, Any], accelerator: Accelerator) -> int:
    """How many of the first rows of the batch that just came are no repeats."""
    if facts_of(batch).is_padding:
        return 0
    num_rows: int = find_batch_size(batch)
    loader = accelerator.gradient_state.active_dataloader
    # It reads the rows in one process, and repeats them when they are a batch already.
    if not isinstance(loader, DataLoaderDispatcher) or not loader.end_of_dataloader:
        return num_rows
    before = accelerator.process_index * num_rows
    return max(0, min(num_rows, loader.remainder - before))


@contextmanager
def outside_of_loaders(accelerator: Accelerator) -> Iterator[None]:
    """Keeps the training data's loader from deciding which rows of other data are repeats.

    Accelerate asks the innermost loader that it knows; an iterable of batches is none of those.
    """
    state = accelerator.gradient_state
    around = state.dataloader_references
    state.dataloader_references = [*around, None]
    try:
        yield
    finally:
        state.dataloader_references = around


def cut_repeats(batch: Any, accelerator: Accelerator) -> Any:
    """The batch that just came, without repeats that were added to it when it was made."""
    if accelerator.num_processes == 1 or facts_of(batch).is_padding:
        return batch
    num_own, num_rows = num_own_rows(batch, accelerator), find_batch_size(batch)
    if num_own == num_rows:
        return batch
    kept = slice_tensors(batch, slice(0, max(1, num_own)))
    return kept if num_own else as_repeat(kept)


def gather_in_order(batches: Sequence[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """What every process found for its batches, in the order of the rows; on the host."""
    found = [[values.cpu() for values in batches]]
    everywhere = gather_object(found) if accelerator.num_processes > 1 else found
    # As many for everyone, since repeats are batches too.
    return [values for batch in zip(*everywhere, strict=True) for values in batch]


def gather_own_rows(tensors: Any, num_own: int, accelerator: Accelerator) -> Any:
    """Gathers tensors of rows, as many as each process has, without those that are repeats.

    Args:
        tensors: Tensors with a row for each row of the batch, nested in any way.
        num_own: How many of the first rows of this process are no repeats.
        accelerator: Knows the processes.
    """
    counts = accelerator.gather(torch.tensor([num_own], device=accelerator.device))
    # The fill is in none of these rows.
    gathered = accelerator.gather(accelerator.pad_across_processes(tensors, dim=0))

    def choose(tensor: Tensor) -> Tensor:
        numbers = torch.arange(len(tensor) // len(counts), device=tensor.device)
        return tensor[(numbers < counts.to(tensor.device).unsqueeze(1)).flatten()]

    return recursively_apply(choose, gathered)
