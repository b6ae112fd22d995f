"""Who takes part in a benchmark: this plugin, with and without its levers, and the others."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from workload import Setup

from hf_sft_plugin import IGNORE_INDEX, MaskedSFTConfig, MaskedSFTTrainer, keep_freed_memory


def trainer_settings(
    setup: Setup, folder: str, num_steps: int, logging_steps: int
) -> dict[str, Any]:
    """The settings that all contestants get."""
    return {
        "output_dir": folder,
        "max_steps": num_steps,
        "per_device_train_batch_size": setup.batch_size,
        "gradient_accumulation_steps": setup.accumulation,
        "train_sampling_strategy": "sequential",
        "bf16": setup.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": logging_steps,
        "logging_first_step": True,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def why_impossible(contestants: Sequence[str]) -> str | None:
    """One sentence about the first contestant that cannot take part here; None if all can."""
    for name in contestants:
        if name == "liger" and not torch.cuda.is_available():
            return (
                "'liger' runs on CUDA alone, and there is no such device here: leave it out of "
                "--contestants."
            )
        for prefix, package, install in (
            ("liger", "liger_kernel", "liger-kernel"),
            ("trl", "trl", '"hf_sft_plugin[bench]"'),
        ):
            if name.startswith(prefix) and importlib.util.find_spec(package) is None:
                return (
                    f"'{name}' needs {package}, which is not installed: pip install {install}, or "
                    "leave it out of --contestants."
                )
    return None


def import_ahead(name: str) -> None:
    """Imports what a contestant needs, so that no measurement holds the import."""
    if name.startswith("trl"):
        # Its names are loaded when they are first asked for.
        _ = importlib.import_module("trl").SFTTrainer


def with_labels(rows: Dataset) -> Dataset:
    """The form that other trainers take: `labels` instead of `response_mask`.

    Rows that are not tokenized, or have their labels, are given back as they are.
    """
    if "response_mask" not in rows.column_names:
        return rows

    def to_labels(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["response_mask"], strict=True)
        return {"labels": [token if trained else IGNORE_INDEX for token, trained in pairs]}

    return rows.map(to_labels, remove_columns=rows.column_names).add_column(
        "input_ids", rows["input_ids"]
    )


def ours(
    model: Any,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    **own: Any,
) -> Trainer:
    """This plugin as it comes, or with some settings of its own."""
    args = MaskedSFTConfig(**settings, **own)
    return MaskedSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def plain(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """The Trainer of transformers with the model's own loss; it logs neither entropy nor hits."""
    return Trainer(
        model,
        TrainingArguments(**settings),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=with_labels(rows),
        processing_class=tokenizer,
    )


def trl_default(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """TRL's SFTTrainer as it comes; only its limit of 1024 tokens is lifted."""
    trl = importlib.import_module("trl")
    trainer: Trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**{"max_length": None, **settings}),
        train_dataset=with_labels(rows),
        processing_class=tokenizer,
    )
    return trainer


def trl_best(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """TRL's SFTTrainer without gradient checkpointing and without padding."""
    best = {**settings, "gradient_checkpointing": False, "padding_free": True}
    return trl_default(model, rows, tokenizer, best)


def liger(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """The Trainer of transformers with Liger's kernels."""
    return plain(model, rows, tokenizer, {**settings, "use_liger_kernel": True})


def with_allocator(contestant: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """A contestant whose process keeps the memory that it frees."""

    def take_part(*arguments: Any) -> Trainer:
        keep_freed_memory()
        return contestant(*arguments)

    return take_part


CONTESTANTS: dict[str, Callable[..., Trainer]] = {
    "ours": ours,
    "plain": plain,
    "trl-default": trl_default,
    "trl-best": trl_best,
    "liger": liger,
    # Ours without one of its levers, to show what each brings.
    "ours-padded": partial(ours, padding_free="off"),
    "ours-full-logits": partial(ours, fused_head="off"),
    "ours-layers-off": partial(ours, fused_layers="off"),
    "ours-stock-allocator": partial(ours, keep_freed_memory=False),
    # The others with the allocator setting that we make ourselves.
    "plain+allocator": with_allocator(plain),
    "trl-default+allocator": with_allocator(trl_default),
    "trl-best+allocator": with_allocator(trl_best),
}

# Who is compared with ours when nobody is named.
OTHERS = ("plain", "trl-default", "trl-best")


def default_contestants(*others: str) -> list[str]:
    """Those that are compared when nobody is named: ours, the others, Liger where it runs."""
    return ["ours", *others, *([] if why_impossible(["liger"]) else ["liger"])]
