"""Optimizer, random numbers and dropout are put back to the last bit."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_sft_plugin.models.model_interface import same_random_numbers
from hf_sft_plugin.verification.run_state import (
    OptimizerState,
    local_part,
    on_host,
    without_dropout,
)


def take_steps(model: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        model(torch.full((1, 3), float(number + 1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)]
)
def test_an_optimizer_goes_on_as_if_it_had_not_stepped(make: Any, num_before: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    take_steps(model, optimizer, num_before)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = OptimizerState(optimizer)

    def go_on() -> list[torch.Tensor]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        take_steps(model, optimizer, 2)
        return [p.detach().clone() for p in model.parameters()]

    expected = go_on()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.param_groups[0]["new"] = True
    optimizer.mark = 1
    state.put_back()
    assert len(optimizer.state) == (2 if num_before else 0)
    assert "new" not in optimizer.param_groups[0]
    assert not hasattr(optimizer, "mark")
    assert all(map(torch.equal, go_on(), expected))


def test_random_numbers_of_every_kind_go_on_as_if_none_had_been_drawn() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    with same_random_numbers(torch.device("cpu")):
        draw()
    assert draw() == expected


def test_a_model_in_training_mode_draws_nothing_without_dropout_and_has_it_back() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout, self.router_jitter_noise, self.p = 0.5, 0.25, 0.75
            self.dropout = nn.Dropout(0.5)

    model = Attention().train()
    before = torch.get_rng_state()
    with without_dropout(model):
        assert model.training
        assert (model.attention_dropout, model.router_jitter_noise, model.p) == (0, 0, 0.75)
        assert torch.equal(model.dropout(torch.ones(50)), torch.ones(50))
        assert torch.equal(torch.get_rng_state(), before)
    assert (model.attention_dropout, model.router_jitter_noise) == (0.5, 0.25)
    assert model.dropout.p == 0.5


def test_what_a_process_holds_of_a_plain_tensor_is_all_of_it() -> None:
    tensor = torch.ones(2)
    assert local_part(tensor) is tensor
    copied = on_host(tensor)
    tensor.zero_()
    assert copied.tolist() == [1, 1]
