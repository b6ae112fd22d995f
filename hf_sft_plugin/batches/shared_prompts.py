"""What rows that begin alike have in common, so that it runs once.

Several responses to one prompt, or the turns of one conversation as rows of their own: the tokens
up to where such rows part are the same, and see the same, so their hidden states are too. They run
as one document, and the rest of each row as a document that also sees the first. What is shared may
be trained in any of the rows: each takes the hidden states that it needs, and their gradients add
up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Item = TypeVar("_Item")
# Fewer tokens are not worth the trouble, as where responses happen to begin with the same word.
MIN_SHARED_TOKENS = 16


class OpaqueList(Sequence[_Item]):
    """A list that `torch.compile` hands on without looking at it.

    Of a list it would note how long it is, and compile the model again for another length.

    Args:
        values: The list.
    """

    def __init__(self, values: list[_Item]) -> None:
        self._values = values

    @overload
    def __getitem__(self, index: int) -> _Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class SharedPrompts:
    """Which tokens of a layout run, in pieces, and where each token of the layout is among them.

    Attributes:
        document_lengths: Tokens of each piece; their sum is T.
        document_contexts: For each piece the earlier pieces that it goes on from, in order.
        index: `(T,)`, which tokens of the layout run.
        position_ids: `(1, T)`, the position of each in its row.
        boundaries: Where pieces begin and end, int32.
        key_index: Which of the T tokens each piece sees, one piece after another.
        key_boundaries: Where the pieces of `key_index` begin and end, int32.
        max_length_k: Tokens that the piece which sees the most of them sees.
        places: For every token of the layout, which of the T stands for it.
    """

    document_lengths: list[int]
    document_contexts: list[list[int]]
    index: Tensor
    position_ids: Tensor
    boundaries: Tensor
    key_index: Tensor
    key_boundaries: Tensor
    max_length_k: int
    places: Tensor

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "SharedPrompts":
        """A copy whose tensors were changed."""
        tensors: dict[str, Any] = {
            k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)

    def model_inputs(self) -> dict[str, Any]:
        """What a model needs to know about the pieces; see `document_attention`."""
        return {
            "position_ids": self.position_ids,
            "document_lengths": OpaqueList(self.document_lengths),
            "document_contexts": OpaqueList(self.document_contexts),
            "key_index": self.key_index,
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.key_boundaries,
            "max_length_q": max(self.document_lengths),
            "max_length_k": self.max_length_k,
        }


class _Piece(NamedTuple):
    """Tokens `start` to `end` of the sorted rows `first` to `last`, after those of its context."""

    first: int
    last: int
    start: int
    end: int
    context: list[int]


def find_shared_prompts(
    rows: Sequence[NDArray[np.int64]], at_least: int = MIN_SHARED_TOKENS
) -> SharedPrompts | None:
    """Finds what rows begin with in common.

    Args:
        rows: The tokens of each row, in the order of the layout.
        at_least: Tokens in common that are worth a document of their own.

    Returns:
        None where no two rows have as many in common.

    Examples:
        >>> rows = [np.array([5, 6, 7]), np.array([9]), np.array([5, 6, 8, 8])]
        >>> shared = find_shared_prompts(rows, at_least=2)
        >>> shared.index.tolist(), shared.document_lengths, shared.document_contexts
        ([0, 1, 3, 2, 6, 7], [2, 1, 1, 2], [[], [], [0], [0]])
        >>> shared.places.tolist()
        [0, 1, 3, 2, 0, 1, 4, 5]
    """
    order, common = _sort(rows)
    pieces = _cut([len(rows[row]) for row in order], common, at_least)
    row_starts = np.cumsum([0, *map(len, rows)])
    lengths = [piece.end - piece.start for piece in pieces]
    if sum(lengths) == row_starts[-1]:
        return None
    starts = np.cumsum([0, *lengths])
    spans = [np.arange(start, end) for start, end in pairwise(starts)]
    keys = [
        np.concatenate([spans[number] for number in (*piece.context, own)])
        for own, piece in enumerate(pieces)
    ]
    places = np.empty(row_starts[-1], dtype=np.int64)
    for piece, span in zip(pieces, spans, strict=True):
        for row in order[piece.first : piece.last]:
            places[row_starts[row] + piece.start : row_starts[row] + piece.end] = span
    positions = [np.arange(piece.start, piece.end) for piece in pieces]
    index = [row_starts[order[p.first]] + own for p, own in zip(pieces, positions, strict=True)]
    key_lengths = [len(seen) for seen in keys]
    return SharedPrompts(
        document_lengths=lengths,
        document_contexts=[piece.context for piece in pieces],
        index=torch.from_numpy(np.concatenate(index)),
        position_ids=torch.from_numpy(np.concatenate(positions)).unsqueeze(0),
        boundaries=torch.from_numpy(starts.astype(np.int32)),
        key_index=torch.from_numpy(np.concatenate(keys)),
        key_boundaries=torch.from_numpy(np.cumsum([0, *key_lengths]).astype(np.int32)),
        max_length_k=max(key_lengths),
        places=torch.from_numpy(places),
    )


def bundle_rows(
    rows: Sequence[NDArray[np.int64]], max_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Puts rows that begin alike together, as far as a budget allows.

    Args:
        rows: The tokens of each row.
        max_tokens: Tokens that the rows of a bundle may run; a row may have more.

    Returns:
        The rows of each bundle, and the tokens that run for it.

    Examples:
        >>> prompt = list(range(20))
        >>> rows = [np.array([*prompt, 1]), np.array([9]), np.array([*prompt, 2])]
        >>> bundle_rows(rows, max_tokens=100)
        ([[0, 2], [1]], [22, 1])
    """
    order, common = _sort(rows)
    lengths = [len(rows[row]) for row in order]
    bundles: list[list[int]] = []
    costs: list[int] = []
    first = 0
    for place, row in enumerate(order):
        if common[place] >= MIN_SHARED_TOKENS:
            pieces = _cut(lengths[first : place + 1], common[first : place + 1], MIN_SHARED_TOKENS)
            cost = sum(piece.end - piece.start for piece in pieces)
            if cost <= max_tokens:
                bundles[-1].append(row)
                costs[-1] = cost
                continue
        first = place
        bundles.append([row])
        costs.append(lengths[place])
    return bundles, costs


