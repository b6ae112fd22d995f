"""What every process of the test of verified runs runs: the same training three times."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer, verify_training

# In a training; before one; not at all.
WAYS = ("inside", "before", "never")


def run(folder: Path, way: str, is_sharded: bool) -> dict[str, Any]:
    """One training, verified in one of the ways: of an adapter, or with weights in parts."""
    args = MaskedSFTConfig(
        output_dir=str(folder / way),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        verify_before_training=way == "inside",
    )
    # The processes meet here, without which nothing can be sharded.
    assert args.device.type == "cpu"
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", attention_dropout=0.25)
    if is_sharded:
        for layer in (*model.model.layers, model):
            fully_shard(layer)
    trainer = MaskedSFTTrainer(
        model,
        args,
        train_dataset=load_from_disk(folder / "train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        peft_config=None
        if is_sharded
        else LoraConfig(target_modules="all-linear", lora_dropout=0.25),
    )
    if is_sharded:
        # On a CPU Accelerate knows DDP alone.
        trainer.accelerator.prepare_model = lambda model, **options: model
    checks = verify_training(trainer) if way == "before" else []
    trainer.train()
    clock = ("runtime", "per_second")
    return {
        "checks": [(check.name, check.value, check.bound) for check in checks],
        "weights": [
            (p.full_tensor() if isinstance(p, DTensor) else p).tolist()
            for p in trainer.model.parameters()
            if p.requires_grad
        ],
        "log": [
            {k: v for k, v in log.items() if not k.endswith(clock)}
            for log in trainer.state.log_history
        ],
    }


def run_all(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """A training in each of the ways, of an adapter and with weights in parts."""
    return [{way: run(folder, way, is_sharded) for way in WAYS} for is_sharded in (False, True)]


def make_trainer(folder: Path, name: str, num_rows: int, batch_size: int) -> MaskedSFTTrainer:
    """A trainer of the first rows, for one step."""
    return MaskedSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        MaskedSFTConfig(
            output_dir=str(folder / name),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=batch_size,
            max_steps=1,
        ),
        train_dataset=load_from_disk(folder / "train").select(range(num_rows)),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )


def run_unequal(folder: Path) -> str:
    """A verification that fails on the last process alone."""
    trainer = make_trainer(folder, "unequal", num_rows=12, batch_size=4)
    if trainer.args.process_index == trainer.args.world_size - 1:
        trainer.stop_token_ids = frozenset({299})
    failed = [c for c in verify_training(trainer, stop_on_failure=False) if c.has_failed]
    return ", ".join(f"{check.name} {check.value:.0f}" for check in failed)


def run_uneven(folder: Path) -> list[tuple[str, float | None]]:
    """A verification of one row on the last process, and of two on the others."""
    num_rows = 2 * int(os.environ["WORLD_SIZE"]) - 1
    trainer = make_trainer(folder, "uneven", num_rows, batch_size=2)
    checks = verify_training(trainer)
    trainer.train()
    return [(check.name, check.value) for check in checks]
