"""Step 7 of the walk without the logits: from hidden states to the loss, a tile of rows at a time.

The weight of every row is known before the loss, so each tile's gradient is worked out right after
its logits, which are then dropped: three matrix products over the response rows in all, and memory
that does not grow with their number.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sft_plugin.loss.masked_loss import weighted_nll
from hf_sft_plugin.loss.token_stats import TokenStats, refuse_second_derivative, token_stats

# Logits held at a time: 2^24 numbers are 64 MiB in float32.
_TILE_SIZE = 2**24


class HeadLoss(NamedTuple):
    """The summed loss of N rows, and what is known about each.

    Attributes:
        loss: Scalar, sum over rows of weight * -log p(target); differentiable once.
        stats: Detached statistics of shape `(N,)`.
    """

    loss: Tensor
    stats: TokenStats


def fused_head_loss(
    hidden_states: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    vocab_size: int,
) -> HeadLoss:
    """Applies an LM head and sums the weighted negative log-likelihood of its targets.

    Equal to `token_stats(head(hidden_states), targets)` followed by `weighted_nll`, but the
    logits of at most a tile of rows exist at any time, forward or backward. With N = 0 the loss is
    a zero that is connected to the graph.

    Args:
        hidden_states: `(N, D)`.
        targets: `(N,)`, int64, each in `[0, V)`.
        weights: `(N,)`, what each row's loss is multiplied with.
        head: Maps `(n, D)` to logits `(n, V)`; rows do not influence each other.
        parameters: The tensors that `head` uses; those that require gradients get them.
        vocab_size: V, which sets the number of rows in a tile.

    Returns:
        The loss and the statistics of the N rows.
    """
    loss, *stats = _FusedHeadFunction.apply(
        head, vocab_size, targets, weights, hidden_states, *parameters
    )
    return HeadLoss(loss, TokenStats(*stats))


class _FusedHeadFunction(torch.autograd.Function):
    """Gradients in the forward pass, summed over tiles in at least float32."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        vocab_size: int,
        targets: Tensor,
        weights: Tensor,
        hidden_states: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        needs_hidden, *needs_parameters = ctx.needs_input_grad[4:]
        trained = [p for p, needed in zip(parameters, needs_parameters, strict=True) if needed]
        grad_hidden = torch.zeros_like(hidden_states) if needs_hidden else None
        sums = [torch.zeros_like(p, dtype=_sum_dtype(p)) for p in trained]
        dtype = _sum_dtype(hidden_states)
        loss = hidden_states.new_zeros((), dtype=dtype)
        stats = [hidden_states.new_zeros(targets.shape, dtype=dtype) for _ in range(3)]
        num_rows = max(1, _TILE_SIZE // vocab_size)
        for start in range(0, len(targets), num_rows):
            rows = slice(start, start + num_rows)
            tile = hidden_states[rows].detach().requires_grad_(needs_hidden)
            with torch.set_grad_enabled(needs_hidden or bool(trained)):
                tile_stats = token_stats(head(tile), targets[rows])
                tile_loss = weighted_nll(tile_stats.log_probs, weights[rows])
            loss += tile_loss.detach()
            for whole, part in zip(stats, tile_stats, strict=True):
                whole[rows] = part.detach()
            inputs = [*([tile] if needs_hidden else []), *trained]
            grads = list(torch.autograd.grad(tile_loss, inputs)) if inputs else []
            if grad_hidden is not None:
                grad_hidden[rows] = grads.pop(0)
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        ctx.save_for_backward(
            *([] if grad_hidden is None else [grad_hidden]),
            *(total.to(p.dtype) for total, p in zip(sums, trained, strict=True)),
        )
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("torch.log_softmax on the full logits")
        saved = iter(ctx.saved_tensors)
        return tuple(
            next(saved) * grad_loss if needed and position >= 4 else None
            for position, needed in enumerate(ctx.needs_input_grad)
        )


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
