"""Step 7 of the walk without the logits: from hidden states to the loss, a tile of rows at a time.

The weight of every row is known before the loss, so each tile's gradient is worked out right after
its logits, which are then dropped: three matrix products over the response rows in all, and memory
that does not grow with their number.

Any head goes through here; a plain linear layer has a shorter way, `linear_head.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sft_plugin.loss.masked_loss import weighted_sum
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.token_stats import (
    TokenStats,
    refuse_second_derivative,
    statistics_dtype,
    token_stats,
    token_terms,
)

# Logits held at a time: 2^24 numbers are 64 MiB in float32. An accelerator needs more to be busy.
_TILE_SIZE = 2**24
_ACCELERATOR_TILE_SIZE = 2**27


class HeadLoss(NamedTuple):
    """The summed loss of N rows, and what is known about each.

    Attributes:
        loss: Scalar, sum over rows of weight * loss of the token; differentiable once.
        token_losses: `(N,)`, the loss of each token without its weight, detached.
        stats: Detached statistics of shape `(N,)`.
    """

    loss: Tensor
    token_losses: Tensor
    stats: TokenStats


def full_head_loss(
    logits: Tensor, targets: Tensor, weights: Tensor, objective: LossObjective
) -> HeadLoss:
    """The reference: the loss of N rows from their full logits.

    Args:
        logits: `(N, V)`.
        targets: `(N,)`, int64, each in `[0, V)`.
        weights: `(N,)`, what each row's loss is multiplied with.
        objective: The loss of one token.

    Returns:
        The loss and the statistics of the N rows, on the device of the logits.
    """
    targets, weights = targets.to(logits.device), weights.to(logits.device)
    if objective.needs_vocabulary:
        terms, is_top1 = token_terms(logits, targets)
        stats = TokenStats(terms.log_probs, terms.token_entropy, is_top1)
        losses = objective.token_losses(*terms)
    else:
        stats = token_stats(logits, targets)
        losses = objective.token_losses(stats.log_probs)
    loss = weighted_sum(losses, weights)
    return HeadLoss(loss, losses.detach(), TokenStats(*(stat.detach() for stat in stats)))


def fused_head_loss(
    hidden_states: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    vocab_size: int,
    objective: LossObjective,
) -> HeadLoss:
    """Applies an LM head and sums the weighted losses of its targets.

    Equal to `full_head_loss(head(hidden_states), ...)`, but the logits of at most a tile of rows
    exist at any time, forward or backward. With N = 0 the loss is a zero that is connected to the
    graph.

    Args:
        hidden_states: `(N, D)`.
        targets: `(N,)`, int64, each in `[0, V)`.
        weights: `(N,)`, what each row's loss is multiplied with.
        head: Maps `(n, D)` to logits `(n, V)`; rows do not influence each other.
        parameters: The tensors that `head` uses; those that require gradients get them.
        vocab_size: V, which sets the number of rows in a tile.
        objective: The loss of one token.

    Returns:
        The loss and the statistics of the N rows.

    Raises:
        RuntimeError: If the gradient of each row is asked for; see `refuse_row_gradients`.
    """
    refuse_row_gradients(weights)
    # Inside, all gradients seem needed, even under no_grad.
    is_trained = torch.is_grad_enabled()
    loss, token_losses, *stats = _FusedHeadFunction.apply(
        head, vocab_size, objective, is_trained, targets, weights, hidden_states, *parameters
    )
    return HeadLoss(loss, token_losses, TokenStats(*stats))


def refuse_row_gradients(weights: Tensor) -> None:
    """Raises where a gradient is asked for that is not that of the summed loss.

    Raises:
        RuntimeError: If the weights require a gradient, or under a transformation of `torch.func`.
    """
    if weights.requires_grad or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "The gradient of each row, or with respect to its weight, was asked for, but a fused "
            "head adds the rows up before their gradients can be told apart. Use "
            "torch.log_softmax on the full logits, which keeps them."
        )


class _FusedHeadFunction(torch.autograd.Function):
    """Gradients in the forward pass, summed over tiles in at least float32."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        vocab_size: int,
        objective: LossObjective,
        is_trained: bool,
        targets: Tensor,
        weights: Tensor,
        hidden_states: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        needs_hidden, *needs_parameters = (is_trained and n for n in ctx.needs_input_grad[6:])
        trained = [p for p, needed in zip(parameters, needs_parameters, strict=True) if needed]
        grad_hidden = torch.zeros_like(hidden_states) if needs_hidden else None
        sums = [torch.zeros_like(p, dtype=statistics_dtype(p)) for p in trained]
        dtype = statistics_dtype(hidden_states)
        loss = hidden_states.new_zeros((), dtype=dtype)
        values = [hidden_states.new_zeros(targets.shape, dtype=dtype) for _ in range(4)]
        size = _TILE_SIZE if hidden_states.device.type == "cpu" else _ACCELERATOR_TILE_SIZE
        num_rows = max(1, size // vocab_size)
        for start in range(0, len(targets), num_rows):
            rows = slice(start, start + num_rows)
            tile = hidden_states[rows].detach().requires_grad_(needs_hidden)
            with torch.set_grad_enabled(needs_hidden or bool(trained)):
                part = full_head_loss(head(tile), targets[rows], weights[rows], objective)
            loss += part.loss.detach().to(loss.device)
            for whole, of_tile in zip(values, (part.token_losses, *part.stats), strict=True):
                whole[rows] = of_tile
            inputs = [*([tile] if needs_hidden else []), *trained]
            # An adapter that is switched off has parameters that nothing depends on.
            grads = (
                list(torch.autograd.grad(part.loss, inputs, materialize_grads=True))
                if inputs
                else []
            )
            if grad_hidden is not None:
                grad_hidden[rows] = grads.pop(0)
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        ctx.save_for_backward(
            *([] if grad_hidden is None else [grad_hidden]),
            *(total.to(p.dtype) for total, p in zip(sums, trained, strict=True)),
        )
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("torch.log_softmax on the full logits")
        saved = iter(ctx.saved_tensors)
        return tuple(
            _scaled(next(saved), grad_loss) if needed and position >= 6 else None
            for position, needed in enumerate(ctx.needs_input_grad)
        )


def _scaled(grad: Tensor, grad_loss: Tensor) -> Tensor:
    # The head of a model that is spread over devices may be on another.
    return grad * grad_loss.to(grad.device)
