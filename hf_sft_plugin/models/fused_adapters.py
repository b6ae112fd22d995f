"""LoRA on a frozen linear layer, as one function.

Step by step, PEFT casts the input of a layer three times, and multiplies and adds tensors as large
as the output. Here layers that read the same input share one cast, the scale multiplies the `r`
numbers of the adapter, and its product adds to that of the layer in place.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hf_sft_plugin.models.layer_functions import LoRALinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_lora(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA on a linear layer, and no class made from it."""
    return type(module) is LoraLinear and _is_linear(module.base_layer)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)


def is_hooked(module: Any) -> bool:
    """Whether something runs before or after a module."""
    return _has_any_global_hook() or any(getattr(module, hooks) for hooks in _HOOKS)


class FusedLoRA:
    """The forward of LoRA layers of one model, which share the last tensor that was cast."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = (None,)
        self._cast: Tensor | None = None

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """Takes the layer and its input, `(..., I)`, and gives `(..., O)`."""
        own_forward: Callable[[Tensor], Tensor] = partial(type(module).forward, module)
        name = _only_adapter(module)
        if name is None:
            return own_forward(x)
        base, first, second = module.base_layer, module.lora_A[name], module.lora_B[name]
        weights = base.weight, first.weight, second.weight
        is_autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
        if not is_autocast and any(weight.dtype != dtype for weight in weights):
            # PEFT computes adapters of half-precision models in float32.
            return own_forward(x)
        frozen, a, b = (weight.detach().to(dtype) for weight in weights)
        bias = None if base.bias is None else base.bias.detach().to(dtype)
        product: Tensor = LoRALinear.apply(
            x,
            self._in_dtype(x, dtype),
            (frozen, bias, a, b),
            module.scaling[name],
            first.weight,
            second.weight,
        )
        return product

    def _in_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype or x.is_inference():
            return x.detach().to(dtype)
        is_known = self._key[0] is not None and self._key[0]() is x
        if not is_known or self._key[1:] != (x._version, dtype):
            self._key = weakref.ref(x), x._version, dtype
            self._cast = x.detach().to(dtype)
        assert self._cast is not None, "it comes with its key"
        return self._cast


def _only_adapter(module: Any) -> str | None:
    """The adapter of a LoRA layer that can run fused: the only active one, and a plain one."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged:
        return None
    (name,) = names
    base, dropout = module.base_layer, module.lora_dropout[name]
    first, second = module.lora_A[name], module.lora_B[name]
    is_plain = (
        name not in module.lora_variant
        and type(dropout) is nn.Identity
        and all(map(_is_linear, (base, first, second)))
        and second.bias is None
        and not any(weight.requires_grad for weight in base.parameters())
        and not any(map(is_hooked, (base, first, second, dropout)))
    )
    return name if is_plain else None
