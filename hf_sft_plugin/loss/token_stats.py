"""Steps 6 to 7 of the walk on full logits: log-probabilities, entropies and hits, the reference."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sft_plugin.types import IGNORE_INDEX

# Logits worked on at a time. Above 2^20 numbers a tile no longer fits a processor's cache, below
# it the calls cost more than the work; on an accelerator that takes far more.
_TILE_SIZE = 2**20
_ACCELERATOR_TILE_SIZE = 2**25


class TokenStats(NamedTuple):
    """What is known about each prediction; all of one shape.

    Attributes:
        log_probs: log p(target), in nats.
        token_entropy: Entropy of the predicted distribution, in nats.
        is_top1: 1.0 where the target is the most probable token, else 0.0.
    """

    log_probs: Tensor
    token_entropy: Tensor
    is_top1: Tensor


class TokenTerms(NamedTuple):
    """What a `LossObjective` is made of; all of one shape, each differentiable once.

    Attributes:
        log_probs: log p(target).
        token_entropy: Entropy of the prediction.
        log_normalizer: log Z, the logarithm of the sum of the exponentiated logits.
        mean_log_prob: Mean of log p over the vocabulary; -inf where a logit is.
    """

    log_probs: Tensor
    token_entropy: Tensor
    log_normalizer: Tensor
    mean_log_prob: Tensor


def shift_labels(labels: Tensor, fill: float = IGNORE_INDEX) -> Tensor:
    """Moves token-aligned values one step left, so that position t holds what t predicts.

    This is the only place where the alignment changes: what was said of token t + 1 is now said of
    the prediction at t. The last position predicts nothing and gets `fill`.

    Args:
        labels: `(..., S)`: labels, masks or weights.
        fill: What the last position gets.

    Returns:
        `(..., S)`, a new tensor.

    Examples:
        >>> shift_labels(torch.tensor([[-100, -100, 7, 2]]))
        tensor([[-100,    7,    2, -100]])
    """
    shifted = torch.full_like(labels, fill)
    shifted[..., :-1] = labels[..., 1:]
    return shifted


def token_stats(logits: Tensor, targets: Tensor) -> TokenStats:
    """Log-probability and rank of the targets, and the entropy of each prediction.

    With p = softmax(z): log p_t = z_t - logsumexp(z) and H = -sum_v p_v log p_v. Both have exact
    first derivatives, d log p_t / dz_v = [v = t] - p_v and dH / dz_v = -p_v (log p_v + H); they
    are worked out again in the backward pass, so that nothing of size V is kept but the logits.

    Args:
        logits: `(..., V)` in any floating dtype; entries may be -inf.
        targets: `(...)`, int64, each in `[0, V)`.

    Returns:
        Statistics of shape `(...)`, in float32, or float64 for float64 logits. `log_probs` and
        `token_entropy` are differentiable once, `is_top1` is not.

    Examples:
        >>> stats = token_stats(torch.tensor([[0.0, 0.0], [0.0, 30.0]]), torch.tensor([0, 1]))
        >>> [round(value, 4) for value in stats.log_probs.tolist()]
        [-0.6931, 0.0]
        >>> [round(value, 4) for value in stats.token_entropy.tolist()]
        [0.6931, 0.0]
    """
    return TokenStats(*_TokenStatsFunction.apply(logits, targets, False))


def token_terms(logits: Tensor, targets: Tensor) -> tuple[TokenTerms, Tensor]:
    """Like `token_stats`, with two more statistics of each prediction.

    With p = softmax(z): d log Z / dz_v = p_v, and the mean m of log p over a vocabulary of V has
    dm / dz_v = 1 / V - p_v.

    Args:
        logits: As in `token_stats`.
        targets: As in `token_stats`.

    Returns:
        The terms, and `is_top1` as in `TokenStats`.
    """
    log_probs, entropy, is_top1, *more = _TokenStatsFunction.apply(logits, targets, True)
    return TokenTerms(log_probs, entropy, *more), is_top1


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distributions, H = -sum_v p_v log p_v with p = softmax(logits).

    Args:
        logits: `(..., V)` in any floating dtype. Entries of -inf have probability 0 and add
            nothing. Large logits are safe: they are compared with their maximum first.

    Returns:
        `(...)` in nats, between 0 and log V, in float32, or float64 for float64 logits.
        Differentiable once.

    Examples:
        >>> compute_entropy(torch.zeros(1, 4)).exp()
        tensor([4.])
        >>> compute_entropy(torch.tensor([0.0, 0.0, -torch.inf])).exp()
        tensor(2.)
    """
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_stats(logits, targets).token_entropy


