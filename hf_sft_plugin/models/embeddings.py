"""NEFTune's noise on embeddings, scaled by the length of each document.

The noise of a token is uniform in plus or minus `alpha / sqrt(L * D)`, L being the tokens of its
document and D those of a hidden state (https://huggingface.co/papers/2310.05914). The hook of
transformers takes the width of the batch for L: with padding that is the longest row of a
micro-batch, and without padding all rows together.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sft_plugin.batches.trainer_base import TrainerBase


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