def _sort(rows: Sequence[NDArray[np.int64]]) -> tuple[list[int], list[int]]:
    """The rows in an order in which those that begin alike are neighbours.

    Returns:
        The rows, and how many tokens each has in common with the one before it.
    """
    # Bytes compare as the numbers do, the largest byte first.
    keys = [row.astype(">i8").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    return order, [0, *(_num_common(rows[a], rows[b]) for a, b in pairwise(order))]


def _num_common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _cut(lengths: Sequence[int], common: Sequence[int], at_least: int) -> list[_Piece]:
    """Cuts sorted rows where they part, so that each piece runs once.

    Args:
        lengths: Tokens of each row.
        common: Tokens that each row has in common with the one before it.
        at_least: Fewer tokens are not shared.

    Returns:
        The pieces, each after those that it goes on from.
    """
    pieces: list[_Piece] = []
    # Rows that share their first `depth` tokens, and the pieces that these are in.
    waiting: list[tuple[int, int, int, list[int]]] = [(0, len(lengths), 0, [])]
    while waiting:
        start, last, depth, context = waiting.pop()
        for end in range(start + 1, last + 1):
            if end < last and common[end] >= depth + at_least:
                continue
            shared = min(common[start + 1 : end], default=lengths[start])
            if shared > depth:
                pieces.append(_Piece(start, end, depth, shared, context))
                if end - start > 1:
                    waiting.append((start, end, shared, [*context, len(pieces) - 1]))
            start = end
    return pieces
