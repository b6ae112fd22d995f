"""What training does at the embeddings: NEFTune's noise, and the gradient of tied weights.

The noise of a token is uniform in plus or minus `alpha / sqrt(L * D)`, L being the tokens of its
document and D those of a hidden state (https://huggingface.co/papers/2310.05914). The hook of
transformers takes the width of the batch for L: with padding that is the longest row of a
micro-batch, and without padding all rows together.

Where the LM head has the weight of the embedding, the embedding by itself makes a gradient of zeros
as large as the vocabulary, fills in the rows of the tokens that were read, and has all of it added
to that of the head. Here, on a CPU, it adds to the gradient of the head in place.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.loss.token_stats import refuse_second_derivative
from hf_sft_plugin.models.model_interface import find_embeddings


class DocumentNoise:
    """A forward hook for embeddings, in place of that of transformers."""

    def __init__(self) -> None:
        self._inputs: Mapping[str, Any] = {}

    @contextmanager
    def on(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Scales the noise of a forward pass.

        Args:
            inputs: What the model reads.
        """
        self._inputs = inputs
        try:
            yield
        finally:
            self._inputs = {}

    @torch.compiler.disable
    def __call__(self, module: Any, _: Any, output: Tensor) -> Tensor:
        """Adds noise to embeddings, `(B, S, D)`, while they are trained."""
        if not module.training:
            return output
        lengths, (width, size) = find_lengths(self._inputs), output.shape[1:]
        # A model may embed other tokens within a forward pass; these have no documents.
        if lengths is None or len(lengths) != len(output) or lengths.shape[1] not in (1, width):
            lengths = torch.full((1, 1), width, device=output.device)
        largest = module.neftune_noise_alpha * (lengths.unsqueeze(-1) * size).rsqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * largest.to(output)


def find_lengths(inputs: Mapping[str, Any]) -> Tensor | None:
    """The tokens of the document that each token is of.

    Args:
        inputs: What the model reads: rows end to end, or padded.

    Returns:
        `(1, T)`, or `(B, 1)` where each row is one document, at least 1; None where nothing says
        that a row has padding.
    """
    boundaries, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if isinstance(boundaries, Tensor):
        lengths = boundaries.diff()
        num_tokens = inputs["input_ids"].shape[1]
        return lengths.repeat_interleave(lengths, output_size=num_tokens).unsqueeze(0)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask != 0).sum(-1, keepdim=True).clamp(min=1)
    return None


class EmbeddingNoiseMixin(TrainerBase):
    """Gives the noise of `neftune_noise_alpha` the same size however rows are put together."""

    # The Trainer sets it where there is noise.
    neftune_hook_handle: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._noise = DocumentNoise()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; a training that is broken off leaves no noise behind either."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.neftune_hook_handle is not None:
                self.neftune_hook_handle.remove()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.neftune_noise_alpha is not None:
            self._replace_hook(self.neftune_noise_alpha)
        return super()._prepare_for_training(*args, **kwargs)

    def _replace_hook(self, alpha: float) -> None:
        """Puts our hook where the Trainer has just put its own."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        embeddings: Any
        (embeddings,) = (m for m in model.modules() if "neftune_noise_alpha" in vars(m))
        # As a float it is known for what makes a model random, even if it is a whole number.
        embeddings.neftune_noise_alpha = float(alpha)
        self.neftune_hook_handle.remove()
        self.neftune_hook_handle = embeddings.register_forward_hook(self._noise)


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
