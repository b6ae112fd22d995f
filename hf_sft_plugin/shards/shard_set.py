"""What a folder of token and mask files holds: its columns, its metadata, its places."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.rows.files import METADATA

TOKENIZER = "tokenizer"
# In the folder of a split: for each document the place of its source among the names.
SOURCES = "sources.bin"
SOURCE_DTYPE = np.dtype("<u4")
FORMAT = "hf_sft_plugin.shards"
FORMAT_VERSION = 1
# Two tokenizers of one vocabulary may still cut texts differently; this text would show it.
_PROBE = "The quick brown fox (don't ask) paid 12,345.67 EUR\n\n\tx_1 += 2; \u00e9\u4e2d\U0001f600"


@dataclass(frozen=True)
class ShardColumn:
    """How one column is stored: its name in messages, the end of its file names, its numbers."""

    noun: str
    suffix: str
    dtype: np.dtype[Any]
    possible: str


COLUMNS = {
    "input_ids": ShardColumn(
        "token", ".bin", np.dtype("<u4"), "the ids of the tokenizer are 0 to {last_id}"
    ),
    "response_mask": ShardColumn(
        "mask", "_mask.bin", np.dtype("|u1"), "a token is trained (1) or not (0)"
    ),
    "loss_weights": ShardColumn(
        "weight", "_weights.bin", np.dtype("<f2"), "weights are 0, or 6e-8 to 65,504 (float16)"
    ),
}


@dataclass(frozen=True)
class ShardFile:
    """A file of a set: where it lies, with `/` between folders, and the digest of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Shard:
    """Documents that share one file for each column; every document lies whole in one shard."""

    num_tokens: int
    num_response_tokens: int
    document_lengths: list[int]
    files: dict[str, ShardFile]


@dataclass(frozen=True)
class ShardSources:
    """Where the documents of a split came from: each name once, None for those that do not say."""

    names: list[str | None]
    file: ShardFile


@dataclass(frozen=True)
class SplitCounts:
    """How much a split holds.

    Attributes:
        num_documents: Rows.
        num_tokens: Tokens of all rows.
        num_response_tokens: Tokens that are trained.
        num_shards: Files that the tokens lie in.
    """

    num_documents: int
    num_tokens: int
    num_response_tokens: int
    num_shards: int

    @property
    def trained_share(self) -> float:
        """Trained tokens over tokens, 0 to 1."""
        return self.num_response_tokens / max(self.num_tokens, 1)


@dataclass(frozen=True)
class ShardSet:
    """What the metadata of a folder says; `str` gives the counts, one line for each split.

    Attributes:
        folder: Where the set is.
        vocab_size: Number of ids of its tokenizer.
        vocab_digest: See `vocab_digest`.
        tokenizer_files: The files of the tokenizer beside the tokens.
        splits: The shards of each split.
        ledgers: What was accounted of a split, as plain values; None where nothing was.
        certificates: What was proven of its masks, in the same way.
        sources: Where its documents came from; None where nothing says so.
    """

    folder: Path
    vocab_size: int
    vocab_digest: str
    tokenizer_files: tuple[ShardFile, ...]
    splits: dict[str, tuple[Shard, ...]]
    ledgers: dict[str, Any]
    certificates: dict[str, Any]
    sources: dict[str, ShardSources | None]

    def counts(self, split: str) -> SplitCounts:
        """Adds up the shards of a split."""
        shards = self.splits[split]
        return SplitCounts(
            num_documents=sum(len(shard.document_lengths) for shard in shards),
            num_tokens=sum(shard.num_tokens for shard in shards),
            num_response_tokens=sum(shard.num_response_tokens for shard in shards),
            num_shards=len(shards),
        )

    def path(self, file: ShardFile) -> Path:
        """The place of a file.

        Raises:
            ValueError: If it is outside the folder, so that a set from elsewhere reads no others.
        """
        path = self.folder / file.path
        if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
            raise ValueError(
                f"{self.folder / METADATA} names the file {file.path!r}, which may lie outside the "
                "folder. Paths are relative and go down only."
            )
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(
                f"{path} is a link that leads out of the folder, to {path.resolve()}. Put the file "
                "itself there."
            )
        return path

    def __str__(self) -> str:
        """The counts, one line for each split."""
        lines = [f"{self.folder}: token ids 0 to {self.vocab_size - 1:,}"]
        for name in self.splits:
            counts = self.counts(name)
            lines.append(
                f"{name:7} {counts.num_documents:,} documents, {counts.num_tokens:,} tokens, "
                f"{counts.num_response_tokens:,} trained ({counts.trained_share:.1%}), "
                f"{counts.num_shards:,} {'shard' if counts.num_shards == 1 else 'shards'}"
            )
        return "\n".join(lines)


