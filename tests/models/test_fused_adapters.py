"""LoRA layers run as one function each, and nothing else changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_step import fused, gradient_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

Make = Callable[..., Any]
IDS = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
# Qwen2 has a bias on q, k and v.
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "gpt_neox": {}}
# What is not one plain adapter on a frozen layer runs as PEFT has it.
OTHERS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "bias": {"lora_bias": True},
}


def with_adapter(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(**lora)).train()


def gradient(model: Any) -> Tensor:
    """Of the mean loss of some tokens, in float64."""
    model.zero_grad()
    torch.manual_seed(2)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return gradient_of(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_in_float64_the_gradient_is_that_of_peft(
    family: str, is_checkpointed: bool, model_factory: Make, widen: Callable[[nn.Module], None]
) -> None:
    model = with_adapter(model_factory(family, **FAMILIES[family])).double()
    widen(model)
    own = gradient(model)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with fused(model) as layers:
        assert "LoRA layers" in layers.summary
        found = gradient(model)
    assert (found - own).norm() < 1e-13 * own.norm()


@pytest.mark.parametrize("is_autocast", [False, True])
def test_it_errs_no_more_than_peft(
    is_autocast: bool, model_factory: Make, widen: Callable[[nn.Module], None]
) -> None:
    # Nothing else of this model runs as one function.
    model = with_adapter(model_factory("gpt_neox", hidden_size=64, intermediate_size=128))
    exact = copy.deepcopy(model).double()
    widen(exact)
    truth = gradient(exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        own = gradient(model)
        with fused(model) as layers:
            assert layers.summary == "8 LoRA layers, each as one function"
            found = gradient(model)
    assert (found - truth).norm() <= 1.1 * (own - truth).norm() + 1e-7 * truth.norm()
    # What ran was something else; in float32 it may round alike.
    assert not is_autocast or not torch.equal(found, own)


def test_layers_that_read_the_same_share_one_cast_of_it(model_factory: Make) -> None:
    model = with_adapter(model_factory("llama"))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def num_inputs() -> int:
        kept.clear()
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(input_ids=IDS, use_cache=False)
        shapes = [t.shape[-2:] for t in kept.values() if t.dtype == torch.bfloat16]
        return sum(shape == (120, 32) for shape in shapes)

    with fused(model):
        # Of two layers each what q, k and v read, what gate and up read, and what o reads.
        assert num_inputs() == 6


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_run_as_peft_has_them(kind: str, model_factory: Make) -> None:
    model = with_adapter(model_factory("gpt_neox"), **OTHERS[kind])
    own = gradient(model)
    with fused(model):
        assert torch.equal(gradient(model), own)


def test_two_adapters_hooks_and_merged_or_disabled_ones_run_as_peft_has_them(
    model_factory: Make,
) -> None:
    model = with_adapter(model_factory("gpt_neox"))
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    with fused(model):
        model.base_model.set_adapter(["default", "other"])
        both = gradient(model)
        model.base_model.set_adapter("default")
        with model.disable_adapter(), torch.no_grad():
            disabled = model(input_ids=IDS).logits
        seen: list[Tensor] = []
        layer = model.get_submodule("base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h")
        handle = layer.lora_A["default"].register_forward_hook(lambda *all_: seen.append(all_[2]))
        gradient(model)
        handle.remove()
    assert len(seen) == 1
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, disabled)
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(gradient(model), both)


def test_trained_base_layers_get_their_gradient(model_factory: Make) -> None:
    model = with_adapter(model_factory("gpt_neox"))
    model.get_submodule(
        "base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h.base_layer"
    ).weight.requires_grad_()
    own = gradient(model)
    with fused(model):
        found = gradient(model)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_a_layer_with_a_forward_of_its_own_runs_as_peft_has_it(
    part: str, model_factory: Make
) -> None:
    model = with_adapter(model_factory("gpt_neox"))
    layer = model.get_submodule(f"base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h.{part}")
    own_forward = layer.forward
    with fused(model):
        plain = gradient(model)
        layer.forward = lambda hidden: own_forward(hidden) * 3
        found = gradient(model)
    assert torch.equal(gradient(model), found) or (gradient(model) - found).norm() < 1e-5
    assert (found - plain).norm() > 1e-3


def test_no_tokens_give_no_outputs_and_inference_mode_runs(model_factory: Make) -> None:
    model = with_adapter(model_factory("llama"))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    with fused(model), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(0, 32)).shape == (0, 48)
        assert layer(torch.zeros(1, 0, 32)).shape == (1, 0, 48)
        with torch.inference_mode():
            assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()
