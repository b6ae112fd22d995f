"""Batches without padding that have one shape: tokens that count for nothing fill up the rest.

What is compiled, captured or planned for one shape needs every forward pass to have it. Rows laid
end to end have as many tokens as they happen to have, so `pad_to_multiple_of` rounds that number
up, with documents that nobody attends to and that train nothing.
"""

from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.nn.functional import pad

from hf_sft_plugin.batches.packing import PackedDataset
from hf_sft_plugin.batches.response_batch import ResponseBatch
from hf_sft_plugin.batches.shared_prompts import OpaqueList
from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.types import IGNORE_INDEX

# As long as there are documents, or tokens that they see: all that is left of a batch's own size.
_OF_DOCUMENTS = {"cu_seq_lens_q", "cu_seq_lens_k", "key_index"}


def round_up(number: int, multiple: int | None) -> int:
    """The next multiple, or the number itself where there is none to round to.

    Examples:
        >>> round_up(9, 8), round_up(16, 8), round_up(9, None)
        (16, 16, 9)
    """
    return number if multiple is None else -(-number // multiple) * multiple


def fill_up(batch: ResponseBatch, multiple: int) -> ResponseBatch:
    """Gives a batch without padding a multiple of so many tokens.

    The filler is cut into documents no longer than the longest there is, so that none reaches a
    position that the model does not have. It is made on the device, which nothing waits for.

    Args:
        batch: As `without_padding` gave it.
        multiple: What the number of its tokens is rounded up to.

    Returns:
        The batch with the filler behind its tokens; its trained positions are what they were.
    """
    inputs = batch.model_inputs
    num_tokens = inputs["input_ids"].shape[1]
    missing = round_up(num_tokens, multiple) - num_tokens
    device = inputs["input_ids"].device
    lengths = list(inputs["document_lengths"])
    longest = max(lengths)
    own = [min(longest, missing - start) for start in range(0, missing, longest)]
    filler = torch.arange(missing, device=device)
    ends = (torch.arange(1, len(own) + 1, device=device) * longest).clamp(max=missing)

    def extend(boundaries: Tensor) -> Tensor:
        return torch.cat([boundaries, (boundaries[-1:] + ends).to(boundaries.dtype)])

    changed: dict[str, Any] = {
        # Any token will do.
        "input_ids": pad(inputs["input_ids"], (0, missing)),
        "position_ids": torch.cat([inputs["position_ids"], filler.unsqueeze(0) % longest], dim=1),
        "document_lengths": OpaqueList(lengths + own),
        "cu_seq_lens_q": extend(inputs["cu_seq_lens_q"]),
        "cu_seq_lens_k": extend(inputs["cu_seq_lens_k"]),
        # Bounds are enough, and numbers that change would be compiled for one by one.
        "max_length_q": num_tokens + missing,
        "max_length_k": num_tokens + missing,
    }
    if "document_contexts" in inputs:
        contexts = [*inputs["document_contexts"], *([] for _ in own)]
        keys = torch.cat([inputs["key_index"], num_tokens + filler])
        changed |= {"document_contexts": OpaqueList(contexts), "key_index": keys}
    assert (sum(lengths), sum(own)) == (num_tokens, missing), "no token is lost or invented"
    return batch._replace(
        model_inputs={**inputs, **changed},
        targets=pad(batch.targets, (0, missing), value=IGNORE_INDEX),
        weights=pad(batch.weights, (0, missing)),
    )


class FixedShapeMixin(TrainerBase):
    """Lets a `Trainer` keep to the shapes that `pad_to_multiple_of` asks for."""

    token_budget: Any
    _train_batch_size: int

    @property
    def length_multiple(self) -> int | None:
        """What rows, or all tokens where there is no padding, are rounded up to; None: nothing.

        It is that of the settings, or of the collator, as those of transformers have it.
        """
        of_collator = getattr(self.data_collator, "pad_to_multiple_of", None)
        return getattr(self.args, "pad_to_multiple_of", None) or of_collator or None

    def has_router_loss(self) -> bool:
        """Whether the model is asked for the loss of a router, a mean over all that it reads."""
        raise NotImplementedError

    def fill_up(self, batch: ResponseBatch) -> ResponseBatch:
        """Rounds up the tokens of a batch without padding, where that is asked for."""
        # The router's loss is a mean over all tokens that it sees.
        if self.length_multiple is None or self.has_router_loss():
            return batch
        filled = fill_up(batch, self.length_multiple)
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            for name in _OF_DOCUMENTS & filled.model_inputs.keys():
                maybe_mark_dynamic(filled.model_inputs[name], 0)
        return filled

    def describe_shape(self, is_padded: bool, longest: int | None) -> str | None:
        """What the model reads at a time, in a few words; None where that is not rounded up.

        Args:
            is_padded: Whether rows are padded, and not laid end to end.
            longest: Tokens of the longest row of the training data; None where nobody knows.
        """
        multiple = self.length_multiple
        if multiple is None:
            return None
        if not is_padded and self.has_router_loss():
            return "as it comes: the router's loss would count what fills it up"
        if isinstance(self.train_dataset, PackedDataset):
            longest = self.train_dataset.max_length
        tokens = f"{multiple:,} tokens"
        if is_padded:
            is_one = longest is not None and longest <= multiple
            return f"rows of {tokens if is_one else f'a multiple of {tokens}'}"
        most = self._most_tokens(longest)
        is_one = most is not None and most <= multiple
        return f"1 x {tokens}, always" if is_one else f"1 x a multiple of {tokens}"

    def _most_tokens(self, longest: int | None) -> int | None:
        """Tokens that run at a time at most, without what fills them up, where that is known."""
        if longest is None:
            return None
        if self.token_budget is not None:
            return max(self.token_budget.possible, longest)
        # It makes batches of as many rows as have about the same number of tokens.
        if self.args.train_sampling_strategy == "batch_rebalance":
            return None
        return self._train_batch_size * longest
