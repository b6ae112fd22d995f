"""The metadata of a shard set is believed only as far as it is whole, known and stays at home."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_sft_plugin.rows.files import METADATA
from hf_sft_plugin.shards.dataset import ShardDataset, verify_shards
from hf_sft_plugin.shards.shard_set import check_files, read_metadata, vocab_digest
from hf_sft_plugin.shards.writer import write_shards

ROWS = [
    {"input_ids": [5, 6, 7, 2], "response_mask": [0, 0, 1, 1]},
    {"input_ids": [8, 9, 10, 2], "response_mask": [0, 1, 1, 1]},
]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A set of two documents in two shards, and one of each for `val`."""
    splits = {"train": Dataset.from_list(ROWS), "val": Dataset.from_list(ROWS[:1])}
    write_shards(tmp_path / "set", splits, tokenizer, max_tokens_per_shard=7)
    return tmp_path / "set"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    metadata = json.loads((folder / METADATA).read_text())
    change(metadata)
    (folder / METADATA).write_text(json.dumps(metadata))


def test_the_counts_of_the_shards_are_added_up(folder: Path) -> None:
    counts = read_metadata(folder).counts("train")
    assert (counts.num_documents, counts.num_tokens, counts.num_shards) == (2, 8, 2)
    assert counts.trained_share == 5 / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "has format_version 2, but .* reads 1"),
        (lambda m: m.pop("format_version"), "has format_version None, but"),
        (lambda m: m.pop("format"), "does not say that this is a shard set"),
        (lambda m: m.pop("splits"), "truncated or damaged: KeyError 'splits'"),
        (lambda m: m["splits"]["train"].update(shards=7), "truncated or damaged: TypeError"),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(document_lengths=[4, 4]),
            "documents and tokens of a shard do not add up",
        ),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(document_lengths=[8, -1]),
            "a document has an impossible length",
        ),
        (
            lambda m: [s.update(num_response_tokens=0) for s in m["splits"]["train"]["shards"]],
            "the masks of split 'train' are all zero",
        ),
        (
            lambda m: m["splits"]["train"].update(sources={"names": [3], "file": {}}),
            "the names of sources are no texts",
        ),
        (lambda m: m["splits"].pop("train"), "has no split 'train'; it has val"),
    ],
)
def test_metadata_that_cannot_be_trusted_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        ShardDataset(folder)


@pytest.mark.parametrize("content", [b"", b'{"format": "hf_sft', b"\xff\xfe", b"[1]"])
def test_metadata_that_is_no_json_is_refused(content: bytes, folder: Path) -> None:
    (folder / METADATA).write_bytes(content)
    with pytest.raises(ValueError, match=f"{METADATA} (is truncated or damaged|does not say)"):
        ShardDataset(folder)


def test_a_folder_that_is_no_shard_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has no {METADATA}, so it is no shard set"):
        ShardDataset(tmp_path)
    with pytest.raises(ValueError, match="is not a folder, so it is no shard set"):
        ShardDataset(tmp_path / "none")


@pytest.mark.parametrize("path", ["/etc/hostname", "../set/train/shard_000.bin", "train/../../x"])
def test_paths_that_may_lead_outside_are_refused(path: str, folder: Path) -> None:
    edit(
        folder, lambda m: m["splits"]["train"]["shards"][0]["files"]["input_ids"].update(path=path)
    )
    for read in (ShardDataset, verify_shards):
        with pytest.raises(ValueError, match="may lie outside the folder"):
            read(folder)


def test_a_set_that_says_nothing_of_sources_has_none(folder: Path) -> None:
    edit(folder, lambda m: m["splits"]["train"].pop("sources"))
    assert read_metadata(folder).sources == {"train": None, "val": None}
    assert ShardDataset(folder).sources is None


def test_sources_may_not_lie_outside(tmp_path: Path, tokenizer: Any) -> None:
    rows = Dataset.from_list([{**row, "source": "web"} for row in ROWS])
    write_shards(tmp_path / "set", {"train": rows}, tokenizer)
    edit(
        tmp_path / "set",
        lambda m: m["splits"]["train"]["sources"]["file"].update(path="../sources.bin"),
    )
    for read in (ShardDataset, verify_shards):
        with pytest.raises(ValueError, match="may lie outside the folder"):
            read(tmp_path / "set")


def test_links_that_lead_outside_are_refused_and_links_inside_are_not(folder: Path) -> None:
    path = folder / "train" / "shard_000.bin"
    path.rename(folder / "train" / "moved.bin")
    path.symlink_to("moved.bin")
    assert check_files(read_metadata(folder), "train") == ["input_ids", "response_mask"]
    path.unlink()
    (folder / "train" / "moved.bin").rename(folder.parent / "moved.bin")
    path.symlink_to(folder.parent / "moved.bin")
    with pytest.raises(ValueError, match="is a link that leads out of the folder, to "):
        ShardDataset(folder)


def test_the_digest_of_a_tokenizer_is_that_of_its_tokens_and_cuts(
    tokenizer: Any, tokenizer_factory: Any
) -> None:
    digest = vocab_digest(tokenizer)
    assert vocab_digest(tokenizer_factory(pad_token="<|im_end|>", chat_template=None)) == digest
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert vocab_digest(tokenizer) == digest
    tokenizer.add_tokens(["<think>"])
    assert vocab_digest(tokenizer) != digest
