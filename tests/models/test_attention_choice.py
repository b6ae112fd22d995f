"""The proof that rows need no padding, on models that pass it and models that do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_sft_plugin.batches.host_facts import find_layout
from hf_sft_plugin.models.attention import document_attention
from hf_sft_plugin.models.attention_choice import (
    AttentionChoice,
    AttentionChooser,
    choose_attention,
)

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": EXPERTS,
    "gpt_oss": {**EXPERTS, "sliding_window": 4},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"state_size": 8}, "its layers do not attend through the interface"),
    "recurrent_gemma": ({"lru_width": 32}, "its layers do not attend through the interface"),
    "bloom": ({}, "its layers do not attend through the interface"),
    "stablelm": ({}, "its layers do not hand on what the model is told"),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        "tokens of one row reach another",
    ),
    # Chunks longer than the probe.
    "llama4_text": (
        {"attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "it has a layer whose mask is not the causal one without a window",
    ),
}

Make = Callable[..., Any]


def choose(model: Any) -> AttentionChoice:
    """Chooses, and makes sure that nothing of the choice is left on the model."""
    before = {id(m): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    was_training, state = model.training, torch.get_rng_state()
    choice = choose_attention(model, model)
    after = {id(m): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert before == after
    assert model.training == was_training
    assert torch.equal(torch.get_rng_state(), state)
    return choice


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_rows_see_themselves_alone_need_no_padding(
    model_type: str, dtype: torch.dtype, model_factory: Make
) -> None:
    choice = choose(model_factory(model_type, **SUPPORTED[model_type]).to(dtype))
    assert choice.summary == "per-document SDPA, no padding, shared prompts once"
    assert choice.shares_prompts
    assert choice.is_padding_free


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_token_moves_no_logit_of_another_row_by_a_bit(
    model_type: str, model_factory: Make
) -> None:
    model = model_factory(model_type, **SUPPORTED[model_type]).eval()
    choice = choose(model)
    lengths = [9, 5, 20, 6]
    batch = {
        "input_ids": torch.arange(3, 83).view(4, 20) * 7 % 300,
        "attention_mask": torch.arange(20).expand(4, 20) < torch.tensor(lengths).unsqueeze(-1),
    }
    layout = find_layout(batch)
    assert layout is not None
    ids = layout.flatten(batch["input_ids"])
    changed = ids.clone()
    # In the middle of the third document.
    changed[0, 20] = 1
    with torch.no_grad(), choice.running():
        logits, moved = (
            model(input_ids=x, use_cache=False, **layout.model_inputs()).logits[0]
            for x in (ids, changed)
        )
    same = (logits == moved).all(dim=-1)
    assert not same[20:24].any()
    # Experts are given other numbers of tokens, which may round otherwise.
    others = [*range(20), *range(34, 40)]
    bound = 1e-6 if "num_local_experts" in SUPPORTED[model_type] else 0
    torch.testing.assert_close(moved[others], logits[others], rtol=bound, atol=bound)


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_other_models_are_padded_and_the_reason_is_given(
    model_type: str, model_factory: Make
) -> None:
    fields, reason = UNSUPPORTED[model_type]
    choice = choose(model_factory(model_type, **fields))
    assert choice.summary.startswith(f"padded, because {reason}")
    assert not choice.is_padding_free
    assert choice.switch is None


def test_adapters_with_virtual_tokens_are_padded(model: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert "virtual tokens before every row" in choose(get_peft_model(model, config)).summary


def test_attention_weights_that_are_asked_for_need_the_models_own_attention(
    model_factory: Make,
) -> None:
    model = model_factory(attn_implementation="eager")
    model.config.output_attentions = True
    assert "asks for attention weights" in choose(model).summary


def test_a_module_of_ones_own_is_padded() -> None:
    assert "not a model of transformers" in choose(torch.nn.Linear(2, 2)).summary


def test_a_choice_is_made_once_for_each_model(
    model: Any, model_factory: Make, caplog: pytest.LogCaptureFixture
) -> None:
    chooser = AttentionChooser()
    assert chooser.choice is None
    bloom = model_factory("bloom")
    assert chooser.choose(model, model, "on") is chooser.choose(model, model, "on")
    assert "'off'" in chooser.choose(model, model, "off").summary
    for _ in range(2):
        with pytest.raises(ValueError, match=r"padding_free is 'on', but .* Set it to 'auto'"):
            chooser.choose(bloom, bloom, "on")
    assert not caplog.records
    for _ in range(2):
        chooser.choose(bloom, bloom, "auto")
    assert len(caplog.records) == 1


def flash(keeps_apart: bool) -> Callable[..., Any]:
    """As flash attention for documents of varying length, or one that never heard of them."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
    ) -> Any:
        boundaries = options.get("cu_seq_lens_q")
        if boundaries is None or not keeps_apart:
            return sdpa_attention_forward(module, query, key, value, *_, **options)
        lengths = boundaries.diff().tolist()
        assert options["max_length_q"] == max(lengths)
        return document_attention(module, query, key, value, None, **options)

    return attend


@pytest.mark.parametrize("keeps_apart", [True, False])
def test_flash_attention_that_was_chosen_is_kept_and_proven_as_well(
    keeps_apart: bool, model_factory: Make
) -> None:
    name = f"flash_{keeps_apart}"
    AttentionInterface.register(name, flash(keeps_apart))
    AttentionMaskInterface.register(
        name, lambda **given: None if given["attention_mask"] is None else sdpa_mask(**given)
    )
    model = model_factory()
    model.config._attn_implementation = name
    choice = choose(model)
    assert choice.switch is None
    assert choice.is_padding_free == keeps_apart
    if keeps_apart:
        assert choice.summary == "flash_True, no padding"


def test_an_attention_that_nothing_is_known_about_is_not_replaced(model: Any) -> None:
    AttentionInterface.register("own", sdpa_attention_forward)
    model.config._attn_implementation = "own"
    assert "nothing is known about the attention implementation 'own'" in choose(model).summary


def test_the_implementation_is_set_for_the_forward_and_for_the_backward_pass(model: Any) -> None:
    choice = choose(model)
    assert choice.switch is not None
    seen = []

    def look(*_: Any) -> None:
        seen.append(model.config._attn_implementation)

    weight = model.lm_head.weight
    with choice.running():
        look()
        loss = weight.sum() * 2
    look()
    loss.register_hook(lambda _: look())
    product = loss * 3
    choice.keep_in_backward(product, None, torch.ones(()))
    product.backward()
    look()
    assert seen == ["document_attention", "sdpa", "document_attention", "sdpa"]


def test_an_implementation_that_was_chosen_in_between_is_given_back(model: Any) -> None:
    choice = choose(model)
    model.set_attn_implementation("eager")
    with choice.running():
        assert model.config._attn_implementation == "document_attention"
    assert model.config._attn_implementation == "eager"
