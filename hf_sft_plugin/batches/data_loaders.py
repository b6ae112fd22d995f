"""Data loaders and the order of their rows.

Batches come with what is known of them on the host, and with marked padding rows. Rows follow each
other at random, by their prompts, or by their lengths.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import has_length

from hf_sft_plugin.batches.host_facts import (
    HOST_FACTS,
    HostFacts,
    find_layout,
    find_trained_positions,
)
from hf_sft_plugin.batches.padding_rows import (
    MarkedRebalanceSampler,
    RowsWithRepeats,
    StreamWithRepeats,
    as_repeat,
    leave_out_repeats,
    mark_repeats,
)
from hf_sft_plugin.batches.shared_prompts import MIN_SHARED_TOKENS
from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.types import IGNORE_INDEX

_ROWS_AT_A_TIME = 1000


class CollatorWithFacts:
    """Adds `HostFacts` to every batch of a collator.

    Args:
        collate: Any collator.
        share_prompts: See `find_layout`.
        finds_layout: False adds the trained positions alone.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        share_prompts: bool = False,
        finds_layout: bool = True,
    ) -> None:
        self.collate = collate
        self.share_prompts = share_prompts
        self.finds_layout = finds_layout

    def __call__(self, rows: Any) -> Any:
        """The batch with its trained positions, and a layout where it can be laid end to end.

        Rows that are marked as repeats are left out, unless there are no others.
        """
        own, is_repeated = leave_out_repeats(rows)
        batch = self.collate(own)
        if not isinstance(batch, MutableMapping):
            return batch
        if is_repeated:
            batch = as_repeat(batch)
        layout = find_layout(batch, self.share_prompts) if self.finds_layout else None
        labels = batch.get("labels")
        has_labels = isinstance(labels, Tensor) and labels.ndim == 2
        trained = find_trained_positions(labels) if has_labels else None
        if layout is not None or trained is not None or is_repeated:
            batch[HOST_FACTS] = HostFacts(layout, trained, is_padding=is_repeated)
        return batch


class DataLoadersMixin(TrainerBase):
    """Gives a `Trainer` data loaders whose batches know their layout and which rows are repeats.

    Attributes:
        padding_free: `auto`, `on` or `off`; see `MaskedSFTConfig`.
        shared_prompts: `auto` or `off`; see `MaskedSFTConfig`.
        group_by_prompt: See `MaskedSFTConfig`.
    """

    padding_free: str = "auto"
    shared_prompts: str = "auto"
    group_by_prompt: bool = False

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if self.group_by_prompt and is_training:
            require_rows(dataset)
        rest = is_training, dataloader_key
        # Lengths are found where the batch is made, before it is on a device.
        dispatches = self.accelerator.dispatch_batches
        if dispatches is None:
            dispatches = isinstance(dataset, IterableDataset)
        if dispatches:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *rest)
        own = collate = self.data_collator
        marked, sampler = dataset, sampler_fn
        rebalances = is_training and self.args.train_sampling_strategy == "batch_rebalance"
        if self.accelerator.num_processes > 1 or rebalances:
            # Here, because the Trainer would not know the wrapped dataset, nor its marked rows.
            if isinstance(dataset, datasets.Dataset):
                dataset = self._remove_unused_columns(dataset, description)
            else:
                collate = self._get_collator_with_removed_columns(own, description)
            marked = self._mark_rows(dataset, batch_size)
            sampler = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        finds_layout = self.padding_free != "off"
        self.data_collator = CollatorWithFacts(collate, self.shared_prompts != "off", finds_layout)
        try:
            loader = super()._get_dataloader(marked, description, batch_size, sampler, *rest)
        finally:
            self.data_collator = own
        mark_repeats(loader)
        return loader

    def _mark_rows(self, dataset: Any, batch_size: int) -> Any:
        if not isinstance(dataset, IterableDataset):
            return RowsWithRepeats(dataset)
        # Every process reads the stream, and keeps its own rows of it.
        num_shares = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        return StreamWithRepeats(dataset, batch_size * num_shares)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_prompt:
            sampler = super()._get_train_sampler(train_dataset)
            if isinstance(sampler, BatchRebalanceSampler):
                return MarkedRebalanceSampler(sampler)
            return sampler
        rows = self.train_dataset if train_dataset is None else train_dataset
        return GroupedSampler(group_prompts(rows), data_seed(self.args))


def data_seed(args: TrainingArguments) -> int:
    """What decides on the order of the rows."""
    return args.seed if args.data_seed is None else args.data_seed


