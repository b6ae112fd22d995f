"""Adapters: added once, trainable, and never on top of another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import Trainer

from hf_sft_plugin import MaskedSFTTrainer
from hf_sft_plugin.models.adapters import adapter_state, add_adapter, find_row_dependence


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


@pytest.mark.usefixtures("any_peft")
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


@pytest.mark.parametrize("config", [None, lora()], ids=["as it is", "with another"])
def test_a_model_whose_adapters_could_not_be_saved_is_refused(
    config: PeftConfig | None, model: Any
) -> None:
    mixed = PeftMixedModel(model, lora())
    with pytest.raises(
        ValueError, match="which PEFT cannot save, so what is trained would be lost"
    ):
        add_adapter(mixed, config)


def test_the_state_of_adapters_changes_when_one_comes_goes_or_is_switched(model: Any) -> None:
    assert adapter_state(model) == ((), ())
    adapted = get_peft_model(model, lora())
    states = [adapter_state(adapted)]
    adapted.add_adapter("second", lora(target_modules=["k_proj"]))
    states.append(adapter_state(adapted))
    adapted.set_adapter("second")
    states.append(adapter_state(adapted))
    adapted.base_model.set_adapter(["default", "second"])
    states.append(adapter_state(adapted))
    adapted.delete_adapter("second")
    states.append(adapter_state(adapted))
    assert states == [
        (("default",), ("default",)),
        (("default", "second"), ("default",)),
        (("default", "second"), ("second",)),
        (("default", "second"), ("default", "second")),
        (("default",), ("default",)),
    ]


@pytest.mark.usefixtures("any_peft")
def test_an_adapter_that_transformers_added_itself_is_seen(model: Any) -> None:
    before = adapter_state(model)
    assert adapter_state(with_native_adapter(model)) != before


@pytest.mark.parametrize(
    ("config", "dependence"),
    [
        (lora(), None),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "virtual tokens before every row",
        ),
        (lora(alora_invocation_tokens=[5]), "begins where its invocation tokens are"),
    ],
    ids=["lora", "virtual tokens", "invoked"],
)
def test_adapters_that_depend_on_where_rows_begin_are_known(
    config: PeftConfig, dependence: str | None, model: Any
) -> None:
    found = find_row_dependence(get_peft_model(model, config))
    assert (found is None) == (dependence is None)
    assert dependence is None or dependence in str(found)
    assert find_row_dependence(model) is None


def test_an_adapter_that_is_not_active_does_not_count(model: Any) -> None:
    adapted = get_peft_model(model, lora())
    adapted.add_adapter("invoked", lora(alora_invocation_tokens=[5]))
    assert find_row_dependence(adapted) is None
    adapted.set_adapter("invoked")
    assert find_row_dependence(adapted) is not None


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_the_seed_decides_on_the_first_weights_of_an_adapter(
    model_factory: Any, tokenizer: Any, make_config: Any
) -> None:
    def make(seed: int, caller: int, **settings: Any) -> dict[str, torch.Tensor]:
        model = model_factory()
        torch.manual_seed(caller)
        args = make_config(seed=seed, **settings)
        config = lora(init_lora_weights=False)
        return weights_of(
            MaskedSFTTrainer(model, args, processing_class=tokenizer, peft_config=config)
        )

    first = make(3, caller=1)
    assert are_equal(make(3, caller=2), first)
    assert not are_equal(make(4, caller=1), first)


def test_the_seed_decides_on_weights_that_a_loaded_model_has_in_no_file(
    model: Any, tokenizer: Any, make_config: Any, tmp_path: Path
) -> None:
    model.config.tie_word_embeddings = False
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(tmp_path / "headless", state_dict=state)

    def make(seed: int, caller: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(caller)
        args = make_config(seed=seed)
        return weights_of(
            MaskedSFTTrainer(str(tmp_path / "headless"), args, processing_class=tokenizer)
        )

    first = make(3, caller=1)
    assert are_equal(make(3, caller=2), first)
    assert not are_equal(make(4, caller=1), first)


def test_random_numbers_after_the_constructor_are_those_after_any_trainer(
    model_factory: Any, tokenizer: Any, make_config: Any
) -> None:
    args = make_config(seed=3)
    Trainer(model_factory(), args, processing_class=tokenizer)
    expected = torch.rand(3)
    MaskedSFTTrainer(model_factory(), args, processing_class=tokenizer, peft_config=lora())
    assert torch.equal(torch.rand(3), expected)
