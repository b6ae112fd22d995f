"""What every process of a distributed test of generation runs.

The folder holds a model, a tokenizer, the dataset `eval` and the metric `first_letter`.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer


def run(folder: Path, batch_size: int) -> dict[str, Any]:
    """Evaluates an adapter in the state in which a training with checkpointing leaves it."""
    torch.manual_seed(1)
    rows = load_from_disk(folder / "eval")
    trainer = MaskedSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64),
        MaskedSFTConfig(
            output_dir=str(folder / "run"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_eval_batch_size=batch_size,
            gradient_checkpointing=True,
            eval_masks=["all"],
            predict_with_generate=True,
            generation_max_new_tokens=8,
            generation_metrics=["exact_match", str(folder / "first_letter")],
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        peft_config=LoraConfig(
            target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False
        ),
    )
    unwrapped: Any = trainer.model
    unwrapped.train()
    was_training = unwrapped.training
    responses = trainer.generate_responses()
    is_training = unwrapped.training
    return {
        "was_training": was_training,
        "is_training": is_training,
        "stop_token_ids": sorted(trainer.stop_token_ids),
        "responses": [tuple(response) for response in responses],
        "metrics": {k: v for k, v in trainer.evaluate().items() if "per_second" not in k},
    }
