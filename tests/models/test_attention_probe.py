"""The proof that rows need no padding finds what would make it untrue."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sft_plugin.models.attention import AttentionSwitch
from hf_sft_plugin.models.attention_probe import find_problem

Make = Callable[..., Any]


def problem(model: Any) -> str | None:
    return find_problem(model, model, AttentionSwitch(model))


def test_a_model_that_attends_as_it_says_has_no_problem(model: Any) -> None:
    assert problem(model) is None
    assert find_problem(model, model, AttentionSwitch(model), shares_prompts=True) is None


def test_the_smallest_leak_is_found(model: Any) -> None:
    """Far below any tolerance, in one layer of two."""

    def leak(module: Any, arguments: Any, output: Tensor) -> Tensor:
        return output + 1e-30 * output.mean(dim=1, keepdim=True)

    model.model.layers[1].mlp.register_forward_hook(leak)
    assert "tokens of one row reach another" in str(problem(model))


def test_positions_that_do_not_begin_anew_are_found(model_factory: Make) -> None:
    model = model_factory("gpt2", n_inner=48)
    forward = model.transformer.forward

    def count_on(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.transformer.forward = count_on
    assert "without padding its logits differ by" in str(problem(model))


def test_a_window_that_a_layer_does_not_tell_of_is_found(model_factory: Make) -> None:
    # Its mask has it, and rows of the probe are too short to show it.
    model = model_factory("mistral", sliding_window=100)
    attention = model.model.layers[1].self_attn
    attention.config = type(attention.config)(**{**model.config.to_dict(), "sliding_window": None})
    attention.config._attn_implementation = "sdpa"
    assert "not the causal one without a window" in str(problem(model))


def test_a_head_of_zeros_is_no_obstacle(model_factory: Make) -> None:
    model = model_factory(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert problem(model) is None


def test_embeddings_that_cannot_be_disturbed_prove_nothing(model: Any) -> None:
    elsewhere = torch.nn.Identity()
    model.get_input_embeddings = lambda: elsewhere
    assert "leaks would go unseen" in str(problem(model))


def test_a_model_that_is_broken_already_is_not_said_to_leak(model: Any) -> None:
    """As with DoRA on the tied head of a model whose padding token has an embedding of zeros."""
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    assert "its logits are NaN from the start" in str(problem(model))