def read_metadata(folder: str | Path) -> ShardSet:
    """Reads what a folder of shards holds, without a look at the shards themselves.

    Raises:
        ValueError: If the metadata is missing, damaged, of another version or contradicts itself.
    """
    folder = Path(folder)
    path = folder / METADATA
    if not path.is_file():
        what = f"has no {METADATA}" if folder.is_dir() else "is not a folder"
        raise ValueError(
            f"{folder} {what}, so it is no shard set. Write one with recipes/prepare_dataset.py."
            + _set_aside(folder)
        )
    damaged = f"{path} is truncated or damaged"
    cure = "Write the set again, or copy the file again."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{damaged}: {error}. {cure}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} does not say that this is a shard set: 'format' is not {FORMAT}.")
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {record.get('format_version')!r}, but this version of "
            f"hf_sft_plugin reads {FORMAT_VERSION}. Upgrade it, or write the set again."
        )
    try:
        shards = ShardSet(
            folder=folder,
            vocab_size=int(record["tokenizer"]["vocab_size"]),
            vocab_digest=str(record["tokenizer"]["digest"]),
            tokenizer_files=tuple(ShardFile(**file) for file in record["tokenizer"]["files"]),
            splits={
                name: tuple(map(_read_shard, split["shards"]))
                for name, split in record["splits"].items()
            },
            ledgers={name: split["ledger"] for name, split in record["splits"].items()},
            certificates={name: split["certificate"] for name, split in record["splits"].items()},
            sources={
                name: _read_source_names(split.get("sources"))
                for name, split in record["splits"].items()
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{damaged}: {type(error).__name__} {error} while it was read. {cure}"
        ) from error
    if not shards.splits:
        raise ValueError(f"{damaged}: it names no split. {cure}")
    for name in shards.splits:
        if shards.counts(name).num_response_tokens == 0:
            raise ValueError(f"{folder}: the masks of split {name!r} are all zero: nothing trains.")
    return shards


def _set_aside(folder: Path) -> str:
    """Names an old set that a killed `write_shards` left beside its place, if there is one."""
    start = f".{folder.name}."
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    left = [path for path in siblings if path.name.startswith(start) and path.suffix == ".old"]
    return f" The set that was there is now {left[0]}: rename it to get it back." if left else ""


def _read_shard(record: Mapping[str, Any]) -> Shard:
    files = {column: ShardFile(**file) for column, file in record["files"].items()}
    shard = Shard(**{**record, "files": files})
    lengths = shard.document_lengths
    if not all(type(length) is int and length > 0 for length in lengths):
        raise ValueError("a document has an impossible length")
    if sum(lengths) != shard.num_tokens or not 0 <= shard.num_response_tokens <= shard.num_tokens:
        raise ValueError("documents and tokens of a shard do not add up")
    return shard


def _read_source_names(record: Mapping[str, Any] | None) -> ShardSources | None:
    if record is None:
        return None
    names = record["names"]
    if not isinstance(names, list) or not all(isinstance(name, str | None) for name in names):
        raise ValueError("the names of sources are no texts")
    return ShardSources(names, ShardFile(**record["file"]))


def read_sources(shard_set: ShardSet, split: str) -> np.ndarray | None:
    """For each document of a split the place of its source among the names; None without any.

    Raises:
        ValueError: If the file is missing, too short or too long, or names what is not there.
    """
    sources = shard_set.sources[split]
    if sources is None:
        return None
    path = shard_set.path(sources.file)
    cure = "Copy the file again, or write the set again."
    if not path.is_file():
        raise ValueError(f"{path} is missing, which says where each document came from. {cure}")
    expected, size = shard_set.counts(split).num_documents, path.stat().st_size
    if size != expected * SOURCE_DTYPE.itemsize:
        raise ValueError(
            f"{path} holds the sources of {size // SOURCE_DTYPE.itemsize} documents ({size} "
            f"bytes), but the split has {expected} ({expected * SOURCE_DTYPE.itemsize} bytes). "
            f"{cure}"
        )
    places = np.fromfile(path, SOURCE_DTYPE)
    if places.max(initial=0) >= len(sources.names):
        raise ValueError(
            f"{path} names source {places.max()}, but the sources are numbered from 0 to "
            f"{len(sources.names) - 1}. {cure}"
        )
    return places


def check_files(shard_set: ShardSet, split: str, *, use_loss_mask: bool = True) -> list[str]:
    """Checks that the files of a split are there and have the right sizes; reads none of them.

    Args:
        shard_set: As `read_metadata` gave it.
        split: Its name.
        use_loss_mask: False does without masks and weights.

    Returns:
        The columns that there are.

    Raises:
        ValueError: If files are missing or too short or too long.
    """
    if split not in shard_set.splits:
        raise ValueError(
            f"{shard_set.folder} has no split {split!r}; it has {', '.join(shard_set.splits)}."
        )
    shards = shard_set.splits[split]
    wanted = [name for name in COLUMNS if name == "input_ids" or use_loss_mask]
    columns = [name for name in wanted if any(name in shard.files for shard in shards)]
    for name in dict.fromkeys(["input_ids", *columns]):
        column = COLUMNS[name]
        listed = [shard_set.path(shard.files[name]) for shard in shards if name in shard.files]
        found = [path for path in listed if path.is_file()]
        if len(found) != len(shards):
            missing = [str(path) for path in listed if path not in found]
            where = f"; missing: {', '.join(missing[:3])}" if missing else ""
            cure = " Copy them again" + (
                ", or train every token with use_loss_mask=False." if name != "input_ids" else "."
            )
            raise ValueError(
                f"{shard_set.folder}, split {split!r}: expected {len(shards)} {column.noun} "
                f"shards, found {len(found)}{where}.{cure}"
            )
        for path, shard in zip(listed, shards, strict=True):
            size = path.stat().st_size
            if size != shard.num_tokens * column.dtype.itemsize:
                raise ValueError(
                    f"{path} holds {size // column.dtype.itemsize} {column.noun} entries ({size} "
                    f"bytes), but the shard has {shard.num_tokens} tokens "
                    f"({shard.num_tokens * column.dtype.itemsize} bytes). The file is truncated "
                    "or of another set: copy it again."
                )
    return columns


def impossible(name: str, values: np.ndarray, vocab_size: int) -> np.ndarray:
    """Marks the entries of a column that it may not hold.

    Args:
        name: The column.
        values: Its entries.
        vocab_size: Number of ids of the tokenizer.

    Returns:
        True where an entry is impossible.

    Examples:
        >>> impossible("response_mask", np.array([0, 1, 2]), vocab_size=300).tolist()
        [False, False, True]
    """
    if name == "input_ids":
        return ~((values >= 0) & (values < vocab_size))
    if name == "response_mask":
        return (values != 0) & (values != 1)
    return ~((values >= 0) & np.isfinite(values))


def possible_values(name: str, vocab_size: int) -> str:
    """What the entries of a column can be, for messages."""
    return COLUMNS[name].possible.format(last_id=vocab_size - 1)


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; more than there are tokens where a vocabulary has gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def vocab_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Two tokenizers of one digest give tokens the same ids and cut a sample text the same way.

    Chat template and special roles, such as which token pads, are no part of it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probe = tokenizer.encode(_PROBE, add_special_tokens=False)
    return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()
