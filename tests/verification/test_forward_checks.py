"""Models that leak between documents, and heads whose numbers are not those of the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM
from verified_trainers import first_step

from hf_sft_plugin import MaskedSFTConfig
from hf_sft_plugin.verification.checks import VerificationCheck
from hf_sft_plugin.verification.forward_checks import (
    DOCUMENT_CHECKS,
    HEAD_CHECKS,
    check_documents,
    check_head,
    find_documents,
    sample_rows,
)

Check = Callable[..., dict[str, VerificationCheck]]


@pytest.fixture
def check(tokenizer: Any, make_config: Callable[..., MaskedSFTConfig]) -> Check:
    def run(model: Any, function: Any = check_documents, **settings: Any) -> Any:
        args = make_config(per_device_train_batch_size=6)
        step = first_step(model, args, tokenizer, **settings)
        with step.undone():
            return {each.name: each for each in function(step)}

    return run


def mix(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """Adds a little of all tokens to each, in training alone, where no proof before it looks."""
    return output + 1e-3 * output.mean((0, 1)) if module.training else output


def look_at_the_last_column(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return output + output[:, -1:] if module.training else output


@pytest.mark.parametrize("padding_free", ["auto", "off"])
@pytest.mark.parametrize("shared_prompts", ["auto", "off"])
def test_documents_are_apart_and_the_probe_can_fail(
    padding_free: str, shared_prompts: str, model: Any, check: Check
) -> None:
    settings = {"padding_free": padding_free, "shared_prompts": shared_prompts}
    found = check(model, **settings)
    assert list(found) == list(DOCUMENT_CHECKS)
    assert [each.value for each in found.values()] == [0, 0, 0]
    assert [each.bound for each in found.values()] == [0, 0, 0]
    # The first row has two predictions, the second of which was changed.
    assert "that 41 predictions move" in found["other documents"].note
    assert "of 5 other documents" in found["other documents"].note
    assert found["changed token"].note.endswith("1 of 1 from it on move")


@pytest.mark.parametrize("padding_free", ["auto", "off"])
def test_a_model_that_leaks_across_documents_is_found(
    padding_free: str, model: Any, check: Check
) -> None:
    model.model.layers[0].mlp.register_forward_hook(mix)
    found = check(model, padding_free=padding_free)
    assert found["other documents"].has_failed
    assert 0 < (found["other documents"].value or 0) < 1e-2
    assert not found["changed token"].has_failed


def test_a_model_that_reads_padding_is_found(model: Any, check: Check) -> None:
    model.model.embed_tokens.register_forward_hook(look_at_the_last_column)
    found = check(model, padding_free="off")
    assert found["padding"].has_failed
    assert not found["other documents"].has_failed


def test_a_model_that_does_not_see_a_token_is_found(model: Any, check: Check) -> None:
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, output: torch.ones_like(output) if module.training else output
    )
    found = check(model)
    assert found["changed token"].has_failed
    assert "0 of 1 from it on move" in found["changed token"].note


def test_what_rows_have_in_common_is_not_what_is_changed(
    model: Any, tokenizer: Any, check: Check
) -> None:
    prompt = list(range(40, 60))
    # The first row is the beginning of the second: any change would end what they share.
    endings = [[70, 71, 72], [70, 71, 72, 73], [80, 81, 2]]
    rows = [
        {"input_ids": prompt + ending, "response_mask": [0] * 20 + [1] * len(ending)}
        for ending in endings
    ]
    found = check(model, rows=rows)
    assert not any(each.has_failed for each in found.values())
    assert found["other documents"].value == 0
    assert check(model, rows=[rows[0]] * 3)["other documents"].note.startswith("not run")


def test_documents_of_a_packed_row_have_numbers_of_their_own() -> None:
    ids = torch.arange(6).unsqueeze(0)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]])}
    assert find_documents(packed).tolist() == [0, 0, 1, 1, 1, 2]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    padded = {"input_ids": ids.view(2, 3), "attention_mask": mask}
    assert find_documents(padded).tolist() == [0, 0, -1, 1, 1, 1]
    strange = {"input_ids": ids.view(2, 3), "scale": torch.ones(2)}
    assert find_documents(strange).tolist() == [0, 0, 0, 1, 1, 1]


def make_halving(model: Any) -> Any:
    """A model that halves its logits where no test run has looked: in training."""

    class Halving(Qwen3ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            if self.training:
                outputs.logits = outputs.logits / 2
            return outputs

    model.__class__ = Halving
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fused_head_errs_no_more_than_the_full_logits(
    dtype: torch.dtype, model_factory: Callable[..., Any], check: Check
) -> None:
    found = check(model_factory(initializer_range=0.3).to(dtype), check_head)
    assert list(found) == list(HEAD_CHECKS)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-10}[dtype]
    for each in found.values():
        assert each.value is not None
        assert each.value <= each.bound < bound


def test_a_head_whose_numbers_are_not_the_models_is_found(
    model_factory: Callable[..., Any], check: Check
) -> None:
    found = check(make_halving(model_factory(initializer_range=0.3)), check_head)
    assert all(each.has_failed for each in found.values())
    assert "fused_head to 'off'" in found["entropies"].remedy


def test_full_logits_need_no_such_check(model: Any, check: Check) -> None:
    found = check(make_halving(model), check_head, fused_head="off")
    assert [each.value for each in found.values()] == [None, None]


def test_an_adapter_on_the_head_is_held_to_its_own_logits(
    model_factory: Callable[..., Any], check: Check
) -> None:
    lora = LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(model_factory(tie_word_embeddings=False), lora)
    found = check(model, check_head)
    for each in found.values():
        assert each.value is not None
        assert each.value < 1e-6 < each.bound < 1e-3


def test_a_sample_is_cut_around_the_first_trained_token() -> None:
    labels = torch.full((2, 60), -100)
    labels[0, 30:] = 7
    ids = torch.arange(120).view(2, 60)
    part = {"input_ids": ids, "labels": labels, "position_ids": ids, "note": "text"}
    sample = sample_rows([part, part])
    assert sorted(sample) == ["attention_mask", "input_ids", "labels"]
    assert sample["input_ids"].shape == (2, 32)
    assert sample["input_ids"][0, 0] == 29 - 8
    assert sample["labels"][0].tolist() == [-100] * 9 + [7] * 23
    untrained = sample_rows([{"input_ids": ids[:, :3], "labels": labels[:, :3]}])
    assert untrained["labels"][0].tolist() == [0, 1, 2] + [-100] * 29
    assert untrained["attention_mask"][0].sum() == 3
