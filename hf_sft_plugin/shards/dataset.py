"""Prepared rows as files that are mapped into memory: opened at once, read in place, verified."""

import hashlib
import logging
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils import data
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_sft_plugin.rows.files import METADATA
from hf_sft_plugin.shards.shard_set import (
    COLUMNS,
    TOKENIZER,
    ShardFile,
    ShardSet,
    check_files,
    impossible,
    possible_values,
    read_metadata,
    read_sources,
    vocab_digest,
)
from hf_sft_plugin.types import TokenizedExample

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**22
_PEEK_BYTES = 2**16
_USUAL_SHARES = (0.1, 0.9)


class ShardDataset(data.Dataset[TokenizedExample]):
    """A split of a shard set as a map-style dataset of examples, none of which is held in memory.

    Opening checks that all files are there and have the right sizes, and reads only the metadata,
    the sources and the masks as far as their first trained token; `verify_shards` reads the rest.
    Goes into a `DataLoader` with workers, into `MaskedSFTTrainer`, and with
    `DataCollatorForPromptResponse` into any `Trainer` that leaves columns as they are
    (`remove_unused_columns=False`).

    With `block_size` the documents are one stream, cut into blocks that fall anywhere: each token
    is in exactly one block, and the last block may be shorter. A token is predicted from those
    before it in its own block. So the first token of each block is context, whatever its mask
    says: nothing predicts it, and the loss does not count it. A block has no `source`, because it
    may hold documents of several.

    Args:
        folder: As `write_shards` left it.
        split: Which of its splits.
        block_size: Tokens of a block; None gives the documents as they were.
        use_loss_mask: False trains every token, as in base training, and needs no mask files. So
            does a set that was written without masks.

    Attributes:
        counts: Documents and tokens of the split.
        ledger: What `prepare_dataset` accounted of it, as plain values; None where nothing was.
        certificate: What was proven of its masks; see `certify_masks`.
        sources: Where each document came from; None for blocks, and where the set does not say.

    Raises:
        ValueError: If something is missing, truncated, damaged or of another version.

    Examples:
        >>> from tempfile import mkdtemp
        >>> from datasets import Dataset
        >>> from hf_sft_plugin.shards.writer import write_shards
        >>> rows = Dataset.from_dict({
        ...     "input_ids": [[5, 6, 7, 2], [8, 9, 2]], "response_mask": [[0, 0, 1, 1], [0, 1, 1]],
        ... })
        >>> folder = mkdtemp()
        >>> print(str(write_shards(folder, {"train": rows}, tokenizer)).splitlines()[1])
        train   2 documents, 7 tokens, 4 trained (57.1%), 1 shard
        >>> ShardDataset(folder)[1]
        {'input_ids': [8, 9, 2], 'response_mask': [0, 1, 1]}
        >>> ShardDataset(folder, block_size=5)[1]
        {'input_ids': [9, 2], 'response_mask': [1, 1]}
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        block_size: int | None = None,
        use_loss_mask: bool = True,
    ) -> None:
        if block_size is not None and block_size < 2:
            raise ValueError(
                f"block_size is {block_size}, but a block needs at least 2 tokens: one of context "
                "and one to train."
            )
        self.folder = Path(folder).resolve()
        self.split = split
        self.block_size = block_size
        self.use_loss_mask = use_loss_mask
        self._open()
        share = self.counts.trained_share
        has_mask = "response_mask" in self._columns
        if has_mask and not _USUAL_SHARES[0] <= share <= _USUAL_SHARES[1]:
            logger.warning(
                "%s, split '%s': %.1f%% of the tokens are trained; 10 to 90%% are usual. Look at "
                "some rows before you train on them.",
                self.folder,
                split,
                100 * share,
            )

    def _open(self) -> None:
        shard_set = read_metadata(self.folder)
        columns = check_files(shard_set, self.split, use_loss_mask=self.use_loss_mask)
        shards = shard_set.splits[self.split]
        self.counts = shard_set.counts(self.split)
        self.ledger = shard_set.ledgers[self.split]
        self.certificate = shard_set.certificates[self.split]
        self.sources: list[str | None] | None = None
        self._columns = {
            name: [
                np.memmap(shard_set.path(shard.files[name]), COLUMNS[name].dtype, mode="r")
                for shard in shards
            ]
            for name in columns
        }
        for shard, mask in zip(shards, self._columns.get("response_mask", ()), strict=False):
            if shard.num_response_tokens and not _has_any(mask):
                raise ValueError(
                    f"{shard_set.path(shard.files['response_mask'])} is all zero, but {METADATA} "
                    f"says that {shard.num_response_tokens} tokens are trained. Copy the file "
                    "again, or train every token with use_loss_mask=False."
                )
        # Where in the stream of the split each shard, and each row, begins; and where it all ends.
        self._shard_bounds = _bounds([shard.num_tokens for shard in shards])
        if self.block_size is None:
            self._row_bounds = _bounds([n for shard in shards for n in shard.document_lengths])
            places, sources = read_sources(shard_set, self.split), shard_set.sources[self.split]
            if places is not None and sources is not None:
                self.sources = [sources.names[place] for place in places.tolist()]
        else:
            starts = np.arange(0, self.counts.num_tokens, self.block_size)
            self._row_bounds = np.append(starts, self.counts.num_tokens)

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self._row_bounds)

    def __len__(self) -> int:
        return len(self._row_bounds) - 1

    def __getitem__(self, index: int) -> TokenizedExample:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"There is no row {index}: the split has {len(self)}.")
        position %= len(self)
        start, end = self._row_bounds[position : position + 2].tolist()
        row: dict[str, Any] = {name: self._read(name, start, end) for name in self._columns}
        if "response_mask" not in row:
            row["response_mask"] = [1] * (end - start)
        if self.sources is not None and self.sources[position] is not None:
            row["source"] = self.sources[position]
        return cast(TokenizedExample, row)

    def _read(self, name: str, start: int, end: int) -> list[Any]:
        """Entries `[start, end)` of a column of the stream, from all shards that they lie in."""
        values: list[Any] = []
        shard = int(np.searchsorted(self._shard_bounds, start, side="right")) - 1
        while start < end:
            offset, stop = self._shard_bounds[shard : shard + 2].tolist()
            values += self._columns[name][shard][start - offset : min(end, stop) - offset].tolist()
            start, shard = stop, shard + 1
        return values

    def __getstate__(self) -> dict[str, Any]:
        """A worker process gets the place of the files, not what is in them."""
        names = ("folder", "split", "block_size", "use_loss_mask")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _has_any(mask: np.ndarray) -> bool:
    """Whether a token is trained; reads hardly further than the first that is."""
    starts = range(0, len(mask), _PEEK_BYTES)
    return any(mask[start : start + _PEEK_BYTES].any() for start in starts)


def _bounds(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def verify_shards(folder: str | Path) -> ShardSet:
    """Reads a whole shard set and checks its every byte, mask value, token id and weight.

    Shows a progress bar where there is a terminal.

    Args:
        folder: As `write_shards` left it.

    Returns:
        What the set holds; `str` of it is its counts.

    Raises:
        ValueError: If anything is wrong; lists all of it, with files and positions.
    """
    shard_set = read_metadata(folder)
    problems: list[str] = []
    todo: list[tuple[ShardFile, str, int]] = [(file, "", 0) for file in shard_set.tokenizer_files]
    for split, shards in shard_set.splits.items():
        try:
            columns = check_files(shard_set, split)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            read_sources(shard_set, split)
        except ValueError as error:
            problems.append(str(error))
        sources = shard_set.sources[split]
        if sources is not None and shard_set.path(sources.file).is_file():
            todo.append((sources.file, "", 0))
        for name in columns:
            todo += [(shard.files[name], name, shard.num_response_tokens) for shard in shards]
    paths = [shard_set.path(file) for file, _, _ in todo]
    num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
    # None: the bar is shown on a terminal only.
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Verifying", disable=None) as bar:
        for path, (file, name, num_trained) in zip(paths, todo, strict=True):
            if path.is_file():
                vocab_size = shard_set.vocab_size
                problems += _check_file(path, file, name, num_trained, vocab_size, bar.update)
            else:
                problems.append(f"{path} is missing.")
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{folder} is damaged; write the set again, or copy it again:\n{lines}")
    return shard_set


def _check_file(
    path: Path,
    file: ShardFile,
    name: str,
    num_trained: int,
    vocab_size: int,
    advance: Callable[[int], Any],
) -> list[str]:
    """What is wrong with a file; one that belongs to no column is only compared by its digest."""
    problems: list[str] = []
    digest = hashlib.sha256()
    num_entries = num_ones = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
            if not name:
                continue
            values = np.frombuffer(chunk, COLUMNS[name].dtype)
            bad = np.flatnonzero(impossible(name, values, vocab_size))
            if len(bad) and not problems:
                problems.append(
                    f"{path} holds {values[bad[0]]} at position {num_entries + bad[0]}, but "
                    f"{possible_values(name, vocab_size)}."
                )
            num_entries += len(values)
            num_ones += int(np.count_nonzero(values == 1))
    if name == "response_mask" and not problems and num_ones != num_trained:
        found = f"marks {num_ones} tokens as trained" if num_ones else "is all zero"
        problems.append(f"{path} {found}, but {METADATA} says that {num_trained} are trained.")
    if digest.hexdigest() != file.sha256:
        problems.append(
            f"{path} has the SHA-256 {digest.hexdigest()[:12]}..., but {METADATA} says "
            f"{file.sha256[:12]}...: it is not the file that was written."
        )
    return problems


def check_tokenizer(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a tokenizer, usually that of the model to train, is the one of a shard set.

    Args:
        folder: As `write_shards` left it.
        tokenizer: Must give every token the id that it has in the shards, and cut texts alike.

    Raises:
        ValueError: If it does not; says which token differs.
    """
    shard_set = read_metadata(folder)
    if vocab_digest(tokenizer) == shard_set.vocab_digest:
        return
    saved = AutoTokenizer.from_pretrained(shard_set.folder / TOKENIZER, local_files_only=True)
    theirs, ours = ({v: k for k, v in t.get_vocab().items()} for t in (saved, tokenizer))
    differing = sorted(i for i in theirs.keys() | ours.keys() if theirs.get(i) != ours.get(i))
    if differing:
        first = differing[0]
        found = (
            f"{len(differing):,} of its ids are other tokens; the first is {first}, "
            f"{theirs.get(first)!r} in the shards and {ours.get(first)!r} in the tokenizer"
        )
    else:
        found = "it has the same tokens, but cuts texts differently"
    raise ValueError(
        f"The tokenizer is not the one that {shard_set.folder} was written with: {found}. The "
        "model would read other text than was prepared. Write the shards again with the model's "
        "tokenizer, or train the model that they were made for."
    )


def check_lengths(dataset: ShardDataset, max_length: int | None) -> None:
    """Raises where shards hold rows that would be cut without being counted."""
    lengths = dataset.row_lengths
    num_longer = 0 if max_length is None else int((lengths > max_length).sum())
    if num_longer:
        raise ValueError(
            f"{dataset.folder}, split {dataset.split!r}: {num_longer:,} of {len(lengths):,} rows "
            f"are longer than max_length {max_length:,}; the longest has {lengths.max():,} tokens. "
            "Shards are trained on as they were written, where what was cut is counted. Write them "
            f"again with --max_length {max_length}, read them in blocks with block_size, or raise "
            "max_length as far as the model reaches."
        )
