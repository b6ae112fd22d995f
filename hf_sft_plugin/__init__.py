"""Response-masked supervised fine-tuning for the Hugging Face Trainer, with exact numbers."""

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
from hf_sft_plugin.types import IGNORE_INDEX, DataOptions, RowError

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
    "write_preview_page",
    "write_shards",
]
