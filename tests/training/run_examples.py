"""What tests of the start and the end of a run share."""

from typing import Any

from peft import LoraConfig, get_peft_model

from hf_sft_plugin import Ledger

LEDGER = Ledger(
    num_rows=2,
    num_rows_trained=2,
    num_examples=2,
    num_tokens=9,
    num_response_tokens=4,
    num_context_tokens=5,
    longest=5,
)


def with_lora(model: Any) -> Any:
    """The model with an adapter on some of its layers."""
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    )
