"""Step 5 of the walk, taken apart: what the model reads, what the loss needs, where padding is."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sft_plugin.batches.host_facts import (
    FOR_THE_LOSS,
    HOST_FACTS,
    OF_LAYOUT,
    RowLayout,
    current_facts,
    facts_of,
    find_layout,
    find_trained_positions,
)
from hf_sft_plugin.loss.masked_loss import LossNormalization, token_weights, widest_float
from hf_sft_plugin.loss.token_stats import shift_labels


class ResponseBatch(NamedTuple):
    """A collated batch, taken apart.

    Attributes:
        model_inputs: What the model's forward takes.
        labels: `(B, S)`, unshifted.
        targets: `(B, S)`, shifted labels.
        weights: `(B, S)`, what the loss of each target is multiplied with before the division.
        divisors: `(B,)`, the share of each row in the global divisor.
        num_tokens: `(B,)`, tokens without padding; 0 for a padding row.
        positions: `(N,)`, those of the flattened targets that are trained.
        layout: Where the tokens are; None where that was not worked out with the batch.
        places: `(S,)`, for a single row: which of the model's hidden states predicts each target;
            None where each target has its own.
    """

    model_inputs: dict[str, Any]
    labels: Tensor
    targets: Tensor
    weights: Tensor
    divisors: Tensor
    num_tokens: Tensor
    positions: Tensor
    layout: RowLayout | None = None
    places: Tensor | None = None


def count_step(
    batches: Sequence[Mapping[str, Any]], normalization: LossNormalization, device: torch.device
) -> Tensor:
    """What the batches of a step count, `(2,)`: their share in the global divisor, their tokens.

    Args:
        batches: Those of this process.
        normalization: See `LossNormalization`.
        device: Where the counts are needed.
    """
    counts = torch.zeros(2, dtype=widest_float(device), device=device)
    for batch in batches:
        targets, _, divisors = _weigh(batch, normalization)
        tokens = _count_tokens(batch, targets)
        counts += torch.stack([divisors.sum(), tokens.sum()]).to(device)
    return counts


def split_batch(inputs: Mapping[str, Any], normalization: LossNormalization) -> ResponseBatch:
    """Takes a batch apart into what the model reads and what the loss needs.

    Waits for the device where the batch does not come with its trained positions, or was changed
    since.

    Args:
        inputs: A batch of `DataCollatorForPromptResponse`, or of any collator that gives labels.
        normalization: See `LossNormalization`.

    Raises:
        ValueError: If the batch has no labels.
    """
    targets, weights, divisors = _weigh(inputs, normalization)
    num_tokens = _count_tokens(inputs, targets)
    facts = current_facts(inputs)
    trained = facts.trained
    # A process that was sent its part of a larger batch got the positions of the whole.
    if trained is None or trained.shape != targets.shape:
        trained = find_trained_positions(inputs["labels"])
    return ResponseBatch(
        model_inputs={k: v for k, v in inputs.items() if k not in (*FOR_THE_LOSS, HOST_FACTS)},
        labels=inputs["labels"],
        targets=targets,
        weights=weights,
        divisors=divisors,
        num_tokens=num_tokens,
        positions=trained.index.to(targets.device),
        layout=facts.layout,
    )


def _count_tokens(inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Those of each row, without padding, `(B,)`; 0 for a padding row."""
    attention_mask = inputs.get("attention_mask")
    if facts_of(inputs).is_padding:
        return torch.zeros_like(targets[:, 0])
    if attention_mask is None:
        return torch.full_like(targets[:, 0], targets.shape[1])
    return attention_mask.sum(-1)


def _weigh(
    inputs: Mapping[str, Any], normalization: LossNormalization
) -> tuple[Tensor, Tensor, Tensor]:
    """The targets of a batch, their weights, and the share of each row in the global divisor."""
    if "labels" not in inputs:
        raise ValueError(
            f"The batch has no labels, only {', '.join(inputs)}. Use DataCollatorForPromptResponse "
            "or another collator that gives labels."
        )
    targets = shift_labels(inputs["labels"])
    loss_weights = inputs.get("loss_weights")
    if loss_weights is not None:
        loss_weights = shift_labels(loss_weights, fill=0)
    return targets, *token_weights(targets, loss_weights, normalization)


def without_padding(batch: ResponseBatch, share_prompts: bool = False) -> ResponseBatch | None:
    """Lays the rows of a batch end to end.

    Args:
        batch: As `split_batch` gave it.
        share_prompts: Whether what rows begin with in common runs once.

    Returns:
        The batch with one row of tokens for the model, and `targets` and `weights` of shape
        `(1, T)` in the order of the rows; None where `find_layout` finds no layout.
    """
    layout = batch.layout
    # A process that was sent its part of a larger batch got the layout of the whole.
    if layout is None or layout.shape != batch.labels.shape:
        layout = find_layout({**batch.model_inputs, "labels": batch.labels}, share_prompts)
    if layout is None:
        return None
    layout = layout.to(batch.labels.device)
    shared = layout.shared if share_prompts else None
    replaced = ("attention_mask", *OF_LAYOUT)
    inputs = {k: value for k, value in batch.model_inputs.items() if k not in replaced}
    ids = layout.flatten(inputs["input_ids"])
    inputs["input_ids"] = ids if shared is None else ids.index_select(1, shared.index)
    return batch._replace(
        model_inputs={**inputs, **(shared or layout).model_inputs()},
        targets=layout.flatten(batch.targets),
        weights=layout.flatten(batch.weights),
        positions=torch.searchsorted(layout.index, batch.positions),
        layout=layout,
        places=None if shared is None else shared.places,
    )
