"""Batches padded on the left, brought to the form in which their rows can be put together anew."""

from typing import Any

import torch
from torch import Tensor

from hf_sft_plugin.batches.fixed_shape import round_up
from hf_sft_plugin.batches.response_batch import FOUND_IN, ROW_LAYOUT, RowLayout, layout_of_rows
from hf_sft_plugin.batches.trained_positions import (
    TRAINED_POSITIONS,
    TrainedPositions,
    positions_of_rows,
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
    layout: RowLayout | None = batch.get(ROW_LAYOUT) if isinstance(batch, dict) else None
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
    moved: dict[str, Any] = {
        name: value.take_along_dim(columns, dim=1) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in (ROW_LAYOUT, TRAINED_POSITIONS, FOUND_IN)
    }
    aligned = layout_of_rows(lengths, width)
    if layout.documents is not None:
        aligned = aligned.with_documents(layout.documents)
    moved[ROW_LAYOUT] = aligned.to(device, non_blocking=True)
    trained: TrainedPositions | None = batch.get(TRAINED_POSITIONS)
    if trained is not None:
        rows = [c - (old_width - n) for c, n in zip(trained.rows(), lengths, strict=True)]
        moved[TRAINED_POSITIONS] = positions_of_rows(rows, width).to(device, non_blocking=True)
    return moved
