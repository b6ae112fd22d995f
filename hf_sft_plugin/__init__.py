"""Response-masked supervised fine-tuning for the Hugging Face Trainer, with exact numbers.

Each name is imported from its module when it is asked for first, as in transformers: whoever wants
the collator does not wait for the trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_sft_plugin.batches.collator import DataCollatorForPromptResponse
    from hf_sft_plugin.batches.packing import PackedDataset, pack_dataset
    from hf_sft_plugin.cli.prepare_files import (
        PrepareArguments,
        parse_prepare_arguments,
        prepare_files,
    )
    from hf_sft_plugin.evaluation.generation import ExactMatch, GeneratedResponse
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
    from hf_sft_plugin.preparation.ledger import Ledger
    from hf_sft_plugin.preparation.mixture import mix_datasets
    from hf_sft_plugin.preparation.prepare import prepare_dataset
    from hf_sft_plugin.preparation.streaming import prepare_stream
    from hf_sft_plugin.preview.diff import Diff, diff_rows
    from hf_sft_plugin.preview.page import write_preview_page
    from hf_sft_plugin.preview.preview import PreviewedRow, TokenizationSetup, preview_rows
    from hf_sft_plugin.preview.terminal import (
        PreviewArguments,
        make_tokenization_setup,
        show_preview,
    )
    from hf_sft_plugin.rows.files import is_shard_set, read_chat_template, read_rows
    from hf_sft_plugin.shards.dataset import ShardDataset, check_tokenizer, verify_shards
    from hf_sft_plugin.shards.shard_set import ShardSet
    from hf_sft_plugin.shards.writer import check_shard_destination, write_shards
    from hf_sft_plugin.tokens.tokenization import tokenize_example, tokenize_prompt_and_output
    from hf_sft_plugin.training.allocator import keep_freed_memory
    from hf_sft_plugin.training.config import MaskedSFTConfig
    from hf_sft_plugin.training.masked_loss_mixin import MaskedLossMixin
    from hf_sft_plugin.training.trainer import MaskedSFTTrainer
    from hf_sft_plugin.types import IGNORE_INDEX, DataOptions, RowError, visible_lines
    from hf_sft_plugin.verification.checks import VerificationCheck
    from hf_sft_plugin.verification.verification import VerificationError, verify_training

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
    "batches.collator": ("DataCollatorForPromptResponse",),
    "batches.packing": ("PackedDataset", "pack_dataset"),
    "cli.prepare_files": ("PrepareArguments", "parse_prepare_arguments", "prepare_files"),
    "evaluation.generation": ("ExactMatch", "GeneratedResponse"),
    "loss.fused_head": ("HeadLoss",),
    "loss.head": ("head_loss",),
    "loss.logit_tile": ("LogitTransform",),
    "loss.masked_loss": ("LossNormalization", "masked_normalize", "sft_microbatch_train_step"),
    "loss.objective": ("LossObjective", "LossType"),
    "loss.token_stats": ("compute_entropy", "get_response_log_probs"),
    "preparation.ledger": ("Ledger",),
    "preparation.mixture": ("mix_datasets",),
    "preparation.prepare": ("prepare_dataset",),
    "preparation.streaming": ("prepare_stream",),
    "preview.diff": ("Diff", "diff_rows"),
    "preview.page": ("write_preview_page",),
    "preview.preview": ("PreviewedRow", "TokenizationSetup", "preview_rows"),
    "preview.terminal": ("PreviewArguments", "make_tokenization_setup", "show_preview"),
    "rows.files": ("is_shard_set", "read_chat_template", "read_rows"),
    "shards.dataset": ("ShardDataset", "check_tokenizer", "verify_shards"),
    "shards.shard_set": ("ShardSet",),
    "shards.writer": ("check_shard_destination", "write_shards"),
    "tokens.tokenization": ("tokenize_example", "tokenize_prompt_and_output"),
    "training.allocator": ("keep_freed_memory",),
    "training.config": ("MaskedSFTConfig",),
    "training.masked_loss_mixin": ("MaskedLossMixin",),
    "training.trainer": ("MaskedSFTTrainer",),
    "types": ("IGNORE_INDEX", "DataOptions", "RowError", "visible_lines"),
    "verification.checks": ("VerificationCheck",),
    "verification.verification": ("VerificationError", "verify_training"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names}
_ROOMS = (
    "batches",
    "checkpoints",
    "cli",
    "encoding",
    "evaluation",
    "loss",
    "masks",
    "models",
    "preparation",
    "preview",
    "reporting",
    "rows",
    "shards",
    "tokens",
    "training",
    "types",
    "verification",
)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
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
