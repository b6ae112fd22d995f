"""Models that do a little else than they say are found in every precision, others in none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sft_plugin.models.attention_choice import choose_attention
from hf_sft_plugin.models.last_layer import LastLayer
from hf_sft_plugin.models.lm_head import find_transform

# Weights, and whether autocast computes in bfloat16.
PRECISIONS = {
    "float32": (torch.float32, False),
    "autocast": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
# Relative; far below a rounding of bfloat16, which is 4e-3.
LITTLE = 1e-4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
BATCH = {"input_ids": torch.arange(3, 15).view(1, -1)}
Make = Callable[..., Any]


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(model_factory: Make, trained_like: Callable[[Any], Any], precision: str) -> Make:
    def make_model(model_type: str = "llama") -> Any:
        model = trained_like(model_factory(model_type, **FAMILIES[model_type]))
        return model.to(PRECISIONS[precision][0])

    return make_model


@pytest.fixture(autouse=True)
def autocast(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=PRECISIONS[precision][1]):
        yield


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    yield
    handle.remove()


def grow_with_the_width(output: Tensor) -> Tensor:
    return output * (1 + LITTLE * output.shape[1])


def grow_with_the_place(output: Tensor) -> Tensor:
    factors = 1 + LITTLE * torch.arange(output.shape[1])
    return output * factors.unsqueeze(-1).to(output.dtype)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_models_that_do_what_they_say_take_every_fast_path(model_type: str, make: Make) -> None:
    model = make(model_type)
    choice = choose_attention(model, model)
    assert choice.is_padding_free
    assert choice.shares_prompts
    last_layer = LastLayer(model)
    with choice.running():
        assert last_layer.prove(), last_layer.problem
    assert find_transform(model, model, BATCH) is not None


@pytest.mark.parametrize("change", [grow_with_the_width, grow_with_the_place])
def test_a_layer_that_knows_how_rows_are_laid_out_needs_them_padded(
    change: Callable[[Tensor], Tensor], make: Make
) -> None:
    model = make()
    with changed(model.model.layers[0].mlp, change):
        choice = choose_attention(model, model)
    assert not choice.is_padding_free
    assert "without padding its logits differ by" in choice.summary


def test_a_layer_that_counts_the_tokens_it_is_given_runs_everywhere(make: Make) -> None:
    model = make()
    choice = choose_attention(model, model)
    last_layer = LastLayer(model)
    with changed(model.model.layers[-1].mlp.down_proj, grow_with_the_width), choice.running():
        assert not last_layer.prove()
    assert "logits then differ by" in str(last_layer.problem)


def test_logits_that_are_a_little_larger_than_those_of_the_head_are_taken_whole(
    make: Make,
) -> None:
    model = make()

    def grow(_: nn.Module, __: Any, outputs: Any) -> Any:
        outputs.logits = outputs.logits * (1 + LITTLE)
        return outputs

    model.register_forward_hook(grow)
    assert find_transform(model, model, BATCH) is None


def test_a_soft_cap_of_another_size_than_the_config_says_is_found(
    model_factory: Make, precision: str
) -> None:
    model = model_factory("gemma2", sliding_window=8).to(PRECISIONS[precision][0])
    assert find_transform(model, model, BATCH) is not None
    cap = model.config.final_logit_softcapping
    forward = model.forward

    def with_another_cap(*args: Any, **kwargs: Any) -> Any:
        model.config.final_logit_softcapping = cap * (1 + LITTLE)
        outputs = forward(*args, **kwargs)
        model.config.final_logit_softcapping = cap
        return outputs

    model.forward = with_another_cap
    assert find_transform(model, model, BATCH) is None


def test_random_numbers_are_those_of_a_run_without_probes(make: Make) -> None:
    """Of a model that draws some whenever it runs."""
    model = make()

    def draw(output: Tensor) -> Tensor:
        return output + torch.rand(())

    torch.manual_seed(3)
    state = torch.get_rng_state()
    with changed(model.model.norm, draw):
        choice = choose_attention(model, model)
        last_layer = LastLayer(model)
        with choice.running():
            last_layer.prove()
        find_transform(model, model, BATCH)
    assert torch.equal(torch.get_rng_state(), state)


def test_eager_attention_is_judged_like_any_other(
    model_factory: Make, trained_like: Callable[[Any], Any], precision: str
) -> None:
    """Its softmax asks for float32."""
    model = trained_like(model_factory("llama", attn_implementation="eager"))
    model = model.to(PRECISIONS[precision][0])
    assert choose_attention(model, model).is_padding_free


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_where_nothing_runs_in_float64_single_tokens_count(
    error: type[Exception], model_factory: Make, precision: str
) -> None:
    model = model_factory("llama").to(PRECISIONS[precision][0])

    def refuse(_: nn.Module, arguments: tuple[Tensor]) -> None:
        if arguments[0].dtype == torch.float64:
            raise error("no kernel for float64")

    model.model.layers[0].mlp.register_forward_pre_hook(refuse)
    assert choose_attention(model, model).is_padding_free

    def double_the_first(output: Tensor) -> Tensor:
        return torch.cat([output[:, :1] * 2, output[:, 1:]], dim=1)

    with changed(model.model.norm, double_the_first):
        assert not choose_attention(model, model).is_padding_free
