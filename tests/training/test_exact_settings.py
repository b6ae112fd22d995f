"""Settings that would make the numbers inexact are refused before anything runs."""

from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer

from hf_sft_plugin import MaskedLossMixin, MaskedSFTConfig


class MaskedTrainer(MaskedLossMixin, Trainer):
    """Somebody's own trainer."""


def test_a_loss_function_that_would_never_be_called_is_refused(
    model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    with pytest.raises(ValueError, match="compute_loss_func was given"):
        MaskedTrainer(
            model=model, args=make_config(), compute_loss_func=lambda *args, **kwargs: None
        )


def test_several_gpus_in_one_process_are_refused_with_the_command_to_use(
    model: Any, make_config: Callable[..., MaskedSFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make_config()
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match="accelerate launch --num_processes 4"):
        MaskedTrainer(model=model, args=args)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("get_cp_size", "Context or sequence parallelism splits rows"),
        ("get_sp_size", "Context or sequence parallelism splits rows"),
        ("get_tp_size", "Under tensor parallelism several processes see the same rows"),
    ],
)
def test_parallelism_within_a_row_is_refused(
    method: str,
    message: str,
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MaskedTrainer, method, lambda self: 2)
    with pytest.raises(ValueError, match=message):
        MaskedTrainer(model=model, args=make_config())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "leaves out the keys and values that the adapter puts before every row",
        ),
        (
            LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
            "PEFT runs an adapter with invocation tokens for nothing but training",
        ),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), None),
        (LoraConfig(task_type="CAUSAL_LM"), None),
    ],
    ids=["prefix", "invoked", "prompt", "lora"],
)
def test_adapters_that_gradient_checkpointing_would_leave_out_are_refused(
    config: PeftConfig,
    message: str | None,
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    adapted = get_peft_model(model, config)
    MaskedTrainer(model=adapted, args=make_config())
    args = make_config(gradient_checkpointing=True)
    if message is None:
        MaskedTrainer(model=adapted, args=args)
        return
    with pytest.raises(ValueError, match=f"{message}.* Set gradient_checkpointing to false"):
        MaskedTrainer(model=adapted, args=args)
