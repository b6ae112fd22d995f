"""Adapters: added once, trainable, and never on top of another."""

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model

from hf_sft_plugin.training.adapters import add_adapter


def lora(**overrides: Any) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **overrides}
    )


def with_native_adapter(model: Any) -> Any:
    model.add_adapter(lora())
    return model


def trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("config", "num_trained"),
    [
        # Two layers; rank 4 from 32 to 32 features; a vector of 16 for keys and for values.
        (lora(), 2 * 4 * (32 + 32)),
        (lora(target_modules=["q_proj", "k_proj"]), 2 * 4 * (32 + 32 + 32 + 16)),
        (
            IA3Config(
                task_type="CAUSAL_LM",
                target_modules=["k_proj", "v_proj"],
                feedforward_modules=[],
            ),
            2 * (16 + 16),
        ),
    ],
    ids=["queries", "queries and keys", "ia3"],
)
def test_only_the_adapter_is_trained(config: PeftConfig, num_trained: int, model: Any) -> None:
    adapted = add_adapter(model, config)
    assert isinstance(adapted, PeftModel)
    assert adapted.get_base_model() is model
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == num_trained
    assert all("lora_" in name or "ia3_" in name for name in trained(adapted))


def test_the_adapter_of_a_bfloat16_model_is_float32(model: Any) -> None:
    """In bfloat16 most of its updates would be rounded away."""
    adapted = add_adapter(model.bfloat16(), lora())
    dtypes = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_without_a_config_the_model_stays_as_it_is(model: Any) -> None:
    names = trained(model)
    assert add_adapter(model, None) is model
    assert trained(model) == names


def test_an_adapter_that_is_there_goes_on_being_trained(model: Any) -> None:
    adapted = get_peft_model(model, lora())
    names = trained(adapted)
    assert add_adapter(adapted, None) is adapted
    assert trained(adapted) == names


@pytest.mark.parametrize(
    "adapt", [lambda model: get_peft_model(model, lora()), with_native_adapter], ids=["peft", "own"]
)
def test_a_second_adapter_is_refused_with_both_ways_out(adapt: Any, model: Any) -> None:
    adapted = adapt(model)
    before = [name for name, _ in adapted.named_parameters()]
    with pytest.raises(ValueError, match="already carries an adapter") as error:
        add_adapter(adapted, lora())
    assert "Leave peft_config out" in str(error.value)
    assert "merge_and_unload()" in str(error.value)
    assert [name for name, _ in adapted.named_parameters()] == before


@pytest.mark.parametrize(
    ("freeze", "config"),
    [
        (lambda model: model.requires_grad_(False), None),
        (lambda model: get_peft_model(model, lora(inference_mode=True)), None),
        (lambda model: model, lora(inference_mode=True)),
    ],
    ids=["a frozen model", "an adapter loaded to infer", "an adapter made to infer"],
)
def test_a_model_with_nothing_to_train_is_refused(
    freeze: Any, config: PeftConfig | None, model: Any
) -> None:
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient") as error:
        add_adapter(freeze(model), config)
    assert "is_trainable=True in PeftModel.from_pretrained" in str(error.value)
