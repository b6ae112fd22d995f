"""How much memory a training step needs: measured on a few tokens, worked out for any number.

What a forward pass keeps for the backward pass is counted on the model itself, on rows of a handful
of tokens. It is a constant, and for every row a share of its length and one of its square (where
attention weights are held); three rows' worth of forward passes tell all three. Counted are the
bytes of tensors. An allocator needs more: that of glibc, which leaves gaps that nothing fits into,
up to twice as much where tensors differ in size.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sft_plugin.training.model_interface import find_text_config

# Gradients that a backward pass holds at a time, as a share of what one layer keeps.
_BACKWARD_SHARE = 0.3
# Numbers per trained parameter that optimizers keep, by their class; any other is taken for Adam.
_NUM_STATES = {"sgd": 0.0, "adafactor": 0.01, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0}


@dataclass(frozen=True)
class Growth:
    """Bytes as a function of the lengths of rows.

    Attributes:
        constant: Whatever the rows.
        per_token: For each token.
        per_square: For the square of each row's length.
    """

    constant: float
    per_token: float
    per_square: float

    @classmethod
    def fit(cls, length: int, of_one: int, of_two: int, of_double: int) -> "Growth":
        """The function through three measurements.

        Args:
            length: Tokens of a row.
            of_one: Bytes of one such row.
            of_two: Bytes of two such rows.
            of_double: Bytes of one row of twice the length.

        Examples:
            >>> Growth.fit(2, of_one=10 + 6 + 20, of_two=10 + 12 + 40, of_double=10 + 12 + 80)
            Growth(constant=10.0, per_token=3.0, per_square=5.0)
        """
        per_square = max(0.0, (of_double - of_two) / (2 * length**2))
        per_row = float(of_two - of_one)
        return cls(of_one - per_row, per_row / length - per_square * length, per_square)

    def of_rows(self, lengths: Sequence[int]) -> float:
        """Bytes that come with the rows alone."""
        squares = sum(length**2 for length in lengths)
        return self.per_token * sum(lengths) + self.per_square * squares

    def __call__(self, lengths: Sequence[int]) -> float:
        """Bytes for rows of these lengths."""
        return self.constant + self.of_rows(lengths)


@dataclass(frozen=True)
class StepMemory:
    """What a training step needs, in bytes.

    Attributes:
        weights: Parameters and buffers of the model, whether trained or not.
        gradients: Of all trained parameters.
        optimizer: States of the optimizer.
        kept: What a forward pass keeps for the backward pass, the head's gradients included.
        forward: What it holds beyond that at its highest point.
        layer: What one layer keeps, or would keep without gradient checkpointing.
        is_checkpointed: Whether layers run again in the backward pass.
        forward_limit: `forward` grows no further, because the head works in tiles; None: it does.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: Growth
    forward: Growth
    layer: Growth
    is_checkpointed: bool
    forward_limit: int | None = None

    @property
    def static(self) -> int:
        """What is there whatever runs: weights, gradients and states."""
        return self.weights + self.gradients + self.optimizer

    def of_pass(self, lengths: Sequence[int]) -> float:
        """One forward and backward pass at its highest point, beyond what is static.

        Args:
            lengths: Tokens of each row of a micro-batch; with padding all as long as the longest.
        """
        forward = self.forward(lengths)
        if self.forward_limit is not None:
            forward = min(forward, self.forward.constant + self.forward_limit)
        share = _BACKWARD_SHARE + self.is_checkpointed
        return self.kept(lengths) + max(forward, share * self.layer.of_rows(lengths))

    def peak(self, microbatches: Sequence[Sequence[int]]) -> float:
        """The highest point of an optimizer step.

        Args:
            microbatches: The lengths of the rows of each.
        """
        highest = max((self.of_pass(lengths) for lengths in microbatches), default=0.0)
        if len(microbatches) > 1:
            return self.static + highest
        # Gradients come as what was kept goes; what the head made of its own comes on top.
        return self.weights + self.optimizer + max(highest, self.gradients + self.kept.constant)

    def max_tokens(self, num_bytes: float, longest: int) -> int:
        """The largest power of two of tokens whose pass fits; at least 1.

        Args:
            num_bytes: What a pass may take.
            longest: Tokens of the longest row: rows like that are reckoned with.
        """
        for exponent in range(20, 0, -1):
            tokens = 2**exponent
            lengths = [longest] * (tokens // longest) or [tokens]
            if self.of_pass(lengths) <= num_bytes:
                return tokens
        return 1


class _LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that come into being while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if _is_plain(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view of what was there before, such as a parameter, is nothing new.
            if _is_plain(leaf) and _key(leaf) not in known and _key(leaf) not in self._sizes:
                storage = leaf.untyped_storage()
                self._sizes[_key(leaf)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, _key(leaf))
        return result

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _is_plain(leaf: object) -> bool:
    return type(leaf) in (Tensor, nn.Parameter)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure_step_memory(
    model: nn.Module,
    run: Callable[[int, int], Any],
    optimizer: torch.optim.Optimizer | None,
) -> StepMemory:
    """Measures what a training step of a model needs; leaves the model as it was.

    Random numbers come out as if nothing had run, and no gradient is left behind.

    Args:
        model: Unwrapped from Accelerate, so that no process waits for another.
        run: Makes so many rows of so many tokens, runs the forward pass and returns what
            holds its graph.
        optimizer: As Accelerate prepared it, or not.
    """
    weights = {_key(t): t for t in (*model.parameters(), *model.buffers())}.values()
    trained = [p for p in model.parameters() if p.requires_grad]
    config = find_text_config(model)
    # Where nobody says how many there are, one layer may keep as much as all.
    num_layers = getattr(config, "num_hidden_layers", 1)
    # So few that it takes no time; yet on an accelerator enough that kernels are the usual ones.
    length = 32 if trained[0].device.type == "cpu" else 128
    # A row of twice the length has to have positions, too.
    length = min(length, getattr(config, "max_position_embeddings", 2 * length) // 2)
    is_checkpointed = any(map(_is_checkpointed, model.modules()))
    with _undisturbed(model):
        # What is made once and stays is no part of it.
        run(1, length)
        kept, forward = _measure(run, length)
        whole = kept
        if is_checkpointed:
            with _without_checkpointing(model):
                whole, _ = _measure(run, length)
    return StepMemory(
        weights=sum(tensor.untyped_storage().nbytes() for tensor in weights),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=round(sum(p.numel() * _state_size(p, optimizer) for p in trained)),
        kept=kept,
        forward=forward,
        layer=Growth(0.0, whole.per_token / num_layers, whole.per_square / num_layers),
        is_checkpointed=is_checkpointed,
    )


def _measure(run: Callable[[int, int], Any], length: int) -> tuple[Growth, Growth]:
    """What a forward pass keeps, and what it holds beyond that at its highest point."""
    kept, beyond = [], []
    for shape in ((1, length), (2, length), (1, 2 * length)):
        with _LiveMemory() as live:
            result = run(*shape)
            kept.append(live.now)
            beyond.append(live.peak - live.now)
            del result
    return Growth.fit(length, *kept), Growth.fit(length, *beyond)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    # The random numbers of other accelerators are not touched.
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    model.train()
    try:
        with (
            torch.random.fork_rng(devices, device_type=kind),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
        ):
            yield
    finally:
        model.train(was_training)


def _is_checkpointed(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    layers: list[Any] = [module for module in model.modules() if _is_checkpointed(module)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def _state_size(parameter: Tensor, optimizer: torch.optim.Optimizer | None) -> float:
    """Bytes that an optimizer keeps for each number of a parameter."""
    # Accelerate's wrapper carries the optimizer it wraps.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    name = type(optimizer).__name__.lower()
    defaults: Mapping[str, Any] = getattr(optimizer, "defaults", {})
    num_states = 2.0
    for known, count in _NUM_STATES.items():
        if known in name:
            num_states = count + bool(defaults.get("momentum"))
    for bits in (4, 8):
        if f"{bits}bit" in name or getattr(optimizer, "optim_bits", None) == bits:
            return num_states * bits / 8
    return num_states * parameter.element_size()
