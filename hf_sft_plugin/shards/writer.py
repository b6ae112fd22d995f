"""Writes token and mask files so that a folder holds the old set or the new one, never a mix."""

import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.rows.arguments import stored_rows
from hf_sft_plugin.rows.files import METADATA
from hf_sft_plugin.shards.shard_set import (
    COLUMNS,
    FORMAT,
    FORMAT_VERSION,
    SOURCE_DTYPE,
    SOURCES,
    TOKENIZER,
    Shard,
    ShardFile,
    ShardSet,
    ShardSources,
    impossible,
    num_token_ids,
    possible_values,
    read_metadata,
    vocab_digest,
)
from hf_sft_plugin.types import RowError

logger = logging.getLogger(__name__)

_BATCH_SIZE = 1000
# Of Linux, <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_shards(
    folder: str | Path,
    splits: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ledgers: Mapping[str, Any] | None = None,
    certificates: Mapping[str, Any] | None = None,
    max_tokens_per_shard: int = 2**28,
    overwrite: bool = False,
) -> ShardSet:
    """Writes prepared rows as token and mask files, with their tokenizer, all or nothing.

    For each split the folder gets `shard_000.bin` (token ids, uint32), `shard_000_mask.bin` (uint8,
    1 where a token is trained) and, where rows carry weights, `shard_000_weights.bin` (float16,
    which keeps 3 digits), all little endian and token-aligned, and where rows have a `source` one
    `sources.bin` (uint32, for each document the place of its source among the names in the
    metadata); beside the splits `tokenizer/`, and `dataset_metadata.json` with the counts, the
    length of each document and the SHA-256 of each file. All of it is built next to its place and
    put there in one step, so that an interrupted run leaves what was there before. Rows without
    `response_mask` are trained whole.

    Args:
        folder: Where the set will be.
        splits: Prepared rows by split, usually `train` and `val`.
        tokenizer: The one that the rows were prepared with.
        ledgers: What `prepare_dataset` accounted, by split; kept in the metadata.
        certificates: What was proven of the masks, by split: dataclasses or plain values. None:
            what the ledgers carry.
        max_tokens_per_shard: A shard ends before it has more tokens than this.
        overwrite: Whether a shard set that is already there is replaced.

    Returns:
        What was written.

    Raises:
        ValueError: If the folder holds what may not be replaced, or a split has nothing to train.
        RowError: If a row is empty, or its ids, mask or weights are impossible.
    """
    target = Path(folder).resolve()
    check_shard_destination(target, overwrite=overwrite)
    splits = _checked_splits(splits)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    vocab_size = num_token_ids(tokenizer)
    try:
        shards = {
            name: tuple(_write_split(partial, name, rows, vocab_size, max_tokens_per_shard))
            for name, rows in splits.items()
        }
        files = _save_tokenizer(partial, tokenizer)
        shard_set = ShardSet(
            *(partial, vocab_size, vocab_digest(tokenizer), files, shards),
            *_accounts(splits, ledgers or {}, certificates or {}),
            {name: _write_sources(partial, name, rows) for name, rows in splits.items()},
        )
        _write_metadata(shard_set)
        _put_in_place(partial, target, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dataclasses.replace(shard_set, folder=Path(folder))


def check_shard_destination(folder: str | Path, *, overwrite: bool) -> None:
    """Checks, before long work begins, that a shard set may be written to a folder.

    Args:
        folder: Where the set will be.
        overwrite: Whether a shard set that is already there may be replaced.

    Raises:
        ValueError: If the folder holds a shard set that may not be replaced, or anything else.
    """
    folder = Path(folder).resolve()
    start, end = f".{folder.name}.", ".partial"
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if path.name.startswith(start) and path.name.endswith(end):
            logger.warning("%s was left by a run that was killed, or is being written.", path)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        own = {METADATA, TOKENIZER, *read_metadata(folder).splits}
    except ValueError as error:
        raise ValueError(
            f"{folder} exists and is no shard set, so it is not overwritten: {error} Name another "
            "folder, or remove this one yourself."
        ) from None
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if others:
        raise ValueError(
            f"{folder} holds {others[0]!r} beside its shards, which would be lost. Move it away, "
            "or name another folder."
        )
    if not overwrite:
        raise ValueError(
            f"{folder} already holds a shard set. Replace it with overwrite=True (--overwrite), or "
            "name another folder."
        )


def _checked_splits(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The rows of each split as they are stored; raises where names or columns do not fit."""
    if not isinstance(splits, Mapping) or not all(isinstance(r, Dataset) for r in splits.values()):
        raise ValueError(
            "splits must be prepared datasets by name, such as {'train': dataset}, where each is a "
            "datasets.Dataset that prepare_dataset made."
        )
    if not splits:
        raise ValueError("There are no splits to write: give at least {'train': dataset}.")
    for name, rows in splits.items():
        if name == TOKENIZER or not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
            raise ValueError(f"A split cannot be called {name!r}; usual names are train and val.")
        if "input_ids" not in rows.column_names:
            raise ValueError(
                f"Split {name!r} has the columns {', '.join(rows.column_names)}, but no input_ids. "
                "Prepare its rows with prepare_dataset first."
            )
    return {name: stored_rows(rows, f"Split {name!r}", False) for name, rows in splits.items()}


def _write_split(
    folder: Path, split: str, rows: Dataset, vocab_size: int, max_tokens: int
) -> Iterator[Shard]:
    """Writes the shards of a split, one after the other."""
    (folder / split).mkdir(parents=True)
    names = [name for name in COLUMNS if name in rows.column_names]
    rows = rows.select_columns(names).with_format("arrow")
    batches = rows.select_columns(["input_ids"]).iter(_BATCH_SIZE)
    lengths = np.concatenate(
        [np.zeros(0, np.int64), *(_lengths(batch["input_ids"]) for batch in batches)]
    )
    if not lengths.all():
        raise RowError(int(lengths.argmin()), "it has no tokens; remove it.", "no tokens")
    for number, documents in enumerate(_cut(lengths, max_tokens)):
        files = {}
        for name in names:
            path = folder / split / f"shard_{number:03d}{COLUMNS[name].suffix}"
            _write_column(path, rows, name, lengths, documents, vocab_size)
            files[name] = _digest(folder, path)
        own = lengths[documents.start : documents.stop]
        num_tokens = num_response_tokens = int(own.sum())
        if "response_mask" in files:
            mask = np.memmap(folder / files["response_mask"].path, np.uint8, mode="r")
            num_response_tokens = int(np.count_nonzero(mask))
        yield Shard(num_tokens, num_response_tokens, own.tolist(), files)


def _cut(lengths: np.ndarray, max_tokens: int) -> Iterator[range]:
    """Runs of documents of at most `max_tokens` tokens; a longer document is alone in its run."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        limit = ends[start] - lengths[start] + max_tokens
        end = max(int(np.searchsorted(ends, limit, side="right")), start + 1)
        yield range(start, end)
        start = end


def _write_column(
    path: Path,
    rows: Dataset,
    name: str,
    lengths: np.ndarray,
    documents: range,
    vocab_size: int,
) -> None:
    """Writes one column of some documents, every entry of it checked."""
    column = COLUMNS[name]
    part = rows.select_columns([name]).select(documents)
    with path.open("xb") as stream:
        for number, batch in enumerate(part.iter(_BATCH_SIZE)):
            first = documents.start + number * _BATCH_SIZE
            own = lengths[first : first + batch.num_rows]
            lists = batch[name].combine_chunks()
            values = pc.list_flatten(lists).to_numpy(zero_copy_only=False)
            given = _lengths(lists)
            if name == "loss_weights":
                # A row without weights among rows with weights: each of its tokens counts 1.
                is_given = pc.is_valid(lists).to_numpy(zero_copy_only=False)
                given = np.where(is_given, given, own)
                values = _fill(values, np.repeat(is_given, given))
            for row in np.flatnonzero(given != own)[:1]:
                raise RowError(
                    first + int(row),
                    f"input_ids has {own[row]} tokens but {name} has {given[row]} entries. All "
                    "lists of a row are token-aligned and have one length.",
                    "lists of unequal length",
                )
            with np.errstate(over="ignore", invalid="ignore"):
                stored = values.astype(column.dtype)
            bad = impossible(name, values, vocab_size) | impossible(name, stored, vocab_size)
            bad |= (stored == 0) != (values == 0)
            for position in np.flatnonzero(bad)[:1]:
                row = int(np.searchsorted(np.cumsum(own), position, side="right"))
                raise RowError(
                    first + row,
                    f"{name} holds {values[position]}, but {possible_values(name, vocab_size)}.",
                    f"impossible {name}",
                )
            stream.write(stored.tobytes())


def _write_sources(folder: Path, split: str, rows: Dataset) -> ShardSources | None:
    """Writes where each document came from, where the rows say so."""
    if "source" not in rows.column_names:
        return None
    places: dict[str | None, int] = {}
    path = folder / split / SOURCES
    with path.open("xb") as stream:
        for batch in rows.select_columns(["source"]).with_format("arrow").iter(_BATCH_SIZE):
            names = (None if s is None else str(s) for s in batch["source"].to_pylist())
            numbers = [places.setdefault(name, len(places)) for name in names]
            stream.write(np.array(numbers, SOURCE_DTYPE).tobytes())
    return ShardSources(list(places), _digest(folder, path))


def _lengths(lists: pa.Array) -> np.ndarray:
    """Entries of each list; 0 where there is none."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)


def _fill(values: np.ndarray, is_given: np.ndarray) -> np.ndarray:
    filled = np.ones(len(is_given), np.float64)
    filled[is_given] = values
    return filled


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[ShardFile, ...]:
    tokenizer.save_pretrained(folder / TOKENIZER)
    paths = sorted(path for path in (folder / TOKENIZER).rglob("*") if path.is_file())
    return tuple(_digest(folder, path) for path in paths)


def _digest(folder: Path, path: Path) -> ShardFile:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return ShardFile(path.relative_to(folder).as_posix(), digest)


def _write_metadata(shard_set: ShardSet) -> None:
    """Writes what the set holds as JSON that people can read: one line for each list of numbers."""
    splits = {}
    for name, shards in shard_set.splits.items():
        counts = shard_set.counts(name)
        if counts.num_response_tokens == 0:
            raise ValueError(
                f"No token of split {name!r} is trained: it has {counts.num_documents:,} rows, and "
                "their masks are all zero."
            )
        sources = shard_set.sources[name]
        splits[name] = {
            **dataclasses.asdict(counts),
            "trained_share": counts.trained_share,
            "sources": None if sources is None else dataclasses.asdict(sources),
            "ledger": shard_set.ledgers[name],
            "certificate": shard_set.certificates[name],
            "shards": [dataclasses.asdict(shard) for shard in shards],
        }
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtypes": {
            **{name: column.dtype.str for name, column in COLUMNS.items()},
            "source": SOURCE_DTYPE.str,
        },
        "tokenizer": {
            "vocab_size": shard_set.vocab_size,
            "digest": shard_set.vocab_digest,
            "files": [dataclasses.asdict(file) for file in shard_set.tokenizer_files],
        },
        "splits": splits,
    }
    text = json.dumps(record, indent=2)
    text = re.sub(r"\[[\d,\s]+\]", lambda match: " ".join(match[0].split()), text)
    (shard_set.folder / METADATA).write_text(text + "\n", encoding="utf-8")


def _accounts(
    splits: Mapping[str, Any], ledgers: Mapping[str, Any], certificates: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ledgers and certificates as plain values; a ledger may carry the certificate."""
    accounts = {name: _plain(ledgers.get(name)) for name in splits}
    proofs = {name: _plain(certificates.get(name)) for name in splits}
    for name, account in accounts.items():
        if isinstance(account, dict) and account.get("certificate") and proofs[name] is None:
            proofs[name] = account["certificate"]
            accounts[name] = {key: v for key, v in account.items() if key != "certificate"}
    return accounts, proofs


def _plain(value: Any) -> Any:
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else value


def _put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Gives a finished folder its name in one step, once all of it is on the disk."""
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    if overwrite and target.exists():
        if not _exchange(partial, target):
            # No such call here: two steps, between which the old set lies beside its place.
            aside = partial.with_suffix(".old")
            os.rename(target, aside)
            try:
                os.rename(partial, target)
            except BaseException:
                os.rename(aside, target)
                raise
            os.rename(aside, partial)
    else:
        os.rename(partial, target)
    _flush(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Lets two folders change places in one step; False where the system has no such call."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return bool(rename(*paths, _RENAME_EXCHANGE) == 0)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
