"""Which norms, MLPs, rotary embeddings and adapters run as one function each during training.

Nothing is guessed by names: most models of transformers have the first three word for word from
Llama or Gemma, and what is compiled from the same words does the same. Adapters are those of PEFT's
own LoRA class on a frozen linear layer. Step by step, PEFT casts the input of a layer three times,
and multiplies and adds tensors as large as the output. Here layers that read the same input share
one cast, the scale multiplies the `r` numbers of the adapter, and its product adds to that of the
layer in place.
"""

import importlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN

from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.models.layer_functions import GatedProduct, LoRALinear, RMSNorm, Rotation
from hf_sft_plugin.models.lm_head import replaced_forward
from hf_sft_plugin.models.model_interface import is_compiled

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ROTARY = "apply_rotary_pos_emb"
# Each gives the same whenever it runs; anybody's own may draw random numbers, or count.
_ACTIVATIONS = {each[0] if isinstance(each, tuple) else each for each in ACT2FN.values()}


class FusedLayers:
    """Runs parts of a model as functions of `layer_functions`, until they are given back.

    Args:
        model: The model, before Accelerate prepares it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._counts = {"norms": 0, "gated MLPs": 0, "LoRA layers": 0}
        self._has_rotary = False
        llama, gemma = (
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            for name in ("llama", "gemma")
        )
        # What a forward calls is as much a part of it.
        forwards: list[tuple[str, Any, tuple[str, ...], Callable[..., Tensor]]] = [
            ("norms", llama.LlamaRMSNorm, ("forward",), _llama_norm),
            ("norms", gemma.GemmaRMSNorm, ("forward", "_norm"), _gemma_norm),
            ("gated MLPs", llama.LlamaMLP, ("forward",), _gated_mlp),
        ]
        lora = FusedLoRA()
        with ExitStack() as stack:
            for module in model.modules():
                for name, known, methods, forward in forwards:
                    if "forward" in vars(module) or _has_own_activation(module):
                        continue
                    if _has_same_code(type(module), known, methods):
                        fused = _FusedForward(module, forward)
                        stack.enter_context(replaced_forward(module, fused))
                        self._counts[name] += 1
                if is_lora(module) and "forward" not in vars(module):
                    stack.enter_context(replaced_forward(module, _FusedForward(module, lora)))
                    self._counts["LoRA layers"] += 1
            for source in {type(module).__module__ for module in model.modules()}:
                # Not every module that code was loaded from is registered.
                code = sys.modules.get(source)
                if code is not None and _has_same_code(code, llama, (_ROTARY, "rotate_half")):
                    stack.enter_context(_replaced_rotary(code))
                    self._has_rotary = True
            # Whatever goes wrong before, all is given back.
            self._stack = stack.pop_all()

    @property
    def summary(self) -> str:
        """What runs so, in a few words."""
        found = [f"{count} {name}" for name, count in self._counts.items() if count]
        # All layers share the function of their module, and so it is not counted.
        found += ["rotary embeddings"] if self._has_rotary else []
        if not found:
            return "as the model has them: none is of a known kind"
        return f"{', '.join(found)}, each as one function"

    def give_back(self) -> None:
        """Leaves the model as it was."""
        self._stack.close()


class _FusedForward:
    """A forward in place of that of a module, for calls with one argument.

    Copies of the module, on disk or not, have its own again.

    Args:
        module: Its own forward is known.
        forward: Takes the module, and the argument by whatever name the module's own has for it.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if len(values) == 1:
            return self._forward(self._module, *values)
        # Adapters may be told more, such as which of them a row is for.
        return type(self._module).forward(self._module, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy has no attributes yet, so this is the method of its class.
        return getattr, (self._module, "forward")


def _is_same_code(function: Any, known: Any) -> bool:
    """Whether two Python functions differ in nothing but names of locals and documentation."""
    if not inspect.isfunction(function):
        return False
    ours, theirs = (
        (
            each.__code__.co_code,
            each.__code__.co_names,
            [value for value in each.__code__.co_consts if value != each.__doc__],
            each.__defaults__,
        )
        for each in (function, known)
    )
    return ours == theirs


def _has_same_code(owner: Any, known: Any, names: Sequence[str]) -> bool:
    """Whether two classes, or two modules of Python, have the same functions of these names."""
    return all(_is_same_code(getattr(owner, name, None), getattr(known, name)) for name in names)


def _has_own_activation(module: nn.Module) -> bool:
    """Whether an activation may not run again, or has parameters, which would get no gradient."""
    if not hasattr(module, "act_fn"):
        return False
    activation: Any = module.act_fn
    if type(activation) not in _ACTIVATIONS or "forward" in vars(activation):
        return True
    return getattr(activation, "inplace", False) or any(True for _ in activation.parameters())


@contextmanager
def _replaced_rotary(source: ModuleType) -> Iterator[None]:
    """Gives the attention of one of transformers' modules another rotary embedding for a while."""
    own = getattr(source, _ROTARY)

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if cos.requires_grad or sin.requires_grad:
            rotated: tuple[Tensor, Tensor] = own(q, k, cos, sin, unsqueeze_dim)
            return rotated
        angles = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return Rotation.apply(q, *angles), Rotation.apply(k, *angles)

    setattr(source, _ROTARY, rotate)
    try:
        yield
    finally:
        setattr(source, _ROTARY, own)


def _llama_norm(self: Any, hidden_states: Tensor) -> Tensor:
    weight, eps = self.weight, self.variance_epsilon
    dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
    if dtype == torch.float64 or weight.shape != hidden_states.shape[-1:]:
        # The model has float32 inside, and is to be what it is. So is a weight for each head.
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    if hidden_states.is_cuda and hidden_states.dtype == weight.dtype:
        return F.rms_norm(hidden_states, weight.shape, weight, eps)
    normed: Tensor = RMSNorm.apply(hidden_states, weight, eps, dtype)
    return normed


def _gemma_norm(self: Any, hidden_states: Tensor) -> Tensor:
    is_double = torch.float64 in (hidden_states.dtype, self.weight.dtype)
    if is_double or self.weight.shape != hidden_states.shape[-1:]:
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    scale = 1.0 + self.weight.float()
    normed: Tensor = RMSNorm.apply(hidden_states, scale, self.eps, hidden_states.dtype)
    return normed


def _gated_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    if is_hooked(self.act_fn):
        # Hooks are to see the activation once, with its graph.
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    output: Tensor = self.down_proj(GatedProduct.apply(gate, up, self.act_fn))
    return output


class FusedLayersMixin(TrainerBase):
    """Lets a trainer run norms, gated MLPs, rotary embeddings and adapters as one function each.

    Attributes:
        fused_layers: `auto` or `off`; see `MaskedSFTConfig`.
    """

    fused_layers: str = "auto"
    _fused_layers: FusedLayers | None = None
    _own_layers_because: str | None = None

    @property
    def layers_summary(self) -> str | None:
        """How layers run, in a few words; None before training."""
        if self._own_layers_because is not None:
            return f"as the model has them, because {self._own_layers_because}"
        return None if self._fused_layers is None else self._fused_layers.summary

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._give_layers_back()
        assert self.model is not None, "the Trainer has it by now"
        self._own_layers_because = self._find_problem(self.model)
        if self._own_layers_because is None:
            self._fused_layers = FusedLayers(self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; afterwards the model is what it was."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._give_layers_back()

    def _find_problem(self, model: nn.Module) -> str | None:
        """Why the layers of a model stay as they are; None where they need not."""
        if self.fused_layers == "off":
            return "fused_layers is 'off'"
        if self.args.torch_compile or is_compiled(model):
            return "the compiler fuses more"
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return "DeepSpeed takes weights away between modules"
        return None

    def _give_layers_back(self) -> None:
        if self._fused_layers is not None:
            self._fused_layers.give_back()
            self._fused_layers = None


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
