"""Step 3 of the walk for rows that come tokenized: nothing is made, everything is checked."""

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

from hf_sft_plugin.tokens.eval_masks import EVAL_MASK_BITS
from hf_sft_plugin.types import IGNORE_INDEX, RowError, TokenizedExample

# 1 where a token is trained, under the names that libraries have for it.
_MASKS = ("response_mask", "completion_mask", "assistant_masks")
_COLUMNS = ("input_ids", "attention_mask", *_MASKS, "labels", "loss_weights", "eval_masks")


def check_tokenized_row(
    row: Mapping[str, Any], index: int, vocab_size: int, trains_all: bool = False
) -> TokenizedExample:
    """Checks a row of input_ids and what marks its trained tokens, and takes its padding out.

    Args:
        row: Has `response_mask`, `completion_mask` or `assistant_masks`, or `labels`, from which
            the mask is derived. `loss_weights` and `attention_mask` may come with it: positions
            where the latter is 0 are padding. Lists, arrays and tensors are taken.
            `eval_masks` is carried along.
        index: Its position in the dataset, for error messages.
        vocab_size: Number of the tokenizer's ids.
        trains_all: Whether a row of `input_ids` alone is trained whole.

    Returns:
        An example with lists of its own, except for `input_ids`, which may be the row's.

    Raises:
        RowError: If ids, masks, labels or weights are impossible, if their lengths differ, or if
            they contradict each other.

    Examples:
        >>> row = {"input_ids": [0, 5, 6], "labels": [-100, -100, 6], "attention_mask": [0, 1, 1]}
        >>> check_tokenized_row(row, 0, 300)
        {'input_ids': [5, 6], 'response_mask': [0, 1]}
    """
    names = _given_columns(row, trains_all)
    lists = {name: _as_list(row.get(name), name, index) for name in names}
    _require_one_length(lists, index)
    if "attention_mask" in lists:
        lists = _without_padding(lists, index)
    _check_ids(lists["input_ids"], index, vocab_size)
    masks = {name: _mask(name, lists, index) for name in (*_MASKS, "labels") if name in lists}
    example: TokenizedExample = {
        "input_ids": lists["input_ids"],
        "response_mask": _one_mask(masks, index) if masks else [1] * len(lists["input_ids"]),
    }
    if "loss_weights" in lists:
        example["loss_weights"] = _weights(lists["loss_weights"], index)
    if "eval_masks" in lists:
        example["eval_masks"] = _marks(lists["eval_masks"], index)
    return example


def _given_columns(row: Mapping[str, Any], trains_all: bool) -> list[str]:
    """The columns that hold something; at least ids and what should mark the trained ones."""
    given = [name for name in _COLUMNS if row.get(name) is not None]
    needed = [] if "input_ids" in given else ["input_ids"]
    if not trains_all and not any(name in given for name in (*_MASKS, "labels")):
        needed.append(next((name for name in ("labels", *_MASKS) if name in row), _MASKS[0]))
    return [*needed, *given]


def _as_list(value: Any, column: str, index: int) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list):
        raise RowError(
            index,
            f"column {column!r} holds {type(value).__name__}, but a list of numbers is needed.",
            f"{column} is not a list",
        )
    return value


def _require_one_length(lists: Mapping[str, Sequence[Any]], index: int) -> None:
    num_tokens = len(lists["input_ids"])
    for column, values in lists.items():
        if len(values) != num_tokens:
            raise RowError(
                index,
                f"input_ids has {num_tokens} tokens but {column} has {len(values)} entries. "
                "All lists of a row are token-aligned and have one length.",
                "lists of unequal length",
            )


def _without_padding(lists: Mapping[str, list[Any]], index: int) -> dict[str, list[Any]]:
    """All lists at the positions that the attention mask shows."""
    is_token = _zeros_and_ones("attention_mask", lists["attention_mask"], index)
    if all(is_token):
        return dict(lists)
    return {name: list(compress(values, is_token)) for name, values in lists.items()}


def _check_ids(input_ids: list[Any], index: int, vocab_size: int) -> None:
    # Loops in C: on lists they are faster than a numpy array is made. What they refuse is then
    # looked for and named.
    if _are(int, input_ids) and min(input_ids) >= 0 and max(input_ids) < vocab_size:
        return
    for token in input_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RowError(
                index,
                f"input_ids holds {token!r}, but the tokenizer's ids are the integers 0 to "
                f"{vocab_size - 1}. Tokenize the row with this tokenizer.",
                "token id outside the vocabulary",
            )


def _mask(name: str, lists: Mapping[str, list[Any]], index: int) -> list[int]:
    """The mask that a column gives."""
    if name != "labels":
        return _zeros_and_ones(name, lists[name], index)
    input_ids, labels = lists["input_ids"], lists["labels"]
    for token, label in zip(input_ids, labels, strict=True):
        # Two comparisons rather than a tuple: this is the inner loop.
        if label != token and label != IGNORE_INDEX:
            raise RowError(
                index,
                f"labels holds {label!r} where input_ids holds {token}. Labels are not "
                f"shifted here: each is the token at its own position, or {IGNORE_INDEX} "
                "where the token is not trained.",
                "labels differ from input_ids",
            )
    return [int(label != IGNORE_INDEX) for label in labels]


def _zeros_and_ones(name: str, marks: list[Any], index: int) -> list[int]:
    """The entries of a mask as integers, in a list of its own."""
    if _are(int, marks) and min(marks) >= 0 and max(marks) <= 1:
        return list(marks)
    for mark in marks:
        if mark not in (0, 1):
            meaning = (
                "a position holds a token (1) or padding (0)."
                if name == "attention_mask"
                else "a token is trained (1) or not (0). Use the column loss_weights to say how "
                "much a token counts."
            )
            raise RowError(index, f"{name} holds {mark!r}; {meaning}", f"{name} is not 0 or 1")
    return [int(mark) for mark in marks]


def _one_mask(masks: Mapping[str, list[int]], index: int) -> list[int]:
    """The mask that all columns agree on."""
    (first, mask), *others = masks.items()
    for name, other in others:
        if other != mask:
            position = next(i for i, mark in enumerate(mask) if mark != other[i])
            yes, no = (first, name) if mask[position] else (name, first)
            raise RowError(
                index,
                f"{yes} trains token {position} of the row (padding not counted) and {no} does "
                "not, so nothing says which is meant. Remove one of the two columns.",
                f"{first} and {name} contradict each other",
            )
    return mask


def _marks(marks: list[Any], index: int) -> list[int]:
    for mark in marks:
        if type(mark) is not int or not 0 <= mark <= sum(EVAL_MASK_BITS.values()):
            bits = " and ".join(f"{bit} ({name})" for name, bit in EVAL_MASK_BITS.items())
            raise RowError(
                index,
                f"eval_masks holds {mark!r}; of each token it is the sum of {bits}, as far as the "
                "token belongs to it.",
                "eval_masks are not sums of masks",
            )
    return list(marks)


def _weights(weights: list[Any], index: int) -> list[float]:
    # A sum is finite only if all of its terms are.
    if _are(float, weights) and min(weights) >= 0 and math.isfinite(sum(weights)):
        return list(weights)
    for weight in weights:
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise RowError(
                index,
                f"loss_weights holds {weight!r}; use finite numbers of 0 or more.",
                "loss_weights are negative or not finite",
            )
    return [float(weight) for weight in weights]


def _are(kind: type, values: list[Any]) -> bool:
    """Whether there are values, and all of just this type: `True` is no token id."""
    return set(map(type, values)) == {kind}
