"""The whole walk over a dataset, with a ledger in which every row and every token is accounted."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.data.conversation import detect_format
from hf_sft_plugin.data.tokenization import make_options, max_row_length, tokenize_rows
from hf_sft_plugin.types import DataOptions, TokenizedExample

# Columns that carry the account of a row from the tokenizing pass to the ledger.
_ACCOUNT = {
    "_row": Value("int64"),
    "_num_tokens": Value("int64"),
    "_num_lost": Value("int64"),
    "_reason": Value("string"),
    "_problem": Value("string"),
}
_NUM_NAMED_ROWS = 5


@dataclass
class Drop:
    """Rows dropped for one reason.

    Attributes:
        num_rows: How many.
        num_tokens: Tokens they had; 0 for rows that were never tokenized.
        first_rows: Positions of the first few in the dataset.
        example: What is wrong with the first, and the cure.
    """

    num_rows: int
    num_tokens: int
    first_rows: list[int]
    example: str


@dataclass
class Ledger:
    """What became of every row and every token of a dataset.

    Attributes:
        num_rows: Rows in.
        num_rows_trained: Rows with at least one trained token.
        num_examples: Examples made of them; more than rows where conversations were split.
        num_rows_truncated: Trained rows that were cut to `max_length`.
        num_tokens: Tokens in, before truncation.
        num_response_tokens: Tokens trained.
        num_context_tokens: Tokens read but not trained.
        num_truncated_tokens: Tokens cut off trained rows.
        longest: Tokens of the longest example.
        max_length: The limit that was applied, in tokens; None without one.
        drops: Dropped rows by reason.
    """

    num_rows: int
    num_rows_trained: int = 0
    num_examples: int = 0
    num_rows_truncated: int = 0
    num_tokens: int = 0
    num_response_tokens: int = 0
    num_context_tokens: int = 0
    num_truncated_tokens: int = 0
    longest: int = 0
    max_length: int | None = None
    drops: dict[str, Drop] = field(default_factory=dict)

    @property
    def num_rows_dropped(self) -> int:
        """Rows that are not trained."""
        return sum(drop.num_rows for drop in self.drops.values())

    @property
    def trained_share(self) -> float:
        """Trained tokens over tokens read, 0 to 1."""
        return self.num_response_tokens / max(self.num_response_tokens + self.num_context_tokens, 1)

    def check(self, max_dropped_share: float) -> None:
        """Stops a run whose data does not add up, or of which too much would be missing.

        Args:
            max_dropped_share: Largest share of rows, 0 to 1, that may be dropped.

        Raises:
            ValueError: If more rows are dropped, or none is left.
        """
        lost = sum(drop.num_tokens for drop in self.drops.values()) + self.num_truncated_tokens
        kept = self.num_response_tokens + self.num_context_tokens
        assert self.num_rows == self.num_rows_trained + self.num_rows_dropped, self
        assert self.num_tokens == kept + lost, self
        if self.num_rows_trained and self.num_rows_dropped <= max_dropped_share * self.num_rows:
            return
        problems = "\n".join(
            f"- {drop.num_rows:,} rows, {reason}: {drop.example}"
            for reason, drop in self.drops.items()
        )
        raise ValueError(
            f"{self.num_rows_dropped:,} of {self.num_rows:,} rows cannot be trained"
            + ("" if self.num_rows_trained else ", so nothing is left")
            + f":\n{problems}\nRepair or remove these rows"
            + (
                f", or allow more than {max_dropped_share:.0%} of them to be dropped with "
                "max_dropped_share."
                if self.num_rows_trained
                else "."
            )
        )

    def __str__(self) -> str:
        """The account as lines of text that add up."""
        lines = [
            f"rows    {self.num_rows:,} in = {self.num_rows_trained:,} trained "
            f"({self.num_rows_truncated:,} truncated) + {self.num_rows_dropped:,} dropped",
        ]
        for reason, drop in self.drops.items():
            rows = ", ".join(map(str, drop.first_rows))
            more = ", ..." if drop.num_rows > len(drop.first_rows) else ""
            lines.append(f"        dropped {drop.num_rows:,}: {reason} (rows {rows}{more})")
        if self.num_examples != self.num_rows_trained:
            lines.append(f"        split into {self.num_examples:,} examples, one per response")
        dropped_tokens = sum(drop.num_tokens for drop in self.drops.values())
        lines.append(
            f"tokens  {self.num_tokens:,} in = {self.num_response_tokens:,} trained + "
            f"{self.num_context_tokens:,} context\n"
            f"        + {self.num_truncated_tokens:,} truncated + {dropped_tokens:,} dropped"
        )
        limit = "no limit" if self.max_length is None else f"limit {self.max_length:,}"
        lines.append(
            f"        {self.trained_share:.1%} of the tokens read are trained; longest row "
            f"{self.longest:,}, {limit}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The account as plain values."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Writes the account as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Collection[int] | None = None,
    max_dropped_share: float = 0.05,
    num_proc: int | None = None,
    **options: Any,
) -> tuple[Dataset, Ledger]:
    """Tokenizes a dataset, marks what is trained, and accounts for every row and token.

    Args:
        dataset: Raw rows (prompt and response, prompt and completion, or messages), or rows with
            input_ids and response_mask or labels.
        tokenizer: See `tokenize_example`.
        stop_token_ids: See `tokenize_example`.
        max_dropped_share: Largest share of rows, 0 to 1, that may be dropped before it is an error.
        num_proc: Processes that tokenize. None: one.
        **options: Fields of `DataOptions`, such as `max_length` or `prompt_format`.

    Returns:
        A dataset with the columns `input_ids` and `response_mask`, and `loss_weights` and `source`
        where the rows bring them; and its ledger.

    Raises:
        ValueError: If columns, tokenizer or options do not fit each other, if the dataset is
            empty, or if too many rows cannot be trained.
        RowError: If a row is too long and `overflow` is `error`.
    """
    _require_dataset(dataset)
    data_options = make_options(options)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: it needs at least one row.")
    detect_format(dataset.column_names, data_options)
    features = _features(dataset.column_names)
    accounted = dataset.with_format(None).map(
        partial(
            _prepare_batch,
            tokenizer=tokenizer,
            options=data_options,
            stop_token_ids=stop_token_ids,
            columns=list(features),
        ),
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=features,
        desc="Tokenizing",
    )
    ledger = _count(accounted, num_rows=len(dataset))
    ledger.max_length = max_row_length(tokenizer, data_options.max_length)
    ledger.check(max_dropped_share)
    if ledger.drops:
        kept = pc.is_null(accounted.data.column("_reason")).to_numpy()
        accounted = accounted.select(np.flatnonzero(kept))
    return accounted.remove_columns(list(_ACCOUNT)), ledger


def _require_dataset(dataset: object) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "A streaming dataset cannot be counted in advance. Give it to the trainer or the "
            "collator as it is, which tokenize its rows as they come."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, but a datasets.Dataset is needed. "
            "Dataset.from_list makes one of a list of rows; of a DatasetDict take one split, such "
            "as dataset['train']."
        )


def _features(columns: Collection[str]) -> Features:
    """The columns of the prepared dataset, and the account of each row."""
    return Features(
        {
            "input_ids": List(Value("int32")),
            "response_mask": List(Value("int8")),
            **({"loss_weights": List(Value("float32"))} if "loss_weights" in columns else {}),
            **({"source": Value("string")} if "source" in columns else {}),
            **_ACCOUNT,
        }
    )


def _prepare_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    stop_token_ids: Collection[int] | None,
    columns: Sequence[str],
) -> dict[str, list[Any]]:
    """One batch of rows as columns; a dropped row becomes one empty row with its reason."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    table: dict[str, list[Any]] = {column: [] for column in columns}
    for outcome in tokenize_rows(rows, indices, tokenizer, options, stop_token_ids):
        empty: TokenizedExample = {"input_ids": [], "response_mask": []}
        for position, example in enumerate(outcome.examples or [empty]):
            # The account of a row stands on its first example, so that sums count it once.
            first = position == 0
            account = {
                "_row": outcome.row,
                "_num_tokens": outcome.num_tokens if first else 0,
                "_num_lost": outcome.num_lost if first else 0,
                "_reason": outcome.error.reason if outcome.error else None,
                "_problem": str(outcome.error) if outcome.error else None,
            }
            values = {**example, **account}
            for column in columns:
                table[column].append(values.get(column))
    return table


