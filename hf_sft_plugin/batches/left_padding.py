"""Batches padded on the left, brought to the form in which their rows can be put together anew."""

from typing import Any

import torch
from torch import Tensor

from hf_sft_plugin.batches.fixed_shape import round_up
from hf_sft_plugin.batches.host_facts import (
    HOST_FACTS,
    HostFacts,
    facts_of,
    layout_of_rows,
    positions_of_rows,
    tensors_of,
)


def move_padding_right(batch: Any, multiple: int | None = None) -> Any:
    """The rows of a batch from their first token on, where padding stands before them.

    Causal models read the same either way, and positions are counted from the first token, as at
    inference. The lengths are known on the host, so nothing waits for a device.

    Args:
        batch: As the data loader gave it.
        multiple: What its collator rounds S up to.

    Returns:
        The batch with its padding on the right; the same batch where there is none on the left,
        where it has no layout, and where it says itself what the positions are.
    """
    facts = facts_of(batch)
    layout = facts.layout
    if layout is None or not layout.are_left_padded or "position_ids" in batch:
        return batch
    old_width, lengths = layout.shape[1], layout.document_lengths
    # A process that was sent its part of a larger batch got the layout of the whole.
    if batch["labels"].shape != layout.shape:
        return batch
    width = min(old_width, round_up(max(lengths), multiple))
    device = batch["labels"].device
    starts = torch.tensor([[old_width - length] for length in lengths])
    columns = ((starts + torch.arange(width)) % old_width).to(device, non_blocking=True)
    moved = {
        name: value.take_along_dim(columns, dim=1) if isinstance(value, Tensor) else value
        for name, value in tensors_of(batch).items()
    }
    aligned = layout_of_rows(lengths, width)
    if layout.documents is not None:
        aligned = aligned.with_documents(layout.documents)
    trained = None
    if facts.trained is not None:
        rows = [c - (old_width - n) for c, n in zip(facts.trained.rows(), lengths, strict=True)]
        trained = positions_of_rows(rows, width)
    found = HostFacts(aligned, trained, is_padding=facts.is_padding)
    return {**moved, HOST_FACTS: found.to(device, non_blocking=True)}
