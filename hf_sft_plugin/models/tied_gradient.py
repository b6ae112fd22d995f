"""Tied weights on a CPU: the embedding adds its gradient to that of the head, in place.

By itself it makes a gradient of zeros as large as the vocabulary, fills in the rows of the tokens
that were read, and has all of it added to that of the head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sft_plugin.loss.token_stats import refuse_second_derivative
from hf_sft_plugin.models.model_interface import find_embeddings


@contextmanager
def shared_gradient(
    wrapped: nn.Module, model: nn.Module, head: nn.Module
) -> Iterator[list[Tensor]]:
    """Lets the embedding of a model hand its weight on to a head that is tied to it.

    Args:
        wrapped: The model as Accelerate prepared it.
        model: The same model, unwrapped from Accelerate.
        head: Its LM head.

    Returns:
        The weight for the head, once the embedding has run. Stays empty where the gradient would
        not be the same to the last digits, or nothing would be gained.
    """
    handed_on: list[Tensor] = []
    embedding: Any = _tied_embedding(model, head)
    # An engine that is wrapped around a model has gradients go ways of its own.
    if embedding is None or wrapped is not model:
        yield handed_on
        return

    def embed(ids: Tensor) -> Tensor:
        embedded, weight = _EmbedFunction.apply(embedding.weight, ids, embedding.padding_idx)
        handed_on.append(weight)
        return embedded

    embedding.forward = embed
    try:
        yield handed_on
    finally:
        del embedding.__dict__["forward"]


def _tied_embedding(model: nn.Module, head: nn.Module) -> nn.Embedding | None:
    """The embedding whose gradient can go with that of the head, if there is one."""
    weight = head.weight if type(head) is nn.Linear else None
    if not torch.is_grad_enabled() or type(weight) is not nn.Parameter:
        return None
    embedding: Any = find_embeddings(model)
    is_usual = (
        type(embedding) is nn.Embedding
        and embedding.weight is weight
        and weight.requires_grad
        # Elsewhere sums would depend on their order, and in half precision on their number.
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and "forward" not in vars(embedding)
        and model._compiled_call_impl is None
    )
    return cast(nn.Embedding, embedding) if is_usual else None


class _EmbedFunction(torch.autograd.Function):
    """Rows of a weight, and the weight itself, of which there is one gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.shape = padding_idx, weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight, padding_idx), weight.view_as(weight)

    @staticmethod
    def backward(
        ctx: Any, grad_embedded: Tensor | None, grad_weight: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        refuse_second_derivative("torch.log_softmax on the full logits")
        if grad_embedded is None:
            return grad_weight, None, None
        (ids,) = ctx.saved_tensors
        if grad_weight is None:
            grad_weight = grad_embedded.new_zeros(ctx.shape)
        elif torch._C._autograd._get_current_graph_task_keep_graph():
            # The head will be asked for it again.
            grad_weight = grad_weight.clone()
        if ctx.padding_idx is not None:
            grad_embedded = grad_embedded.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
        grad_weight.index_add_(0, ids.flatten(), grad_embedded.flatten(0, -2))
        return grad_weight, None, None
