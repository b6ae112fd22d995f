"""Step 8 of the walk: per-token values become one scalar, divided once, by a number with a name."""

from enum import StrEnum

import torch
from torch import Tensor

from hf_sft_plugin.types import IGNORE_INDEX


class LossNormalization(StrEnum):
    """What the summed loss of an optimizer step is divided by, over all processes.

    Attributes:
        TOKEN: The number of response tokens, or the sum of their weights: every token counts the
            same.
        EXAMPLE: The number of rows with a response token, after each row's loss was divided by
            its own tokens (or weights): every example counts the same.
        CONSTANT: A fixed number: the gradient grows with the number of response tokens.
    """

    TOKEN = "token"  # noqa: S105  # not that kind of token
    EXAMPLE = "example"
    CONSTANT = "constant"


def masked_normalize(
    tensor: Tensor,
    mask: Tensor,
    dim: int | None = None,
    normalize_constant: float | Tensor = 1.0,
) -> Tensor:
    """Sums `tensor` where the mask is 1 and divides by a constant.

    Values under a zero of the mask are left out rather than multiplied: a NaN or infinity there
    does not reach the sum, and its gradient is zero.

    Args:
        tensor: Any shape.
        mask: The same shape; bool or int, or float to weigh each element.
        dim: The dimension to sum over; None sums over all.
        normalize_constant: A number, or a tensor that broadcasts to the result, such as the
            count of each example.

    Returns:
        The sum over `dim`, divided: a scalar for None, else without dimension `dim`.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> tensor = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
        >>> masked_normalize(tensor, mask, normalize_constant=2)
        tensor(6.5000)
        >>> masked_normalize(tensor, mask, dim=0, normalize_constant=2)
        tensor([2.5000, 2.5000, 1.5000])
        >>> masked_normalize(tensor, mask, dim=1, normalize_constant=torch.tensor([1.0, 3.0]))
        tensor([4., 3.])
    """
    if mask.shape != tensor.shape:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)} but the tensor {tuple(tensor.shape)}; each "
            "element needs a mask of its own. Expand the mask to the shape of the tensor."
        )
    kept = torch.where(mask.bool(), tensor, 0)
    if mask.is_floating_point():
        kept = kept * mask
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Tensor, dict[str, int | Tensor]]:
    """Backpropagates the masked loss of one micro-batch, -masked_sum / normalize_constant / G / G.

    This primitive normalizes each micro-batch by itself, and both divisions by the number G of
    accumulation steps are part of its contract. The trainer does not do it this way: there the
    loss is divided by the global count of response tokens, so that it does not depend on how the
    batch was split.

    Args:
        policy_log_probs: `(B, S)`, log-probabilities of the labels, with a gradient.
        response_mask: `(B, S)`, 1 where a label is a response token.
        gradient_accumulation_steps: G, at least 1.
        normalize_constant: What the sum is divided by.

    Returns:
        The detached loss, a scalar, and `{"num_tokens": ..., "masked_sum": ...}`: the number of
        response tokens and the detached sum of their log-probabilities.

    Raises:
        ValueError: If the shapes differ or G is not positive.

    Examples:
        >>> log_probs = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]],
        ...                          requires_grad=True)
        >>> mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
        >>> loss, metadata = sft_microbatch_train_step(log_probs, mask, 2)
        >>> loss, metadata
        (tensor(0.7000), {'num_tokens': 7, 'masked_sum': tensor(-2.8000)})
        >>> log_probs.grad
        tensor([[-0.2500, -0.2500,  0.0000, -0.2500],
                [-0.2500, -0.2500, -0.2500, -0.2500]])
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps}; a step has at least "
            "one micro-batch."
        )
    masked_sum = masked_normalize(policy_log_probs, response_mask)
    loss = -masked_sum / normalize_constant / gradient_accumulation_steps**2
    loss.backward()
    num_tokens = int(response_mask.bool().sum())
    return loss.detach(), {"num_tokens": num_tokens, "masked_sum": masked_sum.detach()}


def weighted_sum(token_losses: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight * loss, leaving out what has weight 0."""
    return masked_normalize(token_losses, weights.to(token_losses.dtype))


def token_weights(
    targets: Tensor, loss_weights: Tensor | None, normalization: LossNormalization
) -> tuple[Tensor, Tensor]:
    """What each prediction's loss is multiplied with, and what that adds to the global divisor.

    Args:
        targets: `(B, S)`, shifted labels with IGNORE_INDEX where nothing is trained.
        loss_weights: `(B, S)`, shifted likewise; None where every token counts 1.
        normalization: See `LossNormalization`.

    Returns:
        Weights of shape `(B, S)`, and the share of each row in the divisor, `(B,)`; both in
        float64 where the device has it. For `CONSTANT` the shares are 0: nothing is counted.

    Examples:
        >>> targets = torch.tensor([[7, 8, -100], [9, -100, -100]])
        >>> weights, shares = token_weights(targets, None, LossNormalization.EXAMPLE)
        >>> weights.tolist(), shares.tolist()
        ([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [1.0, 1.0])
    """
    is_trained = targets != IGNORE_INDEX
    weights = is_trained.to(widest_float(targets.device))
    if loss_weights is not None:
        weights = torch.where(is_trained, loss_weights.to(weights.dtype), 0)
    per_row = weights.sum(-1)
    if normalization == LossNormalization.EXAMPLE:
        has_weight = per_row > 0
        return weights / per_row.where(has_weight, 1).unsqueeze(-1), has_weight.to(weights.dtype)
    if normalization == LossNormalization.TOKEN:
        return weights, per_row
    return weights, torch.zeros_like(per_row)


def widest_float(device: torch.device) -> torch.dtype:
    """The most precise floating dtype of a device; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
