"""Rows are read from every form as they are written, and what cannot be read is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_sft_plugin import tokenize_example
from hf_sft_plugin.rows import files as row_files
from hf_sft_plugin.rows.files import (
    read_chat_template,
    read_rows,
    read_splits,
    rows_to_dataset,
)

ROWS = [{"prompt": f"Say {number}", "response": f"{number}!"} for number in range(12)]
TEXTS = ["NA", "null", "None", "nan", "", "42", "1e5", "true", "2024-01-01", "2024-01-01T00:00:00Z"]


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
    monkeypatch.setattr(row_files, "_ROWS_AT_A_TIME", 2)
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
    batches = row_files._batches
    monkeypatch.setattr(row_files, "_batches", None)
    assert read_rows(path, "train").to_list() == ROWS
    monkeypatch.setattr(row_files, "_batches", batches)
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
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "a"}]}\n{"prompt": "b"}\n', "line 2"),
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


def test_contents_may_be_text_here_and_parts_there(tmp_path: Path, tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "world"}
    parts = [{"type": "text", "text": "what is"}, {"type": "text", "text": "the", "train": False}]
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, answer]},
        {"messages": [{"role": "user", "content": "hello"}, {**answer, "content": parts}]},
    ]
    expected = [tokenize_example(row, tokenizer) for row in rows]
    path = write(tmp_path / "rows.jsonl", as_lines(rows))
    for found in (read_rows(path, None), rows_to_dataset(rows, "The data")):
        assert [tokenize_example(row, tokenizer) for row in found] == expected


def test_rows_in_memory_that_fit_no_column_are_named() -> None:
    rows = [{"a": "b"}, {"a": "c"}, {"a": 5}]
    with pytest.raises(ValueError, match="The train data, row 2: column 'a' holds 5, which does"):
        rows_to_dataset(rows, "The train data")


def test_a_folder_of_shards_holds_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "dataset_metadata.json", "{}")
    with pytest.raises(ValueError, match=r"is a folder of shards, .* Train on it as it is"):
        read_rows(str(tmp_path), None)
    with pytest.raises(ValueError, match="is a folder of shards"):
        read_splits(str(tmp_path))


def test_all_splits_are_read_by_name(splits: str, train_file: str, tmp_path: Path) -> None:
    found = {name: part.to_list() for name, part in read_splits(splits).items()}
    assert found == {"train": ROWS[:6], "test": ROWS[6:10], "extra": ROWS[10:]}
    assert [*read_splits(train_file)] == ["train"]
    DatasetDict({"only": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "single")
    assert read_splits(str(tmp_path / "single"))["train"].to_list() == ROWS
    with pytest.raises(ValueError, match="not one that `datasets` saved"):
        read_splits(str(tmp_path))


def test_a_chat_template_is_read_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jinja", "{{ 1 }}\n\u00e9".encode())
    assert read_chat_template(path) == "{{ 1 }}\n\u00e9"


def test_a_chat_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"chat_template_path is 'no\.jinja', but there is no such"
    ):
        read_chat_template("no.jinja")
    path = write(tmp_path / "latin.jinja", "{{ 1 }} \u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jinja', which is not text in UTF-8 \('utf-8'"):
        read_chat_template(path)
