"""Which rows every optimizer step gets: a checkpoint keeps what decides on it, to be compared."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import has_length

from hf_sft_plugin.batches.data_loaders import data_seed
from hf_sft_plugin.batches.packing import PackedDataset
from hf_sft_plugin.preparation.certificate import tokenizer_digest
from hf_sft_plugin.shards.dataset import ShardDataset

_NUM_DIGESTED_ROWS = 1000
_UNSEEDED = "random, without a seed"
_ROWS_PER_STEP, _STEPS = "rows per optimizer step", "optimizer steps per epoch"


def describe_order(trainer: Trainer, rows_per_batch: int, steps_per_epoch: int) -> dict[str, Any]:
    """What decides on the rows of every optimizer step, as plain values by name.

    Args:
        trainer: Its settings and its training data.
        rows_per_batch: Of one process.
        steps_per_epoch: Optimizer steps of an epoch; not looked at for a stream.
    """
    args, dataset = trainer.args, trainer.train_dataset
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    order: dict[str, Any] = {}
    # Whoever lets memory decide on it cannot be held to it.
    if not args.auto_find_batch_size:
        order[_ROWS_PER_STEP] = rows_per_batch * accumulation * processes
        if has_length(dataset):
            order[_STEPS] = steps_per_epoch
    if not has_length(dataset):
        tokenizer = trainer.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            order["tokenizer"] = tokenizer_digest(tokenizer)[:16]
            order["chat template"] = _digest(tokenizer.chat_template)
        if hasattr(args, "data_options"):
            order["data options"] = _digest(repr(args.data_options()))
        if getattr(dataset, "num_shards", 0) != 1:
            # Workers read shards of their own, and take turns with batches.
            order["dataloader_num_workers"] = args.dataloader_num_workers
            if args.dataloader_num_workers > 1:
                order["processes"] = processes
                order["per_device_train_batch_size"] = rows_per_batch
        return order
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    order["training rows"] = len(dataset)
    order["digest of the training rows"] = digest_rows(dataset)
    if getattr(trainer, "group_by_prompt", False):
        strategy = "group_by_prompt"
    elif strategy == "random" and not getattr(
        args.accelerator_config, "use_seedable_sampler", True
    ):
        strategy = _UNSEEDED
    order["order"] = strategy
    if strategy != "sequential":
        order["data_seed"] = data_seed(args)
    return order


def refuse_other_order(
    checkpoint: str, before: Mapping[str, Any], now: Mapping[str, Any], rows_per_batch: int
) -> None:
    """Refuses to go on with other rows, or with the same rows in another order.

    Args:
        checkpoint: The folder that is resumed from.
        before: What `describe_order` said when it was written.
        now: What it says now.
        rows_per_batch: Of all processes together.

    Raises:
        ValueError: With what has changed, and what to do.
    """
    if now.get("order") == _UNSEEDED:
        raise ValueError(
            f"{checkpoint} cannot be resumed where it stopped: with use_seedable_sampler False, "
            "nobody knows in which order the rows came. Set ignore_data_skip to begin the epoch "
            "anew, and leave use_seedable_sampler out of accelerator_config next time."
        )
    changed = [name for name, value in now.items() if before.get(name) != value]
    if not changed:
        return
    what = "; ".join(f"{name}: {before.get(name)} then, {now[name]} now" for name in changed)
    remedy = "Make it as it was"
    accumulation, rest = divmod(before.get(_ROWS_PER_STEP, 1), rows_per_batch)
    if _ROWS_PER_STEP in changed and {*changed} <= {_ROWS_PER_STEP, _STEPS} and not rest:
        remedy = f"Set gradient_accumulation_steps to {accumulation}"
    raise ValueError(
        f"{checkpoint} cannot be resumed where it stopped, because which rows come next has "
        f"changed ({what}): some would be trained twice, others never. {remedy}, or set "
        "ignore_data_skip to begin the epoch anew with the rows and the order of now."
    )


def digest_rows(dataset: Any) -> str | None:
    """Names the rows of a dataset by up to 1,000 of them, evenly spread.

    Returns:
        Hexadecimal digits; None where reading a row twice may give two rows, as with a dataset
        that draws random numbers, or rows hold more than text and numbers.

    Examples:
        >>> rows = Dataset.from_dict({"input_ids": [[5, 6], [7]]})
        >>> digest_rows(rows) == digest_rows(rows.select([1, 0]))
        False
    """
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":
            return None
        dataset = dataset.with_format(None)
    elif not isinstance(dataset, PackedDataset | ShardDataset):
        return None
    count = min(len(dataset), _NUM_DIGESTED_ROWS)
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    try:
        return _digest([dataset[number] for number in chosen])
    except TypeError:
        return None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
