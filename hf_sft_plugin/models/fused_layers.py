"""Which norms, MLPs, rotary embeddings and adapters run as one function each during training.

Nothing is guessed by names: most models of transformers have the first three word for word from
Llama or Gemma, and what is compiled from the same words does the same. Adapters are those of PEFT's
own LoRA class on a frozen linear layer.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.models.compilation import is_compiled
from hf_sft_plugin.models.fused_adapters import FusedLoRA, is_hooked, is_lora
from hf_sft_plugin.models.layer_functions import GatedProduct, RMSNorm, Rotation
from hf_sft_plugin.models.lm_head import replaced_forward

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
