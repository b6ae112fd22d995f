"""What every process of a test of the end of a script runs."""

import atexit
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_sft_plugin import MaskedLossMixin


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of a user."""


def run(folder: str) -> tuple[bool, list[str], list[str]]:
    """Trains, ends as an interpreter does, and returns whether a group and which threads are left.

    Returns:
        Whether there is still a process group, and the names of the threads before and after.
    """
    # What the process that this one was forked from does at its end.
    atexit._clear()
    fields: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
    fields |= {"hidden_size": 16, "intermediate_size": 32, "model_type": "llama"}
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 1]}
    # As in a script, the trainer is there until the very end.
    trainer = OwnTrainer(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)),
        TrainingArguments(
            folder, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_steps=9
        ),
        train_dataset=Dataset.from_list([row] * 8),
    )
    trainer.train()
    before = _threads()
    atexit._run_exitfuncs()
    assert trainer.state.global_step == 2
    return torch.distributed.is_initialized(), before, _threads()


def _threads() -> list[str]:
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
