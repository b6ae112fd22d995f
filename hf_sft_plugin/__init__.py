"""Response-masked supervised fine-tuning for the Hugging Face Trainer, with exact numbers."""

from hf_sft_plugin.data.collator import DataCollatorForPromptResponse
from hf_sft_plugin.data.ledger import Ledger
from hf_sft_plugin.data.prepare import prepare_dataset
from hf_sft_plugin.data.tokenization import tokenize_example, tokenize_prompt_and_output
from hf_sft_plugin.loss.masked_loss import (
    LossNormalization,
    masked_normalize,
    sft_microbatch_train_step,
)
from hf_sft_plugin.loss.token_stats import compute_entropy, get_response_log_probs
from hf_sft_plugin.training.config import MaskedSFTConfig
from hf_sft_plugin.training.evaluation import ExactMatch, GeneratedResponse
from hf_sft_plugin.training.masked_loss_mixin import MaskedLossMixin
from hf_sft_plugin.training.trainer import MaskedSFTTrainer
from hf_sft_plugin.types import IGNORE_INDEX, RowError

__all__ = [
    "IGNORE_INDEX",
    "DataCollatorForPromptResponse",
    "ExactMatch",
    "GeneratedResponse",
    "Ledger",
    "LossNormalization",
    "MaskedLossMixin",
    "MaskedSFTConfig",
    "MaskedSFTTrainer",
    "RowError",
    "compute_entropy",
    "get_response_log_probs",
    "masked_normalize",
    "prepare_dataset",
    "sft_microbatch_train_step",
    "tokenize_example",
    "tokenize_prompt_and_output",
]
