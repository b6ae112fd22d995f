"""What a test of memory runs in a process of its own."""

import ctypes
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.batches.microbatches import Microbatches


def memory(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Peaks(TrainerCallback):
    """Keeps the highest point of every step after the first, in which states are made."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.found.append(memory("VmHWM"))


class Estimating(MaskedSFTTrainer):
    """Keeps the estimate of its last step."""

    def describe_memory(self, batches: Any, is_padded: bool) -> None:
        parts = [p for b in batches for p in (b if isinstance(b, Microbatches) else [b])]
        lengths = [part["attention_mask"].sum(-1).tolist() for part in parts]
        assert self._step_memory is not None
        process = self._step_memory.process
        self.found = {"estimate": self._step_memory.peak(lengths), "process": process}
        super().describe_memory(batches, is_padded)


def make_model(model: dict[str, Any] | str, dtype: str) -> Any:
    """One of random weights, or the one in a folder."""
    if isinstance(model, str):
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    fields = {"max_position_embeddings": 512, "eos_token_id": 1, "pad_token_id": 0, **model}
    config = AutoConfig.for_model(fields.pop("model_type"), bos_token_id=None, **fields)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def measure(
    model: dict[str, Any] | str, settings: dict[str, Any], is_lora: bool, dtype: str = "float32"
) -> dict[str, float]:
    """Trains for two steps.

    Returns:
        In bytes: what the process held before it, what its steps were estimated to need, how much
        of that beside the model, and what the process took at its highest point.
    """
    words = {"a": 0, "b": 1, **{str(number): number for number in range(2, 1000)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        eos_token="b",
        pad_token="a",
    )
    mask = [0] * 96 + [1] * 32
    # Rows that began alike would share what they have in common.
    rows = torch.randint(2, 1000, (64, 128))
    rows[:, 0] = torch.arange(2, 66)
    gc.collect()
    before = memory("VmRSS")
    peaks = Peaks()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Estimating(
            make_model(model, dtype),
            MaskedSFTConfig(
                output_dir=folder,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                max_steps=2,
                **settings,
            ),
            train_dataset=Dataset.from_dict(
                {"input_ids": rows.tolist(), "response_mask": [mask] * 64}
            ),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear") if is_lora else None,
            callbacks=[peaks],
        )
        trainer.train()
    return {"before": before, **trainer.found, "peak": peaks.found[-1]}


def measure_all(
    cases: list[dict[str, Any]], are_tensors_mapped: bool = False
) -> list[dict[str, float]]:
    """Measures one case after the other.

    Args:
        cases: Arguments of `measure`.
        are_tensors_mapped: Whether every tensor is a mapping of its own, which leaves no gaps.
    """
    if are_tensors_mapped:
        # M_MMAP_THRESHOLD of malloc.h.
        ctypes.CDLL(None).mallopt(-3, 2**16)
    # What libraries take at their first use is not the model's.
    warm = torch.nn.Linear(256, 256)
    warm(torch.randn(512, 256)).sum().backward()
    warm.zero_grad()
    warm.bfloat16()(torch.randn(512, 256).bfloat16()).sum().backward()
    return [measure(**case) for case in cases]
