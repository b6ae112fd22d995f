"""Response-masked supervised fine-tuning for the Hugging Face Trainer, with exact numbers.

Each name is imported from its module when it is asked for first, as in transformers: whoever wants
the collator does not wait for the trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_sft_plugin.data.collator import DataCollatorForPromptResponse
    from hf_sft_plugin.data.ledger import Ledger
    from hf_sft_plugin.data.mixture import mix_datasets
    from hf_sft_plugin.data.packing import PackedDataset, pack_dataset
    from hf_sft_plugin.data.prepare import prepare_dataset
    from hf_sft_plugin.data.prepare_files import (
        PrepareArguments,
        parse_prepare_arguments,
        prepare_files,
    )
    from hf_sft_plugin.data.preview import PreviewedRow, TokenizationSetup, preview_rows
    from hf_sft_plugin.data.preview_diff import Diff, diff_rows
    from hf_sft_plugin.data.preview_page import write_preview_page
    from hf_sft_plugin.data.preview_terminal import (
        PreviewArguments,
        make_tokenization_setup,
        show_preview,
    )
    from hf_sft_plugin.data.row_files import read_chat_template, read_rows
    from hf_sft_plugin.data.shard_set import ShardSet, is_shard_set
    from hf_sft_plugin.data.shard_writer import check_shard_destination, write_shards
    from hf_sft_plugin.data.shards import ShardDataset, check_tokenizer, verify_shards
    from hf_sft_plugin.data.streaming import prepare_stream
    from hf_sft_plugin.data.tokenization import tokenize_example, tokenize_prompt_and_output
    from hf_sft_plugin.loss.fused_head import HeadLoss
    from hf_sft_plugin.loss.head import head_loss
    from hf_sft_plugin.loss.logit_tile import LogitTransform
    from hf_sft_plugin.loss.masked_loss import (
        LossNormalization,
        masked_normalize,
        sft_microbatch_train_step,
    )
    from hf_sft_plugin.loss.objective import LossObjective, LossType
    from hf_sft_plugin.loss.token_stats import compute_entropy, get_response_log_probs
    from hf_sft_plugin.training.allocator import keep_freed_memory
    from hf_sft_plugin.training.checks import VerificationCheck
    from hf_sft_plugin.training.config import MaskedSFTConfig
    from hf_sft_plugin.training.evaluation import ExactMatch, GeneratedResponse
    from hf_sft_plugin.training.masked_loss_mixin import MaskedLossMixin
    from hf_sft_plugin.training.trainer import MaskedSFTTrainer
    from hf_sft_plugin.training.verification import VerificationError, verify_training
    from hf_sft_plugin.types import IGNORE_INDEX, DataOptions, RowError, visible_lines

__version__ = "0.1.0"

__all__ = [
    "IGNORE_INDEX",
    "DataCollatorForPromptResponse",
    "DataOptions",
    "Diff",
    "ExactMatch",
    "GeneratedResponse",
    "HeadLoss",
    "Ledger",
    "LogitTransform",
    "LossNormalization",
    "LossObjective",
    "LossType",
    "MaskedLossMixin",
    "MaskedSFTConfig",
    "MaskedSFTTrainer",
    "PackedDataset",
    "PrepareArguments",
    "PreviewArguments",
    "PreviewedRow",
    "RowError",
    "ShardDataset",
    "ShardSet",
    "TokenizationSetup",
    "VerificationCheck",
    "VerificationError",
    "check_shard_destination",
    "check_tokenizer",
    "compute_entropy",
    "diff_rows",
    "get_response_log_probs",
    "head_loss",
    "is_shard_set",
    "keep_freed_memory",
    "make_tokenization_setup",
    "masked_normalize",
    "mix_datasets",
    "pack_dataset",
    "parse_prepare_arguments",
    "prepare_dataset",
    "prepare_files",
    "prepare_stream",
    "preview_rows",
    "read_chat_template",
    "read_rows",
    "sft_microbatch_train_step",
    "show_preview",
    "tokenize_example",
    "tokenize_prompt_and_output",
    "verify_shards",
    "verify_training",
    "visible_lines",
    "write_preview_page",
    "write_shards",
]

# What each module defines; type checkers read the imports above.
_NAMES_OF_MODULES = {
    "data.collator": ("DataCollatorForPromptResponse",),
    "data.ledger": ("Ledger",),
    "data.mixture": ("mix_datasets",),
    "data.packing": ("PackedDataset", "pack_dataset"),
    "data.prepare": ("prepare_dataset",),
    "data.prepare_files": ("PrepareArguments", "parse_prepare_arguments", "prepare_files"),
    "data.preview": ("PreviewedRow", "TokenizationSetup", "preview_rows"),
    "data.preview_diff": ("Diff", "diff_rows"),
    "data.preview_page": ("write_preview_page",),
    "data.preview_terminal": ("PreviewArguments", "make_tokenization_setup", "show_preview"),
    "data.row_files": ("read_chat_template", "read_rows"),
    "data.shard_set": ("ShardSet", "is_shard_set"),
    "data.shard_writer": ("check_shard_destination", "write_shards"),
    "data.shards": ("ShardDataset", "check_tokenizer", "verify_shards"),
    "data.streaming": ("prepare_stream",),
    "data.tokenization": ("tokenize_example", "tokenize_prompt_and_output"),
    "loss.fused_head": ("HeadLoss",),
    "loss.head": ("head_loss",),
    "loss.logit_tile": ("LogitTransform",),
    "loss.masked_loss": ("LossNormalization", "masked_normalize", "sft_microbatch_train_step"),
    "loss.objective": ("LossObjective", "LossType"),
    "loss.token_stats": ("compute_entropy", "get_response_log_probs"),
    "training.allocator": ("keep_freed_memory",),
    "training.checks": ("VerificationCheck",),
    "training.config": ("MaskedSFTConfig",),
    "training.evaluation": ("ExactMatch", "GeneratedResponse"),
    "training.masked_loss_mixin": ("MaskedLossMixin",),
    "training.trainer": ("MaskedSFTTrainer",),
    "training.verification": ("VerificationError", "verify_training"),
    "types": ("IGNORE_INDEX", "DataOptions", "RowError", "visible_lines"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("data", "loss", "reporting", "training", "types"):
        # Whoever goes into a room by a dot finds its modules there.
        for module in _NAMES_OF_MODULES:
            importlib.import_module(f"{__name__}.{module}")
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    # From now on it is found without this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
