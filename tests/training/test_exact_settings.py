"""Settings that would make the numbers inexact are refused before anything runs."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer

from hf_sft_plugin import MaskedLossMixin, MaskedSFTConfig
from hf_sft_plugin.training.trainer_arguments import refuse_inexact_settings


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


def test_a_model_that_comes_in_dataparallel_is_refused_with_the_command_to_use(
    model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    with pytest.raises(ValueError, match="torchrun --nproc_per_node gpu your_script"):
        MaskedTrainer(model=nn.DataParallel(model), args=make_config())


def test_processes_that_do_not_know_of_each_other_are_refused(
    model: Any, make_config: Callable[..., MaskedSFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = MaskedTrainer(model=model, args=make_config())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, .* set use_cpu to true"):
        refuse_inexact_settings(trainer)


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp1_is_refused_and_fsdp2_is_not(
    version: int,
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = MaskedTrainer(model=model, args=make_config())
    plugin = SimpleNamespace(fsdp_version=version)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    with nullcontext() if version == 2 else pytest.raises(ValueError, match="Use FSDP2"):
        refuse_inexact_settings(trainer)


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
    with pytest.raises(ValueError, match=f"{message}.* Set activation_checkpointing .* to false"):
        MaskedTrainer(model=adapted, args=args)
