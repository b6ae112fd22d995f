"""A model in float64 for a while: the truth by which its other ways of running are judged.

Its weights are widened one decoder layer at a time, and those of a large LM head in slices, so the
whole model is never held twice. Norms, routers and softmax, which models cast to float32, are in
float64 as well.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

# What a model may raise that is run in a way it was not made for.
MODEL_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Largest relative difference between the float64 logits of a token in two ways of running it.
# Rounding stays below 1e-12.
TOLERANCE = 1e-6
# Bytes of a linear layer outside of the decoder layers that are widened at a time.
SLICE_BYTES = 2**28


@contextmanager
def in_float64(model: nn.Module, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Runs a model in float64 without autocast, for as long as the context lasts.

    Args:
        model: The model. As Accelerate prepared it or not: FSDP gathers a layer before it is
            widened here.
        dtype: Another one to compute in. Weights that are at least as precise stay as they are.
    """
    with ExitStack() as stack:
        stack.enter_context(_experts_one_by_one(model))
        for part in _parts(model):
            widened = _Widened(part, dtype)
            stack.callback(widened.narrow)
            before = part.register_forward_pre_hook(lambda *_, each=widened: each.widen())
            stack.callback(before.remove)
            # Before the hook with which FSDP takes the weights of the layer away.
            after = part.register_forward_hook(
                lambda _, __, output, each=widened: each.narrow(output),
                prepend=True,
                always_call=True,
            )
            stack.callback(after.remove)
        yield


@contextmanager
def _experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Runs experts one after another, because grouped products know no float64."""
    configs = {id(config): config for m in model.modules() if (config := _config_of(m)) is not None}
    own = [(config, config._experts_implementation_internal) for config in configs.values()]
    for config, _ in own:
        config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, implementation in own:
            config._experts_implementation_internal = implementation


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    is_of_experts = getattr(config, "_experts_implementation_internal", None) is not None
    return config if is_of_experts else None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose weights are widened together: layers, and what stands outside of them."""
    is_whole = isinstance(module, (GradientCheckpointingLayer, BaseTunerLayer))
    if is_whole or any(True for _ in module.parameters(recurse=False)):
        yield module
        return
    for child in module.children():
        yield from _parts(child)


class _NoNarrowing(TorchFunctionMode):
    """Has code that asks for float32, or a narrower dtype, get a wider one.

    Args:
        dtype: The wider one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].to(torch.promote_types(args[0].dtype, self._dtype))
        named = {name: self._widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._widen, args), **named)

    def _widen(self, value: Any) -> Any:
        is_floating = isinstance(value, torch.dtype) and value.is_floating_point
        return torch.promote_types(value, self._dtype) if is_floating else value


class _InSlices(TorchFunctionMode):
    """Has a linear layer widen some of its outputs after others: each is a sum by itself.

    Args:
        dtype: The wider dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not linear:
            return func(*args, **(kwargs or {}))
        hidden, weight, bias = args
        num_rows = max(1, SLICE_BYTES // (weight.shape[1] * self._dtype.itemsize))
        slices = [linear(hidden, some.to(self._dtype)) for some in weight.split(num_rows)]
        output = torch.cat(slices, dim=-1)
        return output if bias is None else output + bias.to(self._dtype)


class _Widened:
    """The weights of a module in another dtype while it runs, and no autocast.

    Args:
        module: The module.
        dtype: The dtype; more precise weights keep their own.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype
        self._stack: ExitStack | None = None

    def widen(self) -> None:
        """Widens the weights."""
        self.narrow()
        self._stack = ExitStack()
        device = next(self._module.parameters(), torch.empty(0)).device.type
        self._stack.enter_context(torch.autocast(device, enabled=False))
        if isinstance(self._module, nn.Embedding):
            # Its rows are widened when they have been looked up; all of them would be many.
            return
        if self._is_large_linear():
            self._stack.enter_context(_InSlices(self._dtype))
            return
        if not isinstance(self._module, nn.Linear):
            self._stack.enter_context(_NoNarrowing(self._dtype))
        for module in self._module.modules():
            of_module: Any = module
            for tensors in (of_module._parameters, of_module._buffers):
                own = {name: t for name, t in tensors.items() if self._is_narrow(t)}
                self._stack.callback(tensors.update, own)
                tensors.update({name: t.to(self._dtype) for name, t in own.items()})

    def narrow(self, output: Any = None) -> Any:
        """Gives the module its own weights; looked-up embeddings come out widened."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None
        if isinstance(self._module, nn.Embedding) and self._is_narrow(output):
            return output.to(self._dtype)
        return output

    def _is_large_linear(self) -> bool:
        module: Any = self._module
        # A gradient would keep the slices, and quantized layers have a forward of their own.
        if torch.is_grad_enabled() or type(module).forward is not nn.Linear.forward:
            return False
        is_large = module.weight.numel() * self._dtype.itemsize > SLICE_BYTES
        return is_large and self._is_narrow(module.weight)

    def _is_narrow(self, tensor: Any) -> bool:
        is_floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return is_floating and torch.promote_types(tensor.dtype, self._dtype) != tensor.dtype


def largest_error(logits: Tensor, truth: Tensor) -> float:
    """The largest relative difference between the logits of a token, `(N, V)`."""
    return float(_errors(logits, truth).max())


def typical_error(logits: Tensor, truth: Tensor, lengths: Sequence[int]) -> float:
    """The relative difference between the logits of most tokens, in the row that errs most.

    In half precision single tokens may err much more: those that attend to a few large numbers
    alone, or whose experts are other ones after rounding.

    Args:
        logits: `(N, V)`.
        truth: `(N, V)`.
        lengths: Tokens of each row; their sum is N.
    """
    errors = _errors(logits, truth).split(list(lengths))
    return max(float(of_row.median()) for of_row in errors)


def _errors(logits: Tensor, truth: Tensor) -> Tensor:
    truth = truth.double()
    # A head that begins with zeros gives no size to compare with.
    sizes = truth.norm(dim=-1).clamp(min=torch.finfo(truth.dtype).tiny)
    return (logits.double() - truth).norm(dim=-1) / sizes