def _count(accounted: Dataset, num_rows: int) -> Ledger:
    """Reads the ledger off the columns, so that it is the same when the pass came from a cache."""
    table = accounted.data.table
    rows = table.column("_row").to_numpy()
    tokens = table.column("_num_tokens").to_numpy()
    lost = table.column("_num_lost").to_numpy()
    reasons = table.column("_reason").to_pylist()
    lengths = pc.list_value_length(table.column("input_ids"))
    mask = pc.list_flatten(table.column("response_mask"))
    is_trained = np.array([reason is None for reason in reasons], dtype=bool)
    ledger = Ledger(
        num_rows=num_rows,
        num_rows_trained=len(np.unique(rows[is_trained])),
        num_examples=int(is_trained.sum()),
        num_rows_truncated=int((lost[is_trained] > 0).sum()),
        num_tokens=int(tokens.sum()),
        num_response_tokens=pc.sum(mask.cast(pa.int64())).as_py() or 0,
        num_truncated_tokens=int(lost[is_trained].sum()),
        longest=pc.max(lengths).as_py() or 0,
    )
    ledger.num_context_tokens = len(mask) - ledger.num_response_tokens
    for position in np.flatnonzero(~is_trained):
        reason = reasons[position]
        if reason not in ledger.drops:
            ledger.drops[reason] = Drop(0, 0, [], table.column("_problem")[position].as_py())
        drop = ledger.drops[reason]
        drop.num_rows += 1
        drop.num_tokens += int(tokens[position])
        if len(drop.first_rows) < _NUM_NAMED_ROWS:
            drop.first_rows.append(int(rows[position]))
    return ledger
