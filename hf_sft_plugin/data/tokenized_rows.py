"""Step 3 of the walk for rows that come tokenized: nothing is made, everything is checked."""

import math
from collections.abc import Mapping
from typing import Any

from hf_sft_plugin.types import IGNORE_INDEX, RowError, TokenizedExample


def check_tokenized_row(row: Mapping[str, Any], index: int, vocab_size: int) -> TokenizedExample:
    """Checks a row of input_ids with response_mask or labels, and derives the mask from labels.

    Args:
        row: `loss_weights` may come with it; lists, arrays and tensors are taken.
        index: Its position in the dataset, for error messages.
        vocab_size: Number of the tokenizer's ids.

    Raises:
        RowError: If ids, mask, labels or weights are impossible, or their lengths differ.
    """
    input_ids = _as_list(row, "input_ids", index)
    for token in input_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RowError(
                index,
                f"input_ids holds {token!r}, but the tokenizer's ids are the integers 0 to "
                f"{vocab_size - 1}. Tokenize the row with this tokenizer.",
                "token id outside the vocabulary",
            )
    name, mask = _mask(row, input_ids, index)
    example: TokenizedExample = {"input_ids": input_ids, "response_mask": mask}
    if row.get("loss_weights") is not None:
        example["loss_weights"] = _weights(row, index)
    for column, values in ((name, mask), ("loss_weights", example.get("loss_weights", mask))):
        if len(values) != len(input_ids):
            raise RowError(
                index,
                f"input_ids has {len(input_ids)} tokens but {column} has {len(values)} entries. "
                "All lists of a row are token-aligned and have one length.",
                "lists of unequal length",
            )
    return example


def _mask(row: Mapping[str, Any], input_ids: list[int], index: int) -> tuple[str, list[int]]:
    """The column that says what is trained, and the mask it gives."""
    if row.get("response_mask") is not None or "labels" not in row:
        name = "response_mask"
        marks = _as_list(row, name, index)
        for mark in marks:
            if mark not in (0, 1):
                raise RowError(
                    index,
                    f"response_mask holds {mark!r}; a token is trained (1) or not (0). Use the "
                    "column loss_weights to say how much a token counts.",
                    "response_mask is not 0 or 1",
                )
        return name, [int(mark) for mark in marks]
    name = "labels"
    labels = _as_list(row, name, index)
    for token, label in zip(input_ids, labels, strict=False):
        if label not in (token, IGNORE_INDEX):
            raise RowError(
                index,
                f"labels holds {label!r} where input_ids holds {token}. Labels are not "
                f"shifted here: each is the token at its own position, or {IGNORE_INDEX} "
                "where the token is not trained.",
                "labels differ from input_ids",
            )
    return name, [int(label != IGNORE_INDEX) for label in labels]


def _weights(row: Mapping[str, Any], index: int) -> list[float]:
    weights = _as_list(row, "loss_weights", index)
    for weight in weights:
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise RowError(
                index,
                f"loss_weights holds {weight!r}; use finite numbers of 0 or more.",
                "loss_weights are negative or not finite",
            )
    return [float(weight) for weight in weights]


def _as_list(row: Mapping[str, Any], column: str, index: int) -> list[Any]:
    value: Any = row.get(column)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list):
        raise RowError(
            index,
            f"column {column!r} holds {type(value).__name__}, but a list of numbers is needed.",
            f"{column} is not a list",
        )
    return value
