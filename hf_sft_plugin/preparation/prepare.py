"""The whole walk over a dataset, with a ledger in which every row and every token is accounted."""

import gc
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.preparation.certificate import certify_masks, preparation_key
from hf_sft_plugin.preparation.ledger import Ledger, account_of
from hf_sft_plugin.rows.arguments import refuse_name, stored_rows
from hf_sft_plugin.rows.formats import RowFormat, detect_format
from hf_sft_plugin.tokens.eval_masks import needs_column
from hf_sft_plugin.tokens.row_tokenizer import RowTokenizer
from hf_sft_plugin.tokens.tokenization import make_options
from hf_sft_plugin.tokens.truncation import max_row_length

# The column that carries the account of a row from the tokenizing pass to the ledger.
_ACCOUNT = "_account"


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Collection[int] | None = None,
    max_dropped_share: float = 0.05,
    num_proc: int | None = None,
    eval_masks: Collection[str] = (),
    **options: Any,
) -> tuple[Dataset, Ledger]:
    """Tokenizes a dataset, marks what is trained, and accounts for every row and token.

    Args:
        dataset: Raw rows, or rows with input_ids and response_mask or labels.
        tokenizer: See `tokenize_example`.
        stop_token_ids: See `tokenize_example`.
        max_dropped_share: Largest share of rows, 0 to 1, that may be dropped before it is an error.
        num_proc: Processes that tokenize. None: one.
        eval_masks: See `MaskedSFTConfig`. A column of that name is added where it is needed.
        **options: Fields of `DataOptions`, such as `max_length` or `prompt_format`.

    Returns:
        Rows of `input_ids`, `response_mask`, and where they bring them `loss_weights` and
        `source`; and the ledger.

    Raises:
        ValueError: If columns, tokenizer or options do not fit each other, or too many rows cannot
            be trained.
        RowError: If a row is too long and `overflow` is `error`.
    """
    dataset = _require_dataset(dataset)
    data_options = make_options(options)
    row_format = detect_format(dataset.column_names, data_options, dataset.features)
    marks = needs_column(data_options, eval_masks)
    features = _features(dataset.column_names, marks)
    accounted = dataset.map(
        partial(
            _prepare_batch,
            tokenize=RowTokenizer(tokenizer, data_options, stop_token_ids, eval_masks),
            row_format=row_format,
            schema=features.arrow_schema,
        ),
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=features,
        desc="Tokenizing",
        new_fingerprint=preparation_key(dataset, tokenizer, data_options, stop_token_ids, marks),
    )
    ledger = Ledger(num_rows=len(dataset), columns=row_format.describe())
    ledger.unused_columns = row_format.unused(dataset.column_names, data_options)
    ledger.max_length = max_row_length(tokenizer, data_options.max_length)
    # Without a pad token the collator pads with the eos token.
    ledger.is_pad_eos = tokenizer.pad_token_id in (None, tokenizer.eos_token_id)
    _count(accounted, ledger)
    ledger.check(max_dropped_share)
    prepared = _without_account(accounted)
    ledger.certificate = certify_masks(prepared, tokenizer, data_options)
    return prepared, ledger


def _require_dataset(dataset: object) -> Dataset:
    """Rows that can be counted, as they are stored."""
    refuse_name(dataset, "dataset")
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "A streaming dataset cannot be counted in advance. Give it to the trainer or the "
            "collator as it is, which tokenize its rows as they come."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, but a datasets.Dataset is needed. "
            "Dataset.from_list makes one of a list of rows; of a DatasetDict give each split by "
            "itself: {name: prepare_dataset(dataset[name], tokenizer) for name in dataset}."
        )
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: it needs at least one row.")
    return stored_rows(dataset, "The dataset")


def _features(columns: Collection[str], has_masks: bool) -> Features:
    """The columns of the prepared dataset, and the account of each row."""
    return Features(
        {
            "input_ids": List(Value("int32")),
            "response_mask": List(Value("int8")),
            "loss_weights": List(Value("float32")),
            **({"eval_masks": List(Value("int8"))} if has_masks else {}),
            **({"source": Value("string")} if "source" in columns else {}),
            _ACCOUNT: Value("string"),
        }
    )


def _prepare_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    tokenize: RowTokenizer,
    row_format: RowFormat,
    schema: pa.Schema,
) -> pa.Table:
    """One batch of rows as a table; a dropped row becomes one empty row with its account."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    table: dict[str, list[Any]] = {column: [] for column in schema.names}
    with _without_garbage_collection():
        outcomes = tokenize(rows, indices, row_format)
    for outcome in outcomes:
        # The account of a row stands on its first example.
        account: str | None = json.dumps(account_of(outcome))
        examples: list[Mapping[str, Any]] = [*outcome.examples] or [{}]
        for example in examples:
            values = {**example, _ACCOUNT: account}
            for column in schema.names:
                table[column].append(values.get(column))
            account = None
    columns = [_to_arrow(table[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _to_arrow(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column; numbers are copied whole lists at a time, as they lie in memory."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    dtype = kind.value_type.to_pandas_dtype()
    parts = [np.asarray(() if value is None else value, dtype) for value in values]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    is_missing = pa.array([value is None for value in values])
    return pa.ListArray.from_arrays(offsets, np.concatenate(parts), type=kind, mask=is_missing)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """No search for cycles while very many objects are made that hold none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _count(accounted: Dataset, ledger: Ledger) -> None:
    """Reads the ledger off the columns, so that it is the same when the pass came from a cache."""
    table = accounted.data.table
    for account in table.column(_ACCOUNT).to_pylist():
        if account is not None:
            ledger.add_row(json.loads(account))
    mask = pc.list_flatten(table.column("response_mask"))
    ledger.num_response_tokens = pc.sum(mask.cast(pa.int64())).as_py() or 0
    ledger.num_context_tokens = len(mask) - ledger.num_response_tokens
    ledger.longest = pc.max(pc.list_value_length(table.column("input_ids"))).as_py() or 0


def _without_account(accounted: Dataset) -> Dataset:
    """The rows that are trained, and the columns that hold something."""
    table = accounted.data
    is_trained = pc.is_valid(table.column("input_ids")).to_numpy()
    has_weights = table.column("loss_weights").null_count < len(accounted)
    if not is_trained.all():
        accounted = accounted.select(np.flatnonzero(is_trained))
    return accounted.remove_columns([_ACCOUNT, *([] if has_weights else ["loss_weights"])])


@contextmanager
def name_in_errors(name: str) -> Iterator[None]:
    """Lets errors about rows say which dataset they speak of, unless it is the usual `train`."""
    try:
        yield
    except ValueError as error:
        if name != "train":
            # The same error, because one about a row also has its number.
            error.args = (f"{name} data: {error}",)
        raise
