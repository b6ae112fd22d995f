"""What tests of one optimizer step share: a trainer, its rows, and the gradient."""

from collections import UserList
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_sft_plugin import MaskedLossMixin
from hf_sft_plugin.models.fused_layers import FusedLayers


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""


class Rows(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.values.append(gradient_of(kwargs["model"]))


def gradient_of(model: nn.Module) -> Tensor:
    """All of it in a row, in float64."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([grad.flatten().double() for grad in grads])


def tokens(seed: int, count: int) -> list[int]:
    """Tokens of the small models, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (count,), generator=generator).tolist()


@contextmanager
def fused(model: nn.Module) -> Iterator[FusedLayers]:
    """A model with fused layers for a while."""
    layers = FusedLayers(model)
    try:
        yield layers
    finally:
        layers.give_back()
