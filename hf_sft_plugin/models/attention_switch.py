"""Which attention implementation a model runs with, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_sft_plugin.models.attention import IMPLEMENTATION


class AttentionSwitch:
    """Runs a model with another attention implementation, and gives back its own.

    Args:
        model: The model, unwrapped from Accelerate.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = [getattr(module, "config", None) for module in model.modules()]
        found = {id(c): c for c in configs if isinstance(c, PreTrainedConfig)}
        self._configs = list(found.values())
        self._names = {IMPLEMENTATION}
        self._own = [config._attn_implementation for config in self._configs]

    @contextmanager
    def set_to(self, name: str) -> Iterator[None]:
        """Sets the implementation for a while."""
        self._set(name)
        try:
            yield
        finally:
            self.give_back()

    def set_until_gradients_are_there(self) -> None:
        """Sets `document_attention` up to the end of the backward pass that is going on."""
        self._set(IMPLEMENTATION)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self.give_back)

    def give_back(self) -> None:
        """Sets what the model came with."""
        for config, own in zip(self._configs, self._own, strict=True):
            if config._attn_implementation in self._names:
                config._attn_implementation_internal = own

    def _set(self, name: str) -> None:
        self._names.add(name)
        for index, config in enumerate(self._configs):
            # It may have been changed in between.
            if config._attn_implementation not in self._names:
                self._own[index] = config._attn_implementation
            # Not by the property, which would set the configs inside this one as well.
            config._attn_implementation_internal = name
