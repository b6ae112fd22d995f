"""A model in float64 for a while is the model in float64, and afterwards what it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sft_plugin.models import float64_run
from hf_sft_plugin.models.float64_run import in_float64, largest_error, typical_error

Make = Callable[..., Any]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": False},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
IDS = torch.arange(3, 27).view(2, 12)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_logits_are_those_of_the_model_in_float64(
    family: str, dtype: torch.dtype, is_autocast: bool, model_factory: Make
) -> None:
    model = model_factory(family, **FAMILIES[family]).to(dtype).eval()
    wide = copy.deepcopy(model).double()
    if "num_local_experts" in FAMILIES[family]:
        wide.set_experts_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        own = logits(model)
        with in_float64(model):
            found = logits(model)
        assert torch.equal(logits(model), own)
    assert found.dtype == torch.float64
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    # Norms and routers round to float32 in the model that was widened by its dtype alone; scaled
    # embeddings to bfloat16 before they are widened here.
    bound = 1e-6 if dtype == torch.float32 or "gemma" not in family else 1e-2
    assert largest_error(found.flatten(0, 1), logits(wide).flatten(0, 1)) < bound


def test_adapters_are_widened_with_their_layers(model_factory: Make) -> None:
    lora = LoraConfig(target_modules="all-linear", use_dora=True, init_lora_weights=False)
    model = get_peft_model(model_factory(), lora).eval()
    wide = copy.deepcopy(model).double()
    with in_float64(model):
        found = logits(model)
    assert largest_error(found.flatten(0, 1), logits(wide).flatten(0, 1)) < 1e-6


def test_gradients_reach_the_weights_as_they_are(model_factory: Make) -> None:
    model = model_factory().bfloat16()
    wide = copy.deepcopy(model).float()
    with in_float64(model, torch.float32):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    wide(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for one, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert one.grad.dtype == torch.bfloat16
        # Gradients are rounded to bfloat16, those of tied weights where they add up, too.
        assert (one.grad.float() - other.grad).norm() < 2**-7 * other.grad.norm()


class LargestWidened(TorchDispatchMode):
    """Keeps the size of the largest tensor that another dtype was made of."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.numel = max(self.numel, output.numel())
        return output


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_large_head_is_widened_a_slice_at_a_time(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven rows of it, which do not divide its 300.
    monkeypatch.setattr(float64_run, "SLICE_BYTES", 7 * 32 * 8 + 5)
    torch.manual_seed(0)
    head = nn.Linear(32, 300, bias=has_bias).bfloat16()
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = copy.deepcopy(head).double()(hidden)
    with torch.no_grad(), in_float64(head), LargestWidened() as largest:
        found = head(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # As large as the bias; the whole weight has 9,600 numbers.
    assert 0 < largest.numel <= 300
    # A gradient needs all of it in the backward pass.
    with in_float64(head):
        head(hidden).sum().backward()
    assert head.weight.grad.dtype == torch.bfloat16


def test_a_run_that_breaks_off_leaves_the_model_as_it_was(model: Any) -> None:
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), in_float64(model):
        logits(model)
    handle.remove()
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before
    assert logits(model).dtype == torch.float32


def test_a_few_tokens_that_err_much_are_not_typical() -> None:
    truth = torch.ones(7, 4, dtype=torch.float64)
    found = truth.clone()
    found[1] += 10
    assert largest_error(found, truth) == 10
    assert typical_error(found, truth, [4, 3]) == 0
    found[5:] += 2
    assert typical_error(found, truth, [4, 3]) == 2
