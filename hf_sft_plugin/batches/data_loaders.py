"""Data loaders: batches come with what is known of them on the host, and with marked repeats."""

from collections.abc import Callable
from typing import Any

import datasets
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import BatchRebalanceSampler

from hf_sft_plugin.batches.padding_rows import (
    MarkedRebalanceSampler,
    RowsWithRepeats,
    StreamWithRepeats,
    mark_repeats,
)
from hf_sft_plugin.batches.prompt_sampler import GroupedSampler, group_prompts, require_rows
from hf_sft_plugin.batches.response_batch import CollatorWithLayout
from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.checkpoints.data_order import data_seed


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
        self.data_collator = CollatorWithLayout(collate, self.shared_prompts != "off", finds_layout)
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
