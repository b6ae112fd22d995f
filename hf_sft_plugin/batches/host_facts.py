"""What the host knows of a batch without waiting: where its tokens are, and which are trained.

It is found where the batch is made. Of a batch on a GPU it could only be known by waiting for it,
in every micro-batch. All of it travels in the batch as one object, under one key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sft_plugin.batches.shared_prompts import OpaqueList, SharedPrompts, find_shared_prompts
from hf_sft_plugin.loss.token_stats import shift_labels
from hf_sft_plugin.types import IGNORE_INDEX

# The key under which a batch carries its `HostFacts`.
HOST_FACTS = "host_facts"
# Tensors that are not for the model.
FOR_THE_LOSS = ("labels", "response_mask", "loss_weights", "eval_masks")
# What collators of packed rows may add for the model: a layout says it anew.
OF_LAYOUT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Tensors that are known to hold one value per token; any other might mean something else.
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", *FOR_THE_LOSS)
_FOUND_FROM = ("input_ids", "attention_mask", "position_ids", "labels")


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
class TrainedPositions:
    """The N predictions of a batch whose targets are trained, in row-major order.

    Attributes:
        shape: B and S of the batch.
        on_host: `(N,)`, their positions in the flattened batch; stays on the host.
        index: The same on the device of the batch.
    """

    shape: tuple[int, int]
    on_host: NDArray[np.int64]
    index: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TrainedPositions":
        """A copy on a device; Accelerate calls this on what a batch holds."""
        return self._with_index(lambda index: index.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TrainedPositions":
        """A copy that the device can fetch by itself; data loaders call this."""
        return self._with_index(Tensor.pin_memory)

    def rows(self) -> list[NDArray[np.int64]]:
        """The trained positions of each row, counted within the row."""
        num_rows, width = self.shape
        edges = np.searchsorted(self.on_host, np.arange(1, num_rows) * width)
        return [columns % width for columns in np.split(self.on_host, edges)]

    def _with_index(self, change: Callable[[Tensor], Tensor]) -> "TrainedPositions":
        return replace(self, index=change(self.index))


def find_trained_positions(labels: Tensor) -> TrainedPositions:
    """Finds the predictions that are trained.

    Args:
        labels: `(B, S)`, unshifted, with IGNORE_INDEX where nothing is trained.

    Examples:
        >>> found = find_trained_positions(torch.tensor([[-100, 6, 7], [-100, -100, 9]]))
        >>> found.index.tolist(), [row.tolist() for row in found.rows()]
        ([0, 1, 4], [[0, 1], [1]])
    """
    is_trained = shift_labels(labels) != IGNORE_INDEX
    on_host = np.flatnonzero(is_trained.cpu().numpy())
    shape = (labels.shape[0], labels.shape[1])
    return TrainedPositions(shape, on_host, torch.from_numpy(on_host))


def positions_of_rows(rows: Sequence[NDArray[np.int64]], width: int) -> TrainedPositions:
    """The trained positions of a batch of `width` columns, made of those of its rows."""
    on_host = np.concatenate([number * width + columns for number, columns in enumerate(rows)])
    return TrainedPositions((len(rows), width), on_host, torch.from_numpy(on_host))


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
    tensors = {k: x for k, x in batch.items() if isinstance(x, Tensor) and k not in OF_LAYOUT}
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


@dataclass(frozen=True)
class HostFacts:
    """What the host knows of a batch.

    Attributes:
        layout: Where its tokens are; None where its rows cannot be laid end to end.
        trained: Which of its predictions are trained; None where that was not looked up.
        found_in: The tensors that both were found in; None while the data loader has the batch.
        is_padding: Whether its row is there only because other processes have a batch, too.
    """

    layout: RowLayout | None = None
    trained: TrainedPositions | None = None
    found_in: FoundIn | None = None
    is_padding: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "HostFacts":
        """A copy on a device; Accelerate calls this on what a batch holds."""
        return self._moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "HostFacts":
        """A copy that the device can fetch by itself; data loaders call this."""
        return self._moved(lambda part: part.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> "HostFacts":
        layout = None if self.layout is None else move(self.layout)
        trained = None if self.trained is None else move(self.trained)
        return replace(self, layout=layout, trained=trained)


def facts_of(batch: Any) -> HostFacts:
    """What the host knows of a batch; nothing where the batch does not say."""
    found = batch.get(HOST_FACTS) if isinstance(batch, Mapping) else None
    return HostFacts() if found is None else found


def with_facts(batch: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """A batch of which the host knows something else."""
    return {**batch, HOST_FACTS: replace(facts_of(batch), **changed)}


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what the host knows of it."""
    return {name: value for name, value in batch.items() if name != HOST_FACTS}


def current_facts(batch: Mapping[str, Any]) -> HostFacts:
    """What the host knows of a batch, without what no longer holds.

    Drops layout and trained positions if a tensor of the batch changed since they were found.
    """
    facts = facts_of(batch)
    if facts.found_in is None or facts.found_in.is_still_in(batch):
        return facts
    return HostFacts(is_padding=facts.is_padding)