def get_response_log_probs(
    model: Callable[..., Any],
    input_ids: Tensor,
    labels: Tensor,
    return_token_entropy: bool = False,
) -> dict[str, Tensor]:
    """Log-probabilities that a model gives to each label, log p(labels[t] | input_ids[:t + 1]).

    The labels are already shifted: `labels[:, t]` is what the model should predict after reading
    `input_ids[:, : t + 1]`. Nothing is masked. Beyond the logits at most one tensor of their size
    is held: their gradient, while it is computed.

    Args:
        model: Called as `model(input_ids)`; its result has `.logits` of shape `(B, S, V)`.
        input_ids: `(B, S)`, int64.
        labels: `(B, S)`, int64, each in `[0, V)`.
        return_token_entropy: Adds the entropies.

    Returns:
        `log_probs`, `(B, S)`, differentiable; and `token_entropy`, `(B, S)` in nats, when asked.

    Raises:
        ValueError: If a label is negative or the shapes differ.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but input_ids {tuple(input_ids.shape)}; they "
            "are aligned position by position, so their shapes are equal."
        )
    if bool((labels < 0).any()):
        raise ValueError(
            f"labels holds {int(labels.min())}. This function masks nothing, so every label is a "
            "token id: fill ignored positions with any id and mask the result."
        )
    stats = token_stats(model(input_ids).logits, labels)
    result = {"log_probs": stats.log_probs}
    if return_token_entropy:
        result["token_entropy"] = stats.token_entropy
    return result


def refuse_second_derivative(alternative: str) -> None:
    """Called in a backward pass: raises where its result would have to be differentiated again.

    Raises:
        RuntimeError: If the gradient was asked for with `create_graph=True`; without it the result
            would silently count as a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The gradient of this loss was asked for with create_graph=True, but it can be "
            f"differentiated only once. Use {alternative}, which keeps what a second derivative "
            "needs."
        )


def _row_tiles(logits: Tensor, *per_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of some rows of the logits at a time, with what belongs to them; copies nothing."""
    if logits.dim() > 2:
        for parts in zip(logits, *per_row, strict=True):
            yield from _row_tiles(*parts)
    else:
        size = _TILE_SIZE if logits.device.type == "cpu" else _ACCELERATOR_TILE_SIZE
        num_rows = max(1, size // max(logits.shape[-1], 1))
        yield from zip(*(tensor.split(num_rows) for tensor in (logits, *per_row)), strict=True)


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums over the vocabulary are taken: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=statistics_dtype(logits))


class _TokenStatsFunction(torch.autograd.Function):
    """`token_stats` and `token_terms`, tile by tile in both directions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, has_more: bool) -> tuple[Tensor, ...]:
        shape = logits.shape[:-1]
        dtype = statistics_dtype(logits)
        outputs = [
            torch.empty(shape, dtype=dtype, device=logits.device)
            for _ in range(5 if has_more else 3)
        ]
        matrix = logits if logits.dim() > 1 else logits.unsqueeze(0)
        per_row = [t.reshape(matrix.shape[:-1]) for t in (targets, *outputs)]
        for tile, target, log_prob, entropy, is_top1, *more in _row_tiles(matrix, *per_row):
            log_p = _log_softmax(tile)
            top1 = tile.argmax(-1)
            log_prob.copy_(log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1))
            is_top1.copy_(top1 == target)
            if more:
                top1 = top1.unsqueeze(-1)
                more[0].copy_((tile.gather(-1, top1) - log_p.gather(-1, top1)).squeeze(-1))
                more[1].copy_(log_p.mean(-1))
            # A probability of 0 meets a logarithm of -inf: their product is 0 in the limit.
            entropy.copy_(-(log_p.exp() * log_p.clamp_min(torch.finfo(dtype).min)).sum(-1))
        ctx.save_for_backward(logits, targets, outputs[1])
        ctx.mark_non_differentiable(outputs[2])
        return tuple(outputs)

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, _: Tensor, *grad_more: Tensor
    ) -> Any:
        refuse_second_derivative("torch.log_softmax on the logits")
        logits, targets, entropy = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        matrix, grad_matrix = (t if t.dim() > 1 else t.unsqueeze(0) for t in (logits, grad_logits))
        per_row = [
            t.reshape(matrix.shape[:-1])
            for t in (targets, entropy, grad_log_probs, grad_entropy, *grad_more)
        ]
        tiles = _row_tiles(matrix, *per_row)
        outputs = _row_tiles(grad_matrix)
        for (tile, *row_values), (out,) in zip(tiles, outputs, strict=True):
            target, h, g_log_prob, g_entropy, *g_more = (t.unsqueeze(-1) for t in row_values)
            log_p = _log_softmax(tile)
            p = log_p.exp()
            grad = log_p.clamp_min_(torch.finfo(log_p.dtype).min).add_(h).mul_(p).mul_(-g_entropy)
            pulled = g_log_prob
            if g_more:
                g_log_normalizer, g_mean = g_more
                pulled = g_log_prob - g_log_normalizer + g_mean
                grad.add_(g_mean / tile.shape[-1])
            out.copy_(grad.sub_(p.mul_(pulled)).scatter_add_(-1, target, g_log_prob))
        return grad_logits, None, None
