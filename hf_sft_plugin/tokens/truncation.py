"""What becomes of an example that is longer than the limit; no token goes uncounted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.types import Conversation, Overflow, RowError, TokenizedExample, TrainedSpan

# Tokens `[start, end)` that are kept.
Range = tuple[int, int]


def max_row_length(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """The longest row that is kept whole, in tokens; None where nothing sets a limit."""
    # Tokenizers without a limit of their own carry the number 1e30.
    own = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return own if max_length is None else max_length


def plan_truncation(
    mask: Sequence[int], limit: int, overflow: Overflow, index: int
) -> list[list[Range]]:
    """Says which tokens of an example that is too long are kept.

    Args:
        mask: The response mask of an example with more than `limit` tokens.
        limit: Tokens of the longest example.
        overflow: See `DataOptions`.
        index: Row of the dataset, for error messages.

    Returns:
        The ranges of tokens that make up each example that remains.

    Raises:
        RowError: If nothing can be kept: for `error` and `drop`, or if a response alone is longer
            than the limit.

    Examples:
        >>> plan_truncation([0, 0, 0, 1, 1], 4, "keep_response", 0)
        [[(0, 1), (2, 5)]]
        >>> plan_truncation([0, 0, 0, 1, 1], 2, "split", 0)
        [[(0, 2)], [(2, 4)], [(4, 5)]]
    """
    length = len(mask)
    if overflow in ("error", "drop"):
        raise RowError(
            index,
            f"the row has {length} tokens, but max_length is {limit}. Raise max_length, or set "
            "overflow to keep a part of such rows.",
            "longer than max_length",
        )
    if overflow == "split":
        return [[(start, min(start + limit, length))] for start in range(0, length, limit)]
    if overflow == "keep_end":
        return [[(length - limit, length)]]
    runs = mask_runs(mask)
    if overflow == "keep_start" or not runs:
        return [[(0, limit)]]
    start, end = runs[-1]
    room = limit - (end - start)
    if room < 1:
        raise RowError(
            index,
            f"the response alone has {end - start} tokens, but max_length is {limit}, and a token "
            "of context is needed before it. Raise max_length to keep the row.",
            "response longer than max_length",
        )
    if start <= room:
        return [[(0, limit)]]
    # The prompt loses its middle: its start holds the instructions, its end the question.
    head = room // 2
    return [[(0, head), (start - (room - head), end)]]


def keep(
    example: TokenizedExample, spans: Sequence[TrainedSpan], ranges: Sequence[Range]
) -> tuple[TokenizedExample, list[TrainedSpan]]:
    """An example of which only some tokens are left, and its spans.

    Examples:
        >>> example = {"input_ids": [5, 6, 7, 8], "response_mask": [0, 0, 1, 1]}
        >>> keep(example, [TrainedSpan(2, 4, 1, "exact")], [(0, 1), (2, 3)])[0]
        {'input_ids': [5, 7], 'response_mask': [0, 1]}
    """
    lists = cast(Mapping[str, list[Any]], example)
    kept = {
        name: [value for start, end in ranges for value in values[start:end]]
        for name, values in lists.items()
    }
    left = []
    for span in spans:
        position = 0
        parts = []
        for start, end in ranges:
            first, last = max(span.start, start), min(span.end, end)
            if first < last:
                parts += [position + first - start, position + last - start]
            position += end - start
        if parts:
            left.append(TrainedSpan(parts[0], parts[-1], span.turn, span.kind))
    return cast(TokenizedExample, kept), left


def nothing_left(row: int, limit: int | None, longest: int) -> RowError:
    """The error about a row of which no trained token is left.

    Args:
        row: Of the dataset.
        limit: Tokens of the longest example, where the row was cut to it.
        longest: Tokens that the row had.
    """
    if limit is not None:
        return RowError(
            row,
            f"the response begins after the first {limit} tokens of {longest}, where the row is "
            "cut. Raise max_length, set overflow to 'keep_response', or remove the row.",
            "no response left within max_length",
        )
    return RowError(
        row,
        "no token of the row is trained: its response_mask is 0 everywhere (or its labels are all "
        "ignored, or its weight is 0). Mark the response, or remove the row.",
        "no trained token",
    )


def mask_runs(mask: Sequence[int]) -> list[Range]:
    """Where the trained tokens of a mask begin and end.

    Examples:
        >>> mask_runs([0, 1, 1, 0, 1])
        [(1, 3), (4, 5)]
    """
    # Bytes are searched at once rather than one by one; a last 0 ends every run.
    marks = bytes(mask) + b"\0"
    runs = []
    start = marks.find(1)
    while start >= 0:
        end = marks.find(0, start)
        runs.append((start, end))
        start = marks.find(1, end)
    return runs


def without_oldest_exchange(conversation: Conversation) -> Conversation | None:
    """The chat without its first turns after the system's, up to the next user turn."""
    roles = [turn.message["role"] for turn in conversation.turns]
    head = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), 0)
    following = next((i for i in range(head + 1, len(roles)) if roles[i] == "user"), None)
    if following is None or not any(turn.train for turn in conversation.turns[following:]):
        return None
    turns = conversation.turns[:head] + conversation.turns[following:]
    return replace(conversation, turns=turns)
