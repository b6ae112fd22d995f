"""The rows that are named are those that are used, and no setting about them is ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
import rows
from bookings import make_bookings
from datasets import Dataset, DatasetDict
from quickstart import make_tasks
from rows import DataArguments, load_rows

from hf_sft_plugin import prepare_dataset, write_shards
from hf_sft_plugin.rows import files as row_files

ROWS = [{"prompt": f"Say {number}", "response": f"{number}!"} for number in range(12)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def as_lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(row_files, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", as_lines(ROWS))


@pytest.fixture
def splits(tmp_path: Path) -> str:
    path = tmp_path / "splits"
    parts = {"train": ROWS[:6], "test": ROWS[6:10], "extra": ROWS[10:]}
    DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(path)
    return str(path)


def test_every_row_of_a_named_place_is_used(train_file: str, splits: str) -> None:
    train, evaluation = load_rows(
        DataArguments(train_file=splits, eval_split="test", max_train_rows=2, max_eval_rows=3), 0
    )
    assert evaluation is not None
    assert (train.to_list(), evaluation.to_list()) == (ROWS[:2], ROWS[6:9])
    train, evaluation = load_rows(
        DataArguments(train_file=splits, train_split="extra", eval_file=splits, eval_split="test"),
        0,
    )
    assert evaluation is not None
    assert (train.to_list(), evaluation.to_list()) == (ROWS[10:], ROWS[6:10])
    train, evaluation = load_rows(DataArguments(train_file=train_file, eval_share=0.25), 0)
    assert evaluation is not None
    assert (len(train), len(evaluation)) == (9, 3)


def test_a_dataset_of_the_hub_is_evaluated_on_a_file(
    train_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs))
        return Dataset.from_list(ROWS[:2])

    monkeypatch.setattr(rows, "load_dataset", load_dataset)
    train, evaluation = load_rows(DataArguments(dataset_name="x", eval_file=train_file), 0)
    assert evaluation is not None
    assert (len(train), len(evaluation)) == (2, 12)
    load_rows(DataArguments(dataset_name="x", dataset_config="c", eval_split="test"), 0)
    splits = [(("x", None), "train"), (("x", "c"), "train"), (("x", "c"), "test")]
    assert asked == [(args, {"split": split}) for args, split in splits]


def test_a_dataset_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ValueError, match="dataset_name 'nobody/nothing' with the split 'train'"):
        load_rows(DataArguments(dataset_name="nobody/nothing"), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "nope"}, "has the splits train, test, extra; train_split is 'nope'"),
        ({"eval_split": "nope"}, "has the splits train, test, extra; eval_split is 'nope'"),
        ({"eval_file": "splits"}, "has the splits train, test, extra; eval_split names none"),
        ({"train_file": "train.jsonl", "train_split": "b"}, "train_split is 'b', but 'train.jsonl"),
        ({"train_file": "train.jsonl", "eval_split": "b"}, "eval_split is 'b', but 'train.jsonl"),
        ({"train_file": "one", "eval_split": "b"}, "'one' holds one dataset without splits"),
        ({"train_file": "empty"}, "'empty' is a folder, but not one that `datasets` saved"),
        ({"eval_file": "none.csv"}, "There is no 'none.csv'"),
    ],
)
def test_a_split_or_file_that_is_not_there_is_an_error(
    settings: dict[str, Any],
    message: str,
    splits: str,
    train_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(ROWS).save_to_disk("one")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_rows(DataArguments(**{"train_file": "splits", **settings}), 0)


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Any) -> str:
    prepared, _ = prepare_dataset(Dataset.from_list(ROWS), tokenizer)
    parts = {"train": prepared.select(range(8)), "val": prepared.select(range(8, 12))}
    write_shards(tmp_path / "shards", parts, tokenizer)
    return str(tmp_path / "shards")


def test_shards_are_read_by_the_name_of_their_folder(shards: str, train_file: str) -> None:
    train, evaluation = load_rows(DataArguments(train_file=shards, eval_split="val"), 0)
    assert (len(train), len(evaluation)) == (8, 4)
    assert sum(train[0]["response_mask"]) < len(train[0]["input_ids"])
    train, evaluation = load_rows(DataArguments(train_file=train_file, eval_file=shards), 0)
    assert (len(train), len(evaluation), evaluation.split) == (12, 4, "val")
    settings = DataArguments(train_file=shards, block_size=5, eval_file=shards)
    train, evaluation = load_rows(settings, 0, use_loss_mask=False)
    assert (train[0]["response_mask"], len(evaluation[0]["input_ids"])) == ([1] * 5, 5)


def test_tasks_are_made_on_the_spot_with_rows_held_out() -> None:
    for tasks, make in (
        ("bookings", make_bookings),
        ("quickstart", make_tasks),
        (None, make_tasks),
    ):
        made = [part.to_list() for part in load_rows(DataArguments(tasks=tasks), 0)]
        assert made == [part.to_list() for part in make()]


def test_settings_that_shards_do_not_know_are_errors(shards: str, train_file: str) -> None:
    for settings, message in (
        ({"train_file": shards, "eval_share": 0.5}, "eval_share is set, .*--val_share"),
        ({"train_file": shards, "max_train_rows": 2}, "max_train_rows is set, but .* holds shards"),
        ({"train_file": shards, "train_split": "a"}, "has no split 'a'; it has train, val"),
        ({"train_file": train_file, "block_size": 8}, "block_size is 8, but no folder of shards"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows(DataArguments(**settings), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_file": "a", "dataset_name": "b"}, "training rows come from one place"),
        ({"train_file": "a", "tasks": "bookings"}, "training rows come from one place"),
        ({"tasks": "booking"}, "tasks is 'booking', but there are quickstart and bookings"),
        ({"train_file": "a", "dataset_config": "b"}, "there is no dataset_name"),
        ({"eval_file": "a"}, "eval_file is 'a', but no training rows are named"),
        ({"eval_split": "a"}, "eval_split is 'a', but no training rows are named"),
        ({"train_split": "a"}, "train_split is 'a', but no training rows are named"),
        ({"train_file": "a", "eval_share": -1}, "eval_share is -1"),
        ({"train_file": "a", "eval_share": 1.0}, "eval_share is 1.0"),
        ({"train_file": "a", "eval_file": "b", "eval_share": 0.5}, "come from 'b' already"),
        ({"train_file": "a", "eval_split": "b", "eval_share": 0.5}, "come from 'b' already"),
        ({"eval_share": 0.5}, "come from the quickstart tasks already"),
        ({"train_file": "a", "max_train_rows": 0}, "max_train_rows is 0"),
        ({"max_eval_rows": -1}, "max_eval_rows is -1"),
        ({"num_cpu_threads": 0}, "num_cpu_threads is 0, but it counts threads from 1. None"),
        ({"train_file": "a", "max_eval_rows": 5}, "there are no held-out rows"),
    ],
)
def test_a_setting_that_would_be_ignored_is_an_error(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)
