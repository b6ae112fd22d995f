"""Step 5 of the walk: examples become one right-padded batch."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.batches.packing import unpack_rows
from hf_sft_plugin.rows.arguments import require_row, require_tokenizer
from hf_sft_plugin.rows.formats import detect_format
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows
from hf_sft_plugin.tokens.tokenized_rows import check_tokenized_row
from hf_sft_plugin.tokens.truncation import max_row_length
from hf_sft_plugin.types import (
    IGNORE_INDEX,
    DataOptions,
    RowError,
    TokenizedExample,
    visible_lines,
)

logger = logging.getLogger(__name__)

# The reason under which the walk drops a row that marks no token.
_NOTHING_TRAINED = "no trained token"
# The columns of every row that was prepared.
_PREPARED = ("input_ids", "response_mask")


class DataCollatorForPromptResponse:
    """Pads rows of prompts and responses into a batch in which only responses carry labels.

    Works in any `transformers.Trainer` and in a hand-written loop. Rows may be raw (they are
    tokenized on the fly) or come tokenized, as from `prepare_dataset` (they are checked, and cut
    to `max_length`). Masks go by position, never by token id, so a pad token that is also the eos
    token is harmless.

    Args:
        tokenizer: Gives the pad token (the eos token where it has none), and tokenizes raw rows.
        pad_to_multiple_of: Rounds S up to a multiple of this, unless rows are packed: these are not
            for padding, and a trainer rounds up what is left without it.
        return_response_mask: False leaves `response_mask` out of the batch, for models that refuse
            inputs they do not know.
        stop_token_ids: See `tokenize_example`.
        **options: Fields of `DataOptions`, such as `max_length` or `prompt_format`.

    Raises:
        ValueError: If the tokenizer has neither a pad nor an eos token.

    Examples:
        Two rows of 4 and 3 tokens, of which 2 and 1 are trained:

        >>> collator = DataCollatorForPromptResponse(tokenizer)
        >>> batch = collator([
        ...     {"input_ids": [5, 6, 7, 2], "response_mask": [0, 0, 1, 1]},
        ...     {"input_ids": [5, 6, 2], "response_mask": [0, 0, 1]},
        ... ])
        >>> batch["input_ids"]
        tensor([[5, 6, 7, 2],
                [5, 6, 2, 0]])
        >>> batch["attention_mask"]
        tensor([[1, 1, 1, 1],
                [1, 1, 1, 0]])
        >>> batch["labels"]
        tensor([[-100, -100,    7,    2],
                [-100, -100,    2, -100]])
        >>> batch["response_mask"]
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 0]])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_to_multiple_of: int | None = None,
        return_response_mask: bool = True,
        stop_token_ids: Collection[int] | None = None,
        **options: Any,
    ) -> None:
        require_tokenizer(tokenizer)
        pad_token_id = tokenizer.pad_token_id
        if pad_token_id is None:
            pad_token_id = tokenizer.eos_token_id
        if pad_token_id is None:
            raise ValueError(
                "The tokenizer has neither a pad nor an eos token, so rows cannot be padded. Set "
                "tokenizer.pad_token."
            )
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.return_response_mask = return_response_mask
        self.stop_token_ids = stop_token_ids
        self.options = make_options(options)
        self._has_warned = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Builds one batch.

        Args:
            rows: Raw rows, tokenized examples, or packed rows of these.

        Returns:
            `input_ids`, `attention_mask`, `labels` and `response_mask`, int64 of shape `(B, S)`,
            and `loss_weights`, float32 of the same shape, and `eval_masks`, int64, where the rows
            carry them. B exceeds the number of rows where the chat template rewrites earlier
            turns, and where they are packed.

        Raises:
            RowError: If a row cannot be trained; its number is the position in `rows`.
            ValueError: If there are no rows, or they are written in different ways.
        """
        if isinstance(rows, Mapping):
            raise ValueError(
                "The batch is one dict of columns, but the collator takes a list of rows, one dict "
                "for each."
            )
        if not rows:
            raise ValueError("There are no rows to collate: a batch needs at least one.")
        for position, given in enumerate(rows):
            require_row(given, f"Row {position} of the batch")
        try:
            examples = self._tokenized(unpacked := unpack_rows(rows))
        except RowError as error:
            # The same error; its number is one of this batch, not of a dataset.
            error.args = (visible_lines(f"Row {error.row} of the batch: {error.problem}"),)
            raise
        length = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of and unpacked is rows:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        # Filled as arrays: a tensor takes a list of numbers several times as slowly.
        shape = (len(examples), length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention_mask, response_mask = np.zeros((2, *shape), dtype=np.int64)
        loss_weights = np.ones(shape, dtype=np.float32)
        for row, example in enumerate(examples):
            end = len(example["input_ids"])
            input_ids[row, :end] = example["input_ids"]
            attention_mask[row, :end] = 1
            response_mask[row, :end] = example["response_mask"]
            if "loss_weights" in example:
                loss_weights[row, :end] = example["loss_weights"]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(np.where(response_mask == 1, input_ids, IGNORE_INDEX)),
        }
        if self.return_response_mask:
            batch["response_mask"] = torch.from_numpy(response_mask)
        if any("loss_weights" in example for example in examples):
            batch["loss_weights"] = torch.from_numpy(
                loss_weights * response_mask.astype(np.float32)
            )
        if all("eval_masks" in example for example in examples):
            batch["eval_masks"] = _pad([example["eval_masks"] for example in examples], length)
        return batch

    def _tokenized(self, rows: Sequence[Mapping[str, Any]]) -> list[TokenizedExample]:
        options = self.options
        is_prepared = all(row.get(name) is not None for row in rows for name in _PREPARED)
        if is_prepared:
            # The options name the columns that the rows had before they were prepared.
            options = replace(
                options,
                data_format="tokenized",
                prompt_column=None,
                response_column=None,
                messages_column=None,
            )
        _require_one_format(rows, options)
        checked = self._checked(rows) if is_prepared else None
        if checked is not None:
            return checked
        outcomes = tokenize_rows(
            rows, range(len(rows)), self.tokenizer, options, self.stop_token_ids
        )
        examples: list[TokenizedExample] = []
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.error is not None:
                examples.append(self._context_only(row, outcome.error))
            examples += outcome.examples
        return examples

    def _checked(self, rows: Sequence[Mapping[str, Any]]) -> list[TokenizedExample] | None:
        """Prepared rows as they are; None if one has to be cut or trains nothing."""
        if self.options.trained_mask == "all":
            return None
        limit = max_row_length(self.tokenizer, self.options.max_length)
        ignored = self.options.ignored_columns or ()
        examples: list[TokenizedExample] = []
        for number, row in enumerate(rows):
            seen = {name: value for name, value in row.items() if name not in ignored}
            example = check_tokenized_row(seen, number, len(self.tokenizer))
            # Nothing comes before the first token, so nothing predicts it.
            for marks in (example["response_mask"], example.get("eval_masks", [])):
                marks[0:1] = [0] * len(marks[0:1])
            is_long = limit is not None and len(example["input_ids"]) > limit
            if is_long or not any(example["response_mask"]):
                return None
            examples.append(example)
        return examples

    def _context_only(self, row: Mapping[str, Any], error: RowError) -> TokenizedExample:
        """A tokenized row that trains nothing, such as a block cut out of the middle of a prompt.

        Its zero keeps the batch whole, where dropping the row would change the size of it.
        """
        if error.reason != _NOTHING_TRAINED or not len(row.get("input_ids", ())):
            raise error
        example = check_tokenized_row(row, error.row, len(self.tokenizer))
        example["response_mask"] = [0] * len(example["input_ids"])
        if not example["input_ids"]:
            raise error
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Row %d of a batch has no trained token. It is read and adds nothing to the loss, "
                "and so are others like it; prepare_dataset drops and counts them.",
                error.row,
            )
        return example


def _pad(rows: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


def _require_one_format(rows: Sequence[Mapping[str, Any]], options: DataOptions) -> None:
    """The first row decides how all are read, so the others must be written as it is.

    Columns that a row may go without, such as `loss_weights`, and those that are not read at all
    may differ.
    """
    first = rows[0].keys()
    for index, row in enumerate(rows):
        if row.keys() == first or _are_one_format(first, row.keys(), options):
            continue
        ours, theirs = (", ".join(sorted(map(str, keys))) for keys in (first, row.keys()))
        raise ValueError(
            f"Row 0 of the batch has the columns {ours}, but row {index} has {theirs}. The rows of "
            "one batch are read alike, by the same columns. Bring the datasets into one format "
            "before they are mixed."
        )


def _are_one_format(first: Collection[str], other: Collection[str], options: DataOptions) -> bool:
    expected = detect_format(first, options)
    try:
        found = detect_format(other, options)
    except ValueError:
        return False
    is_same = all(found.column(part) == column for column, part in expected.columns)
    return found.kind == expected.kind and is_same
