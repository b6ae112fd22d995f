"""A shard set is written whole or not at all, and nothing of anyone else's is overwritten."""

import hashlib
import itertools
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_sft_plugin.preparation.ledger import Ledger
from hf_sft_plugin.rows.files import METADATA
from hf_sft_plugin.shards import writer as shard_writer
from hf_sft_plugin.shards.dataset import ShardDataset, verify_shards
from hf_sft_plugin.shards.writer import check_shard_destination, write_shards
from hf_sft_plugin.types import RowError

OLD = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 2]], "response_mask": [[0, 1, 1], [0, 1]]})
NEW = Dataset.from_dict({"input_ids": [[9, 9, 9, 2]], "response_mask": [[0, 0, 1, 1]]})


@dataclass
class Certificate:
    """Stands for whatever a proof of the masks gives."""

    num_proved: int


def write(folder: Path, rows: Dataset, tokenizer: Any, **settings: Any) -> Any:
    return write_shards(folder, {"train": rows}, tokenizer, **settings)


def test_the_files_hold_what_the_readme_of_the_format_says(tmp_path: Path, tokenizer: Any) -> None:
    rows = OLD.add_column("loss_weights", [[1.0, 0.5, 2.0], None])
    written = write_shards(
        tmp_path / "set",
        {"train": rows, "val": NEW},
        tokenizer,
        ledgers={"train": Ledger(num_rows=2)},
        certificates={"train": Certificate(num_proved=3), "val": {"note": "by hand"}},
        max_tokens_per_shard=3,
    )
    assert written.folder == tmp_path / "set"
    assert sorted(
        path.relative_to(tmp_path / "set").as_posix() for path in (tmp_path / "set").rglob("*.bin")
    ) == [
        "train/shard_000.bin",
        "train/shard_000_mask.bin",
        "train/shard_000_weights.bin",
        "train/shard_001.bin",
        "train/shard_001_mask.bin",
        "train/shard_001_weights.bin",
        "val/shard_000.bin",
        "val/shard_000_mask.bin",
    ]
    train = tmp_path / "set" / "train"
    assert np.fromfile(train / "shard_000.bin", "<u4").tolist() == [5, 6, 7]
    assert np.fromfile(train / "shard_000_mask.bin", "u1").tolist() == [0, 1, 1]
    assert np.fromfile(train / "shard_000_weights.bin", "<f2").tolist() == [1.0, 0.5, 2.0]
    assert np.fromfile(train / "shard_001_weights.bin", "<f2").tolist() == [1.0, 1.0]
    metadata = json.loads((tmp_path / "set" / METADATA).read_text())
    assert metadata["format_version"] == 1
    assert metadata["dtypes"] == {
        "input_ids": "<u4",
        "response_mask": "|u1",
        "loss_weights": "<f2",
        "source": "<u4",
    }
    split = metadata["splits"]["train"]
    assert (split["num_documents"], split["num_tokens"], split["trained_share"]) == (2, 5, 0.6)
    assert split["ledger"]["num_rows"] == 2
    assert split["certificate"] == {"num_proved": 3}
    assert metadata["splits"]["val"]["certificate"] == {"note": "by hand"}
    assert [shard["document_lengths"] for shard in split["shards"]] == [[3], [2]]


def test_sources_are_stored_once_each_and_by_number(tmp_path: Path, tokenizer: Any) -> None:
    rows = Dataset.from_list([{**NEW[0], "source": s} for s in ("web", None, "book", "web")])
    write_shards(tmp_path / "set", {"train": rows, "val": NEW}, tokenizer)
    file = tmp_path / "set" / "train" / "sources.bin"
    assert np.fromfile(file, "<u4").tolist() == [0, 1, 2, 0]
    splits = json.loads((tmp_path / "set" / METADATA).read_text())["splits"]
    assert splits["train"]["sources"] == {
        "names": ["web", None, "book"],
        "file": {
            "path": "train/sources.bin",
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        },
    }
    assert splits["val"]["sources"] is None
    assert not (tmp_path / "set" / "val" / "sources.bin").exists()


def test_a_certificate_may_come_with_the_ledger(tmp_path: Path, tokenizer: Any) -> None:
    ledger = Ledger(num_rows=2, certificate={"masks_sha256": "ab"})
    write(tmp_path / "set", OLD, tokenizer, ledgers={"train": ledger})
    dataset = ShardDataset(tmp_path / "set")
    assert dataset.certificate == {"masks_sha256": "ab"}
    assert dataset.ledger["num_rows"] == 2
    assert "certificate" not in dataset.ledger


