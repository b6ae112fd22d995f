"""The walk over a stream: rows are tokenized as they come, and counted as far as they came."""

import logging
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.preparation.ledger import Ledger, account_of
from hf_sft_plugin.preparation.prepare import name_in_errors
from hf_sft_plugin.rows.formats import RowFormat, detect_format
from hf_sft_plugin.tokens.eval_masks import needs_column
from hf_sft_plugin.tokens.row_tokenizer import RowTokenizer
from hf_sft_plugin.tokens.tokenization import make_options, with_lists

logger = logging.getLogger(__name__)

# A share of fewer rows than this says little.
_NUM_ROWS_FOR_SHARE = 200
_NUM_NAMED_ROWS = 5
_COLUMNS = ("input_ids", "response_mask", "loss_weights", "source")
_STAND_IN = tuple(zip(_COLUMNS, ([0, 0], [0, 1], None, None), strict=True))


def prepare_stream(
    dataset: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Collection[int] | None = None,
    max_dropped_share: float = 0.05,
    name: str = "train",
    eval_masks: Collection[str] = (),
    **options: Any,
) -> IterableDataset:
    """Tokenizes a stream and marks what is trained, as `prepare_dataset` does for a dataset.

    The rows of a stream are not known in advance. So a row that cannot be trained is left out with
    a warning that names it, and the stream stops once too many of the rows so far were left out.

    Args:
        dataset: Raw or tokenized rows.
        tokenizer: See `tokenize_example`.
        stop_token_ids: See `tokenize_example`.
        max_dropped_share: Largest share of the rows so far, 0 to 1, that may be dropped.
        name: What messages call the stream.
        eval_masks: See `prepare_dataset`.
        **options: Fields of `DataOptions`.

    Returns:
        A stream with `input_ids`, `response_mask`, `loss_weights` and `source`, the latter two
        None where a row does not bring them, and `eval_masks` where it is needed.

    Raises:
        ValueError: If columns or options do not fit each other or the stream is empty; while it is
            read, if too many rows cannot be trained.
    """
    if not isinstance(dataset, IterableDataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, but a datasets.IterableDataset is needed: of "
            "several streams one, such as dataset['train']. A Dataset goes to prepare_dataset, "
            "which counts its rows in advance."
        )
    data_options = make_options(options)
    # A format such as "torch" converts each row; here rows are read as they are stored.
    dataset = dataset.with_format(None)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not columns:
        raise ValueError("The stream is empty: it needs at least one row.")
    row_format = detect_format(columns, data_options, dataset.features)
    tokenize = RowTokenizer(tokenizer, data_options, stop_token_ids, eval_masks)
    marks = ("eval_masks",) if needs_column(data_options, eval_masks) else ()
    made = (*_COLUMNS, *marks)
    preparer = StreamPreparer(tokenize, row_format, max_dropped_share, name, made)
    stream: Any = dataset.map(
        preparer, batched=True, batch_size=64, with_indices=True, remove_columns=columns
    )
    stream.preparer = preparer
    return stream


class StreamPreparer:
    """Tokenizes one batch after the other, and keeps the account of this process.

    Attributes:
        num_examples: What became of each batch of rows of this pass over the stream.
    """

    def __init__(
        self,
        tokenize: RowTokenizer,
        row_format: RowFormat,
        max_dropped_share: float,
        name: str,
        columns: Sequence[str],
    ) -> None:
        self._tokenize = tokenize
        self._row_format = row_format
        self._max_dropped_share = max_dropped_share
        self._name = name
        self._columns = columns
        self._ledger = Ledger(num_rows=0)
        self.num_examples: list[int] = []
        self._num_known: list[int] = []
        self._num_known_next: list[int] = []

    def skip(self, num_examples: Sequence[int], count: int) -> None:
        """Spares the next pass the tokens of examples that will be thrown away.

        Stand-ins come in their place. What was dropped among them is not counted again.

        Args:
            num_examples: As an earlier pass over the same rows had them.
            count: How many examples will be thrown away.
        """
        ends = list(accumulate(num_examples))
        self._num_known_next = list(num_examples[: bisect_right(ends, count)])

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        """Tokenizes a batch of columns, or gives stand-ins for its examples; see `skip`."""
        if indices[0] == 0:
            self.num_examples, self._num_known = [], self._num_known_next
            self._num_known_next = []
        number = len(self.num_examples)
        if number < len(self._num_known):
            self.num_examples.append(self._num_known[number])
            return {column: [value] * self._num_known[number] for column, value in _STAND_IN}
        values = zip(*batch.values(), strict=True)
        rows = [dict(zip(batch, row, strict=True)) for row in values]
        table: dict[str, list[Any]] = {column: [] for column in self._columns}
        with name_in_errors(self._name):
            outcomes = self._tokenize(rows, indices, self._row_format)
        for outcome in outcomes:
            account = account_of(outcome)
            new = [each for each in account.get("remarks", ()) if each not in self._ledger.remarks]
            for remark in new if outcome.error is None else ():
                logger.warning(
                    "The %s stream, row %d and maybe more: %s.", self._name, outcome.row, remark
                )
            self._ledger.num_rows += 1
            self._ledger.add_row(account)
            if outcome.error is not None and self._ledger.num_rows_dropped <= _NUM_NAMED_ROWS:
                logger.warning("A row of the %s stream is left out. %s", self._name, outcome.error)
            for example in with_lists(outcome).examples:
                for column in self._columns:
                    table[column].append(example.get(column))
        if self._ledger.num_rows >= _NUM_ROWS_FOR_SHARE:
            with name_in_errors(self._name):
                self._ledger.check_share(self._max_dropped_share)
        self.num_examples.append(len(table["input_ids"]))
        return table
