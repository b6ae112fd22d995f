"""How much memory a training step needs: measured on a few tokens, worked out for any number.

A pass keeps and holds tensors, whose bytes are counted on the model itself, forward and backward,
on rows of a handful of tokens. They are a constant, and for every row a share of its length and one
of its square (where attention weights are held); three shapes tell all three. What the process
holds beside the model is measured as well. The heap of a CPU takes more than its tensors; see
`heap_share`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sft_plugin.models.model_interface import find_text_config, same_random_numbers
from hf_sft_plugin.training.allocator import heap_share
from hf_sft_plugin.training.available_memory import held_memory

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
    """What a process needs for a training step, in bytes.

    Attributes:
        weights: Parameters and buffers of the model, whether trained or not.
        gradients: Of all trained parameters.
        optimizer: States of the optimizer.
        kept: What a forward pass keeps for the backward pass, the head's gradients included.
        forward: What it holds beyond that at its highest point.
        backward: The same of the backward pass, without the gradients that are ready.
        is_checkpointed: Whether layers run again in the backward pass.
        forward_limit: `forward` grows no further, because the head works in tiles; None: it does.
        process: What is there beside the model: the libraries.
        gaps: Bytes that the allocator takes for each byte of a pass.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: Growth
    forward: Growth
    backward: Growth
    is_checkpointed: bool
    forward_limit: int | None = None
    process: int = 0
    gaps: float = 1.0

    @property
    def static(self) -> int:
        """What is there whatever runs: the process, weights, gradients and states."""
        return self.process + self.weights + self.gradients + self.optimizer

    def of_pass(self, lengths: Sequence[int]) -> float:
        """One forward and backward pass at its highest point, beyond what is static.

        Args:
            lengths: Tokens of each row of a micro-batch; with padding all as long as the longest.
        """
        forward = self.forward(lengths)
        if self.forward_limit is not None:
            forward = min(forward, self.forward.constant + self.forward_limit)
        return self.gaps * (self.kept(lengths) + max(forward, self.backward(lengths)))

    def of_passes(self, microbatches: Sequence[Sequence[int]]) -> float:
        """The largest of the micro-batches of a step, beyond what is static.

        Args:
            microbatches: The lengths of the rows of each.
        """
        return max((self.of_pass(lengths) for lengths in microbatches), default=0.0)

    def peak(self, microbatches: Sequence[Sequence[int]]) -> float:
        """The highest point of an optimizer step.

        Gradients count although those of a single micro-batch come as its activations go: an
        allocator rarely has a use for one in the place of the other.
        """
        return self.static + self.of_passes(microbatches)

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
    """Counts the bytes of tensors that come into being while it is on, as long as they live.

    Attributes:
        now: Bytes that live.
        done: Those of gradients that are ready, which do not count for the peak.
        peak: The most that lived at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.done = self.peak = 0
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
                self.peak = max(self.peak, self.now - self.done)
                weakref.finalize(storage, self._forget, _key(leaf))
        return result

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def run_backward(self, loss: Tensor, trained: Sequence[Tensor]) -> None:
        """Works out the gradients of a loss and drops them."""

        def count(grad: Tensor) -> None:
            self.done += grad.nbytes

        handles = [parameter.register_hook(count) for parameter in trained]
        try:
            # Unlike `backward` it runs nothing that others do once a gradient is there.
            torch.autograd.grad(loss, trained, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()


def _is_plain(leaf: object) -> bool:
    return type(leaf) in (Tensor, nn.Parameter)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure_step_memory(
    model: nn.Module,
    run: Callable[[int, int], Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> StepMemory:
    """Measures what a training step of a model needs; leaves the model as it was.

    Random numbers come out as if nothing had run, and no gradient is left behind.

    Args:
        model: Unwrapped from Accelerate, so that no process waits for another.
        run: Makes so many rows of so many tokens, runs the forward pass and returns the loss.
        optimizer: As Accelerate prepared it, or not.
    """
    weights = {_key(t): t for t in (*model.parameters(), *model.buffers())}.values()
    trained = [p for p in model.parameters() if p.requires_grad]
    config = find_text_config(model)
    # So few that it takes no time; yet on an accelerator enough that kernels are the usual ones.
    length = 32 if trained[0].device.type == "cpu" else 128
    # A row of twice the length has to have positions, too.
    most = getattr(config, "max_position_embeddings", 2 * length)
    length = min(length, most // 2)
    num_weights = sum(tensor.untyped_storage().nbytes() for tensor in weights)
    with _undisturbed(model), _not_reentrant(model):
        # What is made once and stays is no part of it.
        run(1, length)
        kept, forward, backward = _measure(run, trained, length)
        process = held_memory(trained[0].device)
    has_states = optimizer is not None and bool(optimizer.state)
    states = round(sum(p.numel() * _state_size(p, optimizer) for p in trained))
    present = num_weights + (states if has_states else 0)
    return StepMemory(
        weights=num_weights,
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=states,
        kept=kept,
        forward=forward,
        backward=backward,
        is_checkpointed=any(map(_is_checkpointed, model.modules())),
        process=max(0, process - present),
        gaps=heap_share() if trained[0].device.type == "cpu" else 1.0,
    )


def _measure(
    run: Callable[[int, int], Tensor], trained: Sequence[Tensor], length: int
) -> tuple[Growth, Growth, Growth]:
    """What a forward pass keeps, and what it and a backward pass hold beyond that at most."""
    kept, forward, backward = [], [], []
    for shape in ((1, length), (2, length), (1, 2 * length)):
        with _LiveMemory() as live:
            loss = run(*shape)
            kept.append(live.now)
            forward.append(live.peak - live.now)
            live.peak = live.now
            live.run_backward(loss, trained)
            backward.append(live.peak - kept[-1])
            del loss
    return Growth.fit(length, *kept), Growth.fit(length, *forward), Growth.fit(length, *backward)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.train()
    try:
        with (
            same_random_numbers(next(model.parameters()).device),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
        ):
            yield
    finally:
        model.train(was_training)


def _is_checkpointed(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


@contextmanager
def _not_reentrant(model: nn.Module) -> Iterator[None]:
    """Has gradient checkpointing run in the way that `torch.autograd.grad` can go through.

    What is kept is the same in both.
    """
    layers: list[Any] = [module for module in model.modules() if _is_checkpointed(module)]
    own = [layer._gradient_checkpointing_func for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer, function in zip(layers, own, strict=True):
            layer._gradient_checkpointing_func = function


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