def group_prompts(rows: Any) -> list[list[int]]:
    """Groups rows whose prompts are equal, or go on from that of another row.

    The prompt of a row is what comes before its first trained token. Turns of one conversation, as
    rows of their own, are a group: the prompt of each begins with that of the first.

    Args:
        rows: Tokenized rows, with a `response_mask` or `labels`.

    Returns:
        The rows of each group, in the order in which they come in the data.

    Raises:
        ValueError: If the rows are not tokenized.

    Examples:
        >>> prompt = list(range(20))
        >>> rows = [{"input_ids": [*prompt, n], "response_mask": [0] * 20 + [1]} for n in (5, 6)]
        >>> group_prompts([rows[0], {"input_ids": [7, 8], "response_mask": [0, 1]}, rows[1]])
        [[0, 2], [1]]
    """
    prompts = [_prompt(row, number) for number, row in enumerate(_each(rows))]
    shortest = MIN_SHARED_TOKENS * np.dtype(np.int64).itemsize
    groups: list[list[int]] = []
    root: bytes | None = None
    # A prompt comes right before those that go on from it.
    for row in sorted(range(len(prompts)), key=prompts.__getitem__):
        if root is not None and len(root) >= shortest and prompts[row].startswith(root):
            groups[-1].append(row)
        else:
            root = prompts[row]
            groups.append([row])
    return sorted(sorted(group) for group in groups)


def require_rows(dataset: Any) -> None:
    """Refuses a stream.

    Raises:
        ValueError: If the dataset has no length.
    """
    if not has_length(dataset):
        raise ValueError(
            "group_by_prompt is set, but a stream has no rows to choose from. Set it to False, "
            "and keep rows with the same prompt together in the stream itself."
        )


def _each(rows: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(rows, Dataset):
        return (rows[number] for number in range(len(rows)))
    names = [name for name in ("input_ids", "response_mask", "labels") if name in rows.column_names]
    batches = rows.select_columns(names).iter(_ROWS_AT_A_TIME)
    return (
        dict(zip(names, values, strict=True))
        for batch in batches
        for values in zip(*(batch[name] for name in names), strict=True)
    )


def _prompt(row: Mapping[str, Any], number: int) -> bytes:
    """The tokens before the first that is trained, as bytes that compare as they do."""
    mask, labels = row.get("response_mask"), row.get("labels")
    if row.get("input_ids") is None or (mask is None and labels is None):
        raise ValueError(
            f"Row {number} of the training data has the columns {', '.join(row)}, but "
            "group_by_prompt looks for equal prompts in input_ids with a response_mask or labels. "
            "Prepare the rows with prepare_dataset, or set group_by_prompt to False."
        )
    is_trained = np.asarray(labels) != IGNORE_INDEX if mask is None else np.asarray(mask) != 0
    end = int(is_trained.argmax()) if is_trained.any() else len(is_trained)
    return np.asarray(row["input_ids"][:end], dtype=">i8").tobytes()


class GroupedSampler(Sampler[int]):
    """Every row once per epoch: groups in a new random order, each in one piece.

    Args:
        groups: The rows of each group.
        seed: Together with the epoch it decides the order, on every process the same.

    Examples:
        >>> sampler = GroupedSampler([[0, 2], [1], [3, 4]], seed=0)
        >>> sorted(sampler) == list(range(len(sampler)))
        True
    """

    def __init__(self, groups: Sequence[Sequence[int]], seed: int) -> None:
        self.groups = groups
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Rows."""
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        """The rows of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for number in torch.randperm(len(self.groups), generator=generator).tolist():
            yield from self.groups[number]

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next; data loaders call this."""
        self.epoch = epoch


class SeededLengthSampler(LengthGroupedSampler):
    """Rows of about one length follow each other, in an order that seed and epoch decide.

    That of `transformers` draws it from the random numbers of the process: another order on every
    process once these have parted, and another after resuming.

    Args:
        lengths: Tokens of each row.
        num_rows: Rows of an optimizer step.
        seed: Together with the epoch it decides the order, on every process the same.

    Examples:
        >>> sampler = SeededLengthSampler([5, 9, 5, 9], num_rows=2, seed=0)
        >>> sorted(sampler), list(sampler) == list(sampler)
        ([0, 1, 2, 3], True)
    """

    def __init__(self, lengths: list[int], num_rows: int, seed: int) -> None:
        super().__init__(num_rows, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        """The rows of an epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next; data loaders call this."""
        self.epoch = epoch