def test_only_the_set_is_left_behind(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "deep" / "set", OLD, tokenizer)
    write(tmp_path / "deep" / "set", NEW, tokenizer, overwrite=True)
    assert os.listdir(tmp_path / "deep") == ["set"]
    assert list(ShardDataset(tmp_path / "deep" / "set")) == list(NEW)


def test_an_open_set_stays_readable_while_it_is_replaced(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "set", OLD, tokenizer)
    dataset = ShardDataset(tmp_path / "set")
    write(tmp_path / "set", NEW, tokenizer, overwrite=True)
    assert list(dataset) == list(OLD)


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "set", OLD, tokenizer)
    (tmp_path / "link").symlink_to("set")
    write(tmp_path / "link", NEW, tokenizer, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert list(ShardDataset(tmp_path / "set")) == list(NEW)


def test_a_set_is_replaced_only_when_asked(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "set", OLD, tokenizer)
    with pytest.raises(ValueError, match=r"already holds a shard set\. Replace it with overwrite"):
        write(tmp_path / "set", NEW, tokenizer)
    assert list(ShardDataset(tmp_path / "set")) == list(OLD)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_anything_else_is_never_overwritten(
    overwrite: bool, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no shard set, so it is not overwritten"):
        write(tmp_path, OLD, tokenizer, overwrite=overwrite)
    with pytest.raises(ValueError, match="exists and is no shard set, so it is not overwritten"):
        write(tmp_path / "thesis.txt", OLD, tokenizer, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_beside_the_shards_is_not_lost(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "set", OLD, tokenizer)
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes.txt' beside its shards, which would be"):
        check_shard_destination(tmp_path / "set", overwrite=True)


def test_an_empty_folder_is_filled(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", OLD, tokenizer)
    assert list(ShardDataset(tmp_path / "set")) == list(OLD)


def test_what_a_killed_run_left_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".set.0a.partial").mkdir()
    check_shard_destination(tmp_path / "set", overwrite=False)
    assert ".set.0a.partial was left by a run that was killed" in caplog.text


@pytest.mark.parametrize("step", ["_write_column", "_write_metadata", "_flush", "_exchange"])
def test_an_error_on_the_way_leaves_what_was_there(
    step: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set", OLD, tokenizer)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shard_writer, step, fail)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "set", NEW, tokenizer, overwrite=True)
    assert os.listdir(tmp_path) == ["set"]
    assert list(ShardDataset(tmp_path / "set")) == list(OLD)


def test_where_folders_cannot_change_places_the_set_is_replaced_in_two_steps(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set", OLD, tokenizer)
    monkeypatch.setattr(shard_writer, "_exchange", lambda first, second: False)
    write(tmp_path / "set", NEW, tokenizer, overwrite=True)
    assert os.listdir(tmp_path) == ["set"]
    assert list(ShardDataset(tmp_path / "set")) == list(NEW)
    rename = os.rename

    def fail_to_place(first: Path, second: Path) -> None:
        if first.suffix == ".partial":
            raise OSError("disk gone")
        rename(first, second)

    monkeypatch.setattr(os, "rename", fail_to_place)
    with pytest.raises(OSError, match="disk gone"):
        write(tmp_path / "set", OLD, tokenizer, overwrite=True)
    assert list(ShardDataset(tmp_path / "set")) == list(NEW)


def test_an_old_set_that_was_put_aside_is_named(tmp_path: Path) -> None:
    (tmp_path / ".set.0a.old").mkdir()
    with pytest.raises(ValueError, match=r"The set that was there is now .*\.set\.0a\.old: rename"):
        verify_shards(tmp_path / "set")


def overwrite_and_die(
    folder: Path, tokenizer: Any, at_step: int | None = None, after: float | None = None
) -> bool:
    """Replaces OLD by NEW in a process of its own; True where SIGKILL was its end.

    Args:
        folder: Holds OLD, or is made to.
        tokenizer: Of both.
        at_step: The process kills itself before its n-th step on the disk.
        after: It is killed from outside after this many seconds.
    """
    if not folder.exists() or list(ShardDataset(folder)) != list(OLD):
        write(folder, OLD, tokenizer, overwrite=True)
    process = os.fork()
    if process == 0:
        try:
            # Whatever a forked process may wait for, it does not wait for ever.
            signal.alarm(30)
            die_at(at_step)
            write(folder, NEW, tokenizer, overwrite=True, max_tokens_per_shard=2)
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def die_at(last: int | None) -> None:
    calls = itertools.count(1)

    def counted(function: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step

    for name in ("_write_column", "_digest", "_write_metadata", "_flush", "_exchange"):
        setattr(shard_writer, name, counted(getattr(shard_writer, name)))
    for name in ("rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def what_is_there(folder: Path) -> str:
    verify_shards(folder)
    rows = list(ShardDataset(folder))
    assert rows in (list(OLD), list(NEW))
    return "old" if rows == list(OLD) else "new"


def test_killed_at_any_step_it_leaves_the_old_set_or_the_new_one(
    tmp_path: Path, tokenizer: Any
) -> None:
    found = []
    for step in itertools.count(1):
        if not overwrite_and_die(tmp_path / "set", tokenizer, at_step=step):
            break
        found.append(what_is_there(tmp_path / "set"))
    # Old at every step up to the exchange, new at every step after it.
    assert found == sorted(found, reverse=True)
    assert found.count("old") > 15
    assert found.count("new") > 5


def test_killed_at_any_time_it_leaves_the_old_set_or_the_new_one(
    tmp_path: Path, tokenizer: Any
) -> None:
    for number in range(8):
        overwrite_and_die(tmp_path / "set", tokenizer, after=number / 200)
        assert what_is_there(tmp_path / "set") in ("old", "new")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"input_ids": [[5, 2], [6, 300]], "response_mask": [[0, 1], [0, 1]]},
            "Row 1: input_ids holds 300, but the ids of the tokenizer are 0 to 299.",
        ),
        (
            {"input_ids": [[5, -1]], "response_mask": [[0, 1]]},
            "Row 0: input_ids holds -1, but",
        ),
        (
            {"input_ids": [[5, 2], [6, 2]], "response_mask": [[0, 1], [0, 2]]},
            "Row 1: response_mask holds 2, but a token is trained (1) or not (0).",
        ),
        (
            {"input_ids": [[5, 2]], "response_mask": [[0.5, 1]]},
            "Row 0: response_mask holds 0.5, but",
        ),
        (
            {"input_ids": [[5, 2], [6, 7, 2]], "response_mask": [[0, 1], [0, 1]]},
            "Row 1: input_ids has 3 tokens but response_mask has 2 entries.",
        ),
        (
            {"input_ids": [[5, 2], [6, 2]], "response_mask": [[0, 1], None]},
            "Row 1: input_ids has 2 tokens but response_mask has 0 entries.",
        ),
        ({"input_ids": [[5, 2], []], "response_mask": [[0, 1], []]}, "Row 1: it has no tokens"),
        (
            {
                "input_ids": [[5, 2]],
                "response_mask": [[0, 1]],
                "loss_weights": [[1.0, 1e6]],
            },
            "Row 0: loss_weights holds 1000000.0, but weights are 0, or 6e-8 to 65,504 (float16).",
        ),
        (
            {"input_ids": [[5, 2]], "response_mask": [[0, 1]], "loss_weights": [[1.0, 1e-9]]},
            "Row 0: loss_weights holds 1e-09, but",
        ),
    ],
)
def test_a_row_that_cannot_be_stored_is_named(
    rows: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(RowError) as caught:
        write(tmp_path / "set", Dataset.from_dict(rows), tokenizer)
    assert str(caught.value).startswith(message)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "There are no splits to write"),
        ({"tokenizer": OLD}, "A split cannot be called 'tokenizer'"),
        ({"../train": OLD}, r"A split cannot be called '\.\./train'"),
        ({"train": OLD.remove_columns("input_ids")}, "columns response_mask, but no input_ids"),
        (
            {"train": Dataset.from_dict({"input_ids": [[5]], "response_mask": [[0]]})},
            "No token of split 'train' is trained: it has 1 rows, and their masks are all zero",
        ),
        ({"train": OLD.select([])}, "No token of split 'train' is trained: it has 0 rows"),
    ],
)
def test_splits_that_cannot_be_trained_are_refused(
    splits: dict[str, Dataset], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "set", splits, tokenizer)
    assert os.listdir(tmp_path) == []


def test_rows_beyond_one_batch_and_rows_that_were_picked_keep_their_order(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"input_ids": [n % 299, n // 299], "response_mask": [0, 1]} for n in range(2500)]
    picked = Dataset.from_list(rows).shuffle(seed=0).with_format("torch")
    write(tmp_path / "set", picked, tokenizer, max_tokens_per_shard=2222)
    assert list(ShardDataset(tmp_path / "set")) == list(picked.with_format(None))


def test_splits_are_datasets_by_name(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 2], "response_mask": [0, 1]}]
    for splits in (Dataset.from_list(rows), {"train": rows}):
        with pytest.raises(ValueError, match="splits must be prepared datasets by name"):
            write_shards(tmp_path / "set", splits, tokenizer)
