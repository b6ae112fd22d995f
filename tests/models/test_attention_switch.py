"""A model runs with another attention for a while, and has its own again."""

from typing import Any

from hf_sft_plugin.models.attention import AttentionSwitch


def test_a_model_has_its_own_attention_again_and_one_that_was_chosen_meanwhile(model: Any) -> None:
    switch = AttentionSwitch(model)
    with switch.set_to("eager"):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    with switch.set_to("document_attention"):
        model.config._attn_implementation_internal = "flex_attention"
    assert model.config._attn_implementation == "flex_attention"
