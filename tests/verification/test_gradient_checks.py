"""Losses that know of the split, and tensors that would not be trained, are found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from verified_trainers import OwnTrainer, first_step, make_rows

from hf_sft_plugin import MaskedSFTConfig
from hf_sft_plugin.verification.checks import VerificationCheck
from hf_sft_plugin.verification.gradient_checks import (
    GRADIENT_CHECKS,
    check_gradients,
    split_otherwise,
)

Check = Callable[..., dict[str, VerificationCheck]]


@pytest.fixture
def check(tokenizer: Any, make_config: Callable[..., MaskedSFTConfig]) -> Check:
    def run(model: Any, config: dict[str, Any] | None = None, **settings: Any) -> Any:
        args = make_config(**{"per_device_train_batch_size": 6, **(config or {})})
        step = first_step(model, args, tokenizer, **settings)
        weights = [p.detach().clone() for p in model.parameters()]
        with step.undone():
            found = {each.name: each for each in check_gradients(step)}
        assert all(map(torch.equal, weights, model.parameters()))
        assert list(found) == list(GRADIENT_CHECKS)
        return found

    return run


class MeanPerMicrobatch(OwnTrainer):
    """Divides each micro-batch by its own count."""

    def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) / self.current_gradient_accumulation_steps


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_a_step_as_it_should_be_passes(
    dtype: torch.dtype, largest: float, model_factory: Callable[..., Any], check: Check
) -> None:
    found = check(model_factory().to(dtype), {"learning_rate": 0.1, "warmup_steps": 5})
    gradient, trained, updates = found.values()
    assert 0 < (gradient.value or 0) < largest < gradient.bound
    assert "in 1 and in 2 micro-batches" in gradient.note
    assert (trained.value, updates.value) == (0, 0)
    # The first step of a warm-up has a rate of 0.
    assert "at a learning rate of 0.1;" in updates.note


@pytest.mark.parametrize("split", [(6, 1), (1, 6)])
def test_a_mean_per_micro_batch_is_found(split: tuple[int, int], model: Any, check: Check) -> None:
    size, steps = split
    config = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    settings = {"trainer_class": MeanPerMicrobatch, "max_tokens_per_microbatch": None}
    found = check(model, config, **settings)["gradient"]
    assert found.has_failed
    assert (found.value or 0) > 0.05
    assert "num_items_in_batch" in found.remedy


def test_rows_are_put_together_where_each_runs_alone(model: Any, check: Check) -> None:
    config = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    found = check(model, config, max_tokens_per_microbatch=None)["gradient"]
    assert "in 6 and in 3 micro-batches" in found.note
    assert not found.has_failed
    packed = {"input_ids": torch.ones(1, 9), "labels": torch.ones(1, 9), "lengths": torch.ones(4)}
    assert split_otherwise([packed]) == []


def test_the_loss_of_a_router_is_no_fault(model_factory: Callable[..., Any], check: Check) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    found = check(model_factory("mixtral", **experts))
    assert "router" in found["gradient"].note
    assert not any(each.has_failed for each in found.values())


def test_random_numbers_that_stay_are_no_fault_but_the_reason(model: Any, check: Check) -> None:
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, output: output + torch.randn_like(output) if module.training else output
    )
    assert "random numbers" in check(model)["gradient"].note


def test_a_disconnected_parameter_is_named(model: Any, check: Check) -> None:
    model.extra = nn.Linear(2, 2, bias=False)
    found = check(model)
    assert found["trained tensors"].value == 1
    assert "These are extra.weight." in found["trained tensors"].remedy
    assert not found["updates"].has_failed


def test_the_factor_of_an_adapter_that_waits_for_the_other_is_none_of_those(
    model: Any, check: Check
) -> None:
    lora = LoraConfig(target_modules=["q_proj", "down_proj"])
    found = check(get_peft_model(model, lora))
    assert found["trained tensors"].value == 0
    assert "of 8 have no gradient; 4 get theirs from step 2 on" in found["trained tensors"].note
    assert found["updates"].value == 0


def test_updates_too_small_for_bfloat16_are_named_and_in_float32_arrive(
    model_factory: Callable[..., Any], check: Check
) -> None:
    found = check(model_factory().bfloat16(), {"learning_rate": 1e-5})["updates"]
    assert found.value == len(list(model_factory().parameters()))
    assert "model.embed_tokens.weight" in found.remedy
    assert "dtype float32" in found.remedy
    assert check(model_factory(), {"learning_rate": 1e-5})["updates"].value == 0


def test_an_optimizer_that_may_keep_more_digits_is_not_judged(
    model: Any, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "__module__", "other.optimizers")
    found = check(model.bfloat16(), {"learning_rate": 1e-5})["updates"]
    assert found.value is None
    assert "AdamW may keep more digits" in found.note


def test_a_learning_rate_of_zero_moves_nothing_on_purpose(model: Any, check: Check) -> None:
    found = check(model, {"learning_rate": 0.0})
    assert found["updates"].note == "not run: the learning rate is 0"
    assert found["trained tensors"].value == 0


def test_without_a_trained_token_no_tensor_has_a_gradient(model: Any, check: Check) -> None:
    rows = [{**row, "response_mask": [0] * len(row["input_ids"])} for row in make_rows()]
    found = check(model, rows=rows)
    assert found["gradient"].value == 0
    assert found["trained tensors"].has_failed


def test_where_no_backward_pass_can_be_tried_the_reason_is_said(model: Any, check: Check) -> None:
    found = check(model, trainer_class=_Layerwise)
    assert {each.note for each in found.values()} == {
        "not run: the optimizer apollo_adamw_layerwise changes weights in the backward pass"
    }


class _Layerwise(OwnTrainer):
    def verify_first_step(self, batches: Any, num_items: Any) -> None:
        self.args.optim = "apollo_adamw_layerwise"
        super().verify_first_step(batches, num_items)
