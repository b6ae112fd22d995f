"""Rows are read as they are written, from every form, and no setting about them is ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
import rows
from datasets import Dataset, DatasetDict
from rows import DataArguments, load_rows, read_rows

ROWS = [{"prompt": f"Say {number}", "response": f"{number}!"} for number in range(12)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def as_lines(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "HF_DATASETS_CACHE", tmp_path / "cache")
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


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet", "folder", "splits"])
def test_rows_are_read_from_every_form(form: str, tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{form}"
    if form in ("json", "jsonl"):
        dataset.to_json(path, lines=form == "jsonl")
    elif form == "csv":
        dataset.to_csv(path)
    elif form == "parquet":
        dataset.to_parquet(path)
    elif form == "folder":
        dataset.save_to_disk(path)
    else:
        DatasetDict({"train": dataset}).save_to_disk(path)
    assert read_rows(str(path), "train").to_list() == ROWS


TEXTS = ["NA", "null", "None", "nan", "", "42", "1e5", "true", "2024-01-01", "2024-01-01T00:00:00Z"]


def test_text_of_a_csv_stays_text(tmp_path: Path) -> None:
    expected = [{"prompt": text, "response": text} for text in [*TEXTS, 'a "b",\nc']]
    lines = "".join(f"{text},{text}\n" for text in TEXTS) + '"a ""b"",\nc","a ""b"",\nc"\n'
    path = write(tmp_path / "rows.csv", "\ufeffprompt,response\n" + lines)
    assert read_rows(path, "train").to_list() == expected


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_json_file_stays_text(text: str, as_list: bool, tmp_path: Path) -> None:
    values = [
        {"prompt": text, "messages": [{"role": "user", "content": text}]},
        {"prompt": text, "messages": [{"role": "user", "content": text}]},
    ]
    content = json.dumps(values, indent=1) if as_list else as_lines(values)
    path = write(tmp_path / "rows.json", content)
    assert read_rows(path, "train").to_list() == values


def test_columns_and_keys_may_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ROWS_AT_A_TIME", 2)
    values = [{"a": None}, {"a": 1}, {"a": 1.5}, {"b": [{"x": "2024-01-01"}]}, {"b": [{"y": 0.3}]}]
    path = write(tmp_path / "rows.jsonl", as_lines(values))
    assert read_rows(path, "train").to_list() == [
        {"a": None, "b": None},
        {"a": 1.0, "b": None},
        {"a": 1.5, "b": None},
        {"a": None, "b": [{"x": "2024-01-01", "y": None}]},
        {"a": None, "b": [{"x": None, "y": 0.3}]},
    ]


def test_a_file_is_parsed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", as_lines(ROWS))
    assert read_rows(path, "train").cache_files
    assert len(list(cache.rglob("*.arrow"))) == 1
    batches = rows._batches
    monkeypatch.setattr(rows, "_batches", None)
    assert read_rows(path, "train").to_list() == ROWS
    monkeypatch.setattr(rows, "_batches", batches)
    write(tmp_path / "rows.jsonl", as_lines(ROWS[:3]))
    assert read_rows(path, "train").to_list() == ROWS[:3]
    assert [child.suffix for child in (cache / "hf_sft_rows").iterdir()] == [".arrow"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": "b"}\n\n{"a": b}\n', "line 3 is not JSON: Expecting value"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "\xff"}\n', "line 2 is not JSON: 'utf-8' codec"),
        ("a.jsonl", '{"a": "b"}\n3\n', "line 2 holds 3, but a row is a JSON object"),
        ("a.json", '[{"a": "b"}, 3]', "row 1 holds 3, but a row is a JSON object"),
        ("a.json", '[{"a": "b"}', "a.json' is not JSON"),
        ("a.jsonl", '{"a": "b"}\n{"a": 1}\n', "line 2: column 'a' holds 1, which does not fit"),
        ("a.jsonl", '{"a": ["b"]}\n{"a": "b"}\n', "line 2: column 'a' holds 'b', which does not"),
        ("a.jsonl", '{"a": "b"}\n{"a": "\\ud800"}\n', "line 2: column 'a' holds half of a surr"),
        ("a.jsonl", "", "a.jsonl' holds no rows"),
        ("a.json", "[]", "a.json' holds no rows"),
        ("a.csv", "", "a.csv' holds no rows"),
        ("a.csv", "a,b\n", "a.csv' holds no rows"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: there are 1 values for the 2 columns"),
        ("a.csv", 'a,b\n1,"2\n', "is not CSV in UTF-8 near line 2"),
        ("a.csv", b"a,b\n1,\xff\n", "is not CSV in UTF-8"),
        ("a.csv", "a,a\n1,2\n", "names a column twice"),
        ("a.parquet", "a", "a.parquet' cannot be read as Parquet"),
        ("a.txt", "a", "ends in '.txt'"),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=name) as error:
        read_rows(path, "train")
    assert message in str(error.value)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_file": "a", "dataset_name": "b"}, "training rows come from one place"),
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
        ({"train_file": "a", "max_eval_rows": 5}, "there are no held-out rows"),
    ],
)
def test_a_setting_that_would_be_ignored_is_an_error(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def test_all_splits_are_read_by_name(splits: str, train_file: str, tmp_path: Path) -> None:
    found = {name: part.to_list() for name, part in rows.read_splits(splits).items()}
    assert found == {"train": ROWS[:6], "test": ROWS[6:10], "extra": ROWS[10:]}
    assert [*rows.read_splits(train_file)] == ["train"]
    DatasetDict({"only": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "single")
    assert rows.read_splits(str(tmp_path / "single"))["train"].to_list() == ROWS
    with pytest.raises(ValueError, match="not one that `datasets` saved"):
        rows.read_splits(str(tmp_path))
