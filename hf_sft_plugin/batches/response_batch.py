"""Step 5 of the walk, taken apart: what the model reads, what the loss needs, where padding is."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sft_plugin.batches.padding_rows import REPEATED, as_repeat, leave_out_repeats
from hf_sft_plugin.batches.shared_prompts import OpaqueList, SharedPrompts, find_shared_prompts
from hf_sft_plugin.batches.trained_positions import (
    TRAINED_POSITIONS,
    TrainedPositions,
    find_trained_positions,
)
from hf_sft_plugin.loss.masked_loss import LossNormalization, token_weights, widest_float
from hf_sft_plugin.loss.token_stats import shift_labels
from hf_sft_plugin.types import IGNORE_INDEX

# The name under which a batch carries its `RowLayout`.
ROW_LAYOUT = "row_layout"
# The name under which it carries the `FoundIn` of both.
FOUND_IN = "found_in"
# What a batch carries for us beside its tensors.
OURS = (ROW_LAYOUT, TRAINED_POSITIONS, FOUND_IN, REPEATED)
_NOT_FOR_THE_MODEL = ("labels", "response_mask", "loss_weights", "eval_masks", *OURS)
_FOUND_FROM = ("input_ids", "attention_mask", "position_ids", "labels")
# What collators of packed rows may add for the model: a layout says it anew.
_OF_LAYOUT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Tensors that are known to hold one value per token; any other might mean something else.
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", *_NOT_FOR_THE_MODEL)


class FoundIn:
    """The tensors in which layout and trained positions of a batch were found.

    Somebody may change a batch before its loss is computed, as to mask tokens at random. That is
    seen without waiting for a device: another tensor took a place, or one was written to.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._tensors = {name: batch.get(name) for name in _FOUND_FROM}
        self._versions = self._count_writes()

    def is_still_in(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch holds these tensors, and as they were."""
        are_same = all(batch.get(name) is tensor for name, tensor in self._tensors.items())
        return are_same and self._count_writes() == self._versions

    def _count_writes(self) -> list[int]:
        return [each._version for each in self._tensors.values() if isinstance(each, Tensor)]


@dataclass(frozen=True)
class RowLayout:
    """Where the tokens of a padded batch are, so that its rows can be laid end to end.

    Worked out on the host, where the batch is made: of a batch on a GPU the lengths could only be
    known by waiting for it.

    Attributes:
        shape: B and S of the batch.
        document_lengths: Tokens of each document; a row is one, or several where it was packed.
        index: `(T,)`, positions of the T tokens in the flattened batch.
        position_ids: `(1, T)`, the position of each token in its document.
        boundaries: `(len(document_lengths) + 1,)`, int32, where documents begin and end.
        are_rows: Whether every row is one document, from its first position on.
        are_left_padded: Whether every row is one document, up to its last position, and one of
            them has padding before it.
        documents: The tokens of each document, which stay on the host; None where nobody asked
            for `shared`.
        shared: What documents begin with in common; None where that is nothing.
    """

    shape: tuple[int, int]
    document_lengths: list[int]
    index: Tensor
    position_ids: Tensor
    boundaries: Tensor
    are_rows: bool = False
    are_left_padded: bool = False
    documents: list[NDArray[np.int64]] | None = None
    shared: SharedPrompts | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RowLayout":
        """A copy on a device; Accelerate calls this on what a batch holds."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RowLayout":
        """A copy that the device can fetch by itself; data loaders call this."""
        return self._with_tensors(Tensor.pin_memory)

    def flatten(self, tensor: Tensor) -> Tensor:
        """The values of the tokens of a `(B, S)` tensor, `(1, T)`."""
        return tensor.flatten().index_select(0, self.index).unsqueeze(0)

    def model_inputs(self) -> dict[str, Any]:
        """What a model needs to know about documents without padding, by transformers' names."""
        longest = max(self.document_lengths)
        return {
            "position_ids": self.position_ids,
            "document_lengths": OpaqueList(self.document_lengths),
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def with_documents(self, documents: list[NDArray[np.int64]]) -> "RowLayout":
        """A copy that knows its tokens, and what its documents begin with in common."""
        positions = [np.arange(length) for length in self.document_lengths]
        # Other positions are for the model to know.
        is_usual = np.array_equal(self.position_ids.numpy()[0], np.concatenate(positions))
        shared = find_shared_prompts(documents) if is_usual else None
        return replace(self, documents=documents, shared=shared)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "RowLayout":
        return replace(
            self,
            shared=None if self.shared is None else self.shared.with_tensors(change),
            index=change(self.index),
            position_ids=change(self.position_ids),
            boundaries=change(self.boundaries),
        )


def find_layout(batch: Mapping[str, Any], share_prompts: bool = False) -> RowLayout | None:
    """Finds the tokens of a batch, where its rows can be laid end to end without a difference.

    Args:
        batch: A collated batch. Its `attention_mask` says where tokens are; without one every
            position holds a token, and `position_ids` that do not go on begin a new document, as
            they do in transformers.
        share_prompts: Whether to look for what documents begin with in common.

    Returns:
        None where the batch has neither; where a tensor does not hold one value per token; where
        there is a hole in a row; or where a token is to be predicted from padding.
    """
    ids, mask, positions = (batch.get(k) for k in ("input_ids", "attention_mask", "position_ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or (mask is None and positions is None):
        return None
    tensors = {k: x for k, x in batch.items() if isinstance(x, Tensor) and k not in _OF_LAYOUT}
    if any(name not in _PER_TOKEN or x.shape != ids.shape for name, x in tensors.items()):
        return None
    real = np.ones(ids.shape, dtype=bool) if mask is None else mask.cpu().numpy() == 1
    first, count = real.argmax(-1), real.sum(-1)
    columns = np.arange(ids.shape[1]) - first[:, None]
    # Masks that number packed documents, and masks with holes, are left to the model.
    is_strange = mask is not None and (mask.cpu().numpy() != real).any()
    if (
        is_strange
        or not count.any()
        or (real != ((columns >= 0) & (columns < count[:, None]))).any()
    ):
        return None
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        is_target = labels.cpu().numpy()[:, 1:] != IGNORE_INDEX
        if (is_target & ~real[:, :-1]).any():
            return None
    values = columns if positions is None else positions.cpu().numpy()
    starts = columns == 0
    if mask is None:
        starts[:, 1:] |= np.diff(values, axis=-1) != 1
    index = np.flatnonzero(real)
    boundaries = np.append(np.flatnonzero(starts[real]), len(index))
    are_documents = len(boundaries) == len(ids) + 1
    layout = RowLayout(
        shape=(ids.shape[0], ids.shape[1]),
        document_lengths=np.diff(boundaries).tolist(),
        index=torch.from_numpy(index),
        position_ids=torch.from_numpy(values[real]).unsqueeze(0),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        are_rows=are_documents and not first.any(),
        are_left_padded=are_documents and bool(first.any()) and bool(real[:, -1].all()),
    )
    if not share_prompts:
        return layout
    tokens = ids.cpu().numpy()[real]
    return layout.with_documents(np.split(tokens, boundaries[1:-1]))


def layout_of_rows(lengths: Sequence[int], width: int | None = None) -> RowLayout:
    """The layout of rows of these lengths, padded on the right to a width, or to the longest."""
    counts = np.array(lengths)
    ends = counts.cumsum()
    columns = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    width = width or int(counts.max())
    return RowLayout(
        shape=(len(lengths), width),
        document_lengths=list(lengths),
        index=torch.from_numpy(np.repeat(np.arange(len(lengths)) * width, counts) + columns),
        position_ids=torch.from_numpy(columns).unsqueeze(0),
        boundaries=torch.from_numpy(np.append(0, ends).astype(np.int32)),
        are_rows=True,
    )


class CollatorWithLayout:
    """Adds to every batch of a collator what can only be known of it on the host for free.

    Args:
        collate: Any collator.
        share_prompts: See `find_layout`.
        finds_layout: False adds the trained positions alone.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        share_prompts: bool = False,
        finds_layout: bool = True,
    ) -> None:
        self.collate = collate
        self.share_prompts = share_prompts
        self.finds_layout = finds_layout

    def __call__(self, rows: Any) -> Any:
        """The batch with its trained positions, and a layout where it can be laid end to end.

        Rows that are marked as repeats are left out, unless there are no others.
        """
        own, is_repeated = leave_out_repeats(rows)
        batch = self.collate(own)
        if not isinstance(batch, MutableMapping):
            return batch
        if is_repeated:
            batch = as_repeat(batch)
        layout = find_layout(batch, self.share_prompts) if self.finds_layout else None
        if layout is not None:
            batch[ROW_LAYOUT] = layout
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2:
            batch[TRAINED_POSITIONS] = find_trained_positions(labels)
        return batch


class ResponseBatch(NamedTuple):
    """A collated batch, taken apart.

    Attributes:
        model_inputs: What the model's forward takes.
        labels: `(B, S)`, unshifted.
        targets: `(B, S)`, shifted labels.
        weights: `(B, S)`, what the loss of each target is multiplied with before the division.
        divisors: `(B,)`, the share of each row in the global divisor.
        num_tokens: `(B,)`, tokens without padding; 0 where the row is a repeat.
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


def without_stale(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch without what was found in it before it was changed, or before nobody knows what.

    What a batch carries for us is good as long as it `remember_tensors` what it was found in.
    """
    found_in: FoundIn | None = inputs.get(FOUND_IN)
    if found_in is not None and found_in.is_still_in(inputs):
        return inputs
    return {name: value for name, value in inputs.items() if name not in OURS}


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
    if FOUND_IN in inputs:
        inputs = without_stale(inputs)
    trained: TrainedPositions | None = inputs.get(TRAINED_POSITIONS)
    # A process that was sent its part of a larger batch got the positions of the whole.
    if trained is None or trained.shape != targets.shape:
        trained = find_trained_positions(inputs["labels"])
    return ResponseBatch(
        model_inputs={k: value for k, value in inputs.items() if k not in _NOT_FOR_THE_MODEL},
        labels=inputs["labels"],
        targets=targets,
        weights=weights,
        divisors=divisors,
        num_tokens=num_tokens,
        positions=trained.index.to(targets.device),
        layout=inputs.get(ROW_LAYOUT),
    )


def _count_tokens(inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Those of each row, without padding, `(B,)`; 0 where the row is a repeat."""
    attention_mask = inputs.get("attention_mask")
    if REPEATED in inputs:
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
    replaced = ("attention_mask", *_OF_LAYOUT)
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
