"""Step 4 of the walk: examples share packed rows of a fixed length, and stay documents in them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils import data

from hf_sft_plugin.rows.arguments import one_dataset
from hf_sft_plugin.shards.dataset import ShardDataset
from hf_sft_plugin.types import PackedRow, RowError, TokenizedExample

_ROWS_AT_A_TIME = 1000


class PackedDataset(data.Dataset[PackedRow]):
    """Packed rows as a map-style dataset; rows are read when they are asked for, none is copied.

    A packed row is a list of whole rows. `DataCollatorForPromptResponse` takes it apart again, so
    that each of them stays a row to the loss, to its normalization and to the logs, sees itself
    alone, and is not predicted from another; a collator that knows nothing of packing finds no
    tokens in it.

    Args:
        rows: The rows that are packed.
        lengths: Tokens of each.
        max_length: Tokens of the longest packed row.

    Attributes:
        plan: The rows of each packed row.
    """

    def __init__(self, rows: Any, lengths: Sequence[int], max_length: int) -> None:
        self.rows, self.max_length = rows, max_length
        self.lengths = np.asarray(lengths)
        packed = best_fit_decreasing(lengths, max_length)
        self.plan = sorted(sorted(numbers) for numbers in packed)
        assert sorted(row for numbers in self.plan for row in numbers) == list(range(len(rows)))
        assert all(self.lengths[numbers].sum() <= max_length for numbers in self.plan)

    @property
    def fill_share(self) -> float:
        """Tokens over those that the packed rows have room for, 0 to 1."""
        return float(self.lengths.sum() / (len(self.plan) * self.max_length))

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> PackedRow:
        numbers = self.plan[index]
        documents = [cast(TokenizedExample, self.rows[number]) for number in numbers]
        assert [len(each["input_ids"]) for each in documents] == self.lengths[numbers].tolist()
        return {"documents": documents}

    def __str__(self) -> str:
        """What was packed, in a few words."""
        return (
            f"{len(self.lengths):,} rows in {len(self.plan):,} packed rows of up to "
            f"{self.max_length:,} tokens, {self.fill_share:.1%} filled"
        )


def pack_dataset(rows: Any, max_length: int) -> PackedDataset:
    """Puts prepared rows together into packed rows, by best fit decreasing.

    No row is split, and none is left out. The longest rows are placed first, each where it leaves
    least room; of rows that are equally long, the first in the data. The order of the packed rows
    is that of their first rows; a trainer mixes them anew in every epoch.

    Args:
        rows: As `prepare_dataset` made them, a `ShardDataset` of documents, or a list of examples.
        max_length: Tokens of the longest packed row.

    Returns:
        A dataset for `MaskedSFTTrainer`, or for any `Trainer` with `DataCollatorForPromptResponse`
        and `remove_unused_columns=False`.

    Raises:
        ValueError: If the rows are not prepared, are none, a stream, or several datasets; if
            `max_length` is no number of tokens.
        RowError: If a row is longer than `max_length`.

    Examples:
        >>> rows = [{"input_ids": [5] * n, "response_mask": [1] * n} for n in (3, 6, 2, 4)]
        >>> packed = pack_dataset(rows, max_length=8)
        >>> packed.plan, str(packed)
        ([[0, 3], [1, 2]], '4 rows in 2 packed rows of up to 8 tokens, 93.8% filled')
    """
    rows = one_dataset(rows)
    if type(max_length) is not int or max_length < 1:
        raise ValueError(
            f"max_length is {max_length!r}, but a packed row has a number of tokens, of which its "
            "rows fill as many as they can. Set it to what the memory allows, such as 2048."
        )
    if isinstance(rows, IterableDataset):
        raise ValueError(
            "A stream cannot be packed: which rows fit together is only known when the lengths of "
            "all of them are. Load it as a Dataset, or set max_tokens_per_microbatch, which puts "
            "the rows of an optimizer step together as they come."
        )
    if isinstance(rows, ShardDataset) and rows.block_size is not None:
        raise ValueError(
            f"The ShardDataset was opened in blocks of {rows.block_size} tokens, which are full "
            "already. Open it without block_size to pack its documents, or leave packing out."
        )
    lengths = _row_lengths(rows)
    if not len(lengths):
        raise ValueError("There are no rows to pack: at least one is needed.")
    longest = int(lengths.argmax())
    if lengths[longest] > max_length:
        raise RowError(
            longest,
            f"the row has {lengths[longest]} tokens, but a packed row has {max_length}, and no row "
            f"is split. Prepare the rows with max_length={max_length}, with overflow='split' to "
            "split such rows, or raise max_length.",
            "longer than a packed row",
        )
    return PackedDataset(rows, lengths.tolist(), max_length)


def best_fit_decreasing(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Distributes rows over bins of one size: longest first, each where it leaves least room.

    Args:
        lengths: Tokens of each row, at most `max_length`.
        max_length: Tokens of a bin.

    Returns:
        The rows of each bin.

    Examples:
        >>> best_fit_decreasing([3, 6, 2, 4], 8)
        [[1, 2], [3, 0]]
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    # Bit r is set where a bin has room for r more tokens.
    rooms = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_length, len(bins)
            bins.append([])
        bins[number].append(row)
        if room > length:
            by_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return bins


def unpack_rows(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows inside packed rows; others come back as they are.

    Examples:
        >>> unpack_rows([{"documents": [{"input_ids": [5]}, {"input_ids": [6]}]}])
        [{'input_ids': [5]}, {'input_ids': [6]}]
    """
    if not any(row.keys() == {"documents"} for row in rows):
        return rows
    return [document for row in rows for document in row["documents"]]


def _row_lengths(rows: Any) -> NDArray[np.int64]:
    if isinstance(rows, ShardDataset):
        return rows.row_lengths
    if isinstance(rows, Dataset):
        names: Sequence[str] = rows.column_names
    else:
        names = list(rows[0]) if len(rows) else ["input_ids"]
    if "input_ids" not in names:
        raise ValueError(
            f"The rows have the columns {', '.join(names)}, but no input_ids, so nobody knows how "
            "long they are. Prepare them with prepare_dataset before they are packed."
        )
    if not isinstance(rows, Dataset):
        return np.array([len(rows[number]["input_ids"]) for number in range(len(rows))], dtype=int)
    tables = rows.select_columns("input_ids").with_format("arrow").iter(_ROWS_AT_A_TIME)
    lengths = [pc.list_value_length(table.column("input_ids")).to_numpy() for table in tables]
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths]).astype(np.int64)
