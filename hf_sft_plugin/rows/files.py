"""Rows and chat templates from files, exactly as they are written there."""

import csv
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

# By this file a folder of shards is known, whose rows are tokens already; see shards/.
METADATA = "dataset_metadata.json"
_ROWS_AT_A_TIME = 1000
_CACHE_VERSION = 1
# What pyarrow and Python raise for values that one typed column cannot hold.
_UNFIT = (pa.ArrowException, OverflowError, UnicodeEncodeError)

# Rows with the place of each in its file, for messages.
PlacedRows = Iterator[tuple[str, dict[str, Any]]]
Batch = list[tuple[str, dict[str, Any]]]


class _UnfitError(ValueError):
    """The values of a column have no type in common."""


def read_rows(path: str, split: str | None, setting: str = "train_split") -> Dataset:
    """Reads rows from a file, or from a folder that `datasets` saved.

    Text stays what it is in the file: `NA` in a CSV is not a missing value, and `"2024-01-01"` in a
    JSON is not a date, as they are for the loaders of `datasets`. JSON and CSV files are therefore
    read here, a thousand rows at a time, in two passes: the first checks every row and finds the
    type of every column, the second writes an Arrow file to the cache of `datasets`. That file is
    mapped into memory, by later runs at once, so memory never holds all rows; only a JSON file that
    is one long list is parsed as a whole. All columns of a CSV are text.

    Args:
        path: The file or folder.
        split: Which split of a saved `DatasetDict`; None takes the only one.
        setting: The name of the setting that holds `split`, for messages.

    Raises:
        ValueError: If there is no such file or split, or a row cannot be read; names its line.
    """
    if Path(path).is_dir():
        return _read_folder(path, split, setting)
    if not Path(path).exists():
        raise ValueError(f"There is no '{path}' to read rows from.")
    suffix = Path(path).suffix
    if suffix not in (*_READERS, ".parquet"):
        raise ValueError(
            f"'{path}' ends in '{suffix}'; rows are read from "
            f"{', '.join((*_READERS, '.parquet'))} files and from folders saved by `datasets`."
        )
    if split not in (None, "train"):
        raise ValueError(
            f"{setting} is '{split}', but '{path}' is a single file, which has no splits. Leave "
            f"{setting} out, or name a folder saved by `datasets` with this split."
        )
    if suffix == ".parquet":
        try:
            return load_dataset("parquet", data_files=path, split="train")
        except (DatasetGenerationError, pa.ArrowInvalid) as error:
            reason = error.__cause__ or error
            raise ValueError(f"'{path}' cannot be read as Parquet: {reason}. Repair it.") from error
    return Dataset.from_file(str(_cache_rows(path)))


def read_chat_template(path: str) -> str:
    """Reads a chat template from a file of its own.

    Raises:
        ValueError: If there is no such file, or it is not text in UTF-8.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"chat_template_path is '{path}', but there is no such file, so the turns of a "
            "conversation could not be rendered. Correct the path."
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"chat_template_path is '{path}', which is not text in UTF-8 ({error}), so it is no "
            "chat template, or one that was saved in another encoding. Save it in UTF-8."
        ) from None


def read_splits(path: str) -> dict[str, Dataset]:
    """Reads all rows of a file or folder by split; those that have none are `train`.

    Args:
        path: See `read_rows`.

    Raises:
        ValueError: See `read_rows`.
    """
    saved = _load_folder(path) if Path(path).is_dir() else None
    # A single split is all there is, whatever it is called.
    if isinstance(saved, DatasetDict) and len(saved) > 1:
        return dict(saved)
    return {"train": read_rows(path, None)}


def _load_folder(path: str) -> Any:
    if is_shard_set(path):
        raise ValueError(
            f"'{path}' is a folder of shards, whose rows are tokens already, so they are not read "
            "from it as rows. Train on it as it is, with ShardDataset, or name the files that it "
            "was made of."
        )
    try:
        return load_from_disk(path)
    except FileNotFoundError:
        raise ValueError(
            f"'{path}' is a folder, but not one that `datasets` saved with save_to_disk. Name a "
            "file in it instead."
        ) from None


def _read_folder(path: str, split: str | None, setting: str) -> Dataset:
    saved = _load_folder(path)
    if isinstance(saved, DatasetDict):
        only = next(iter(saved)) if split is None and len(saved) == 1 else split
        if only in saved:
            return saved[only]
        found = f"{setting} is '{split}', which is not there" if split else f"{setting} names none"
        raise ValueError(
            f"'{path}' has the splits {', '.join(saved)}; {found}. Set {setting} to one of them."
        )
    if split not in (None, "train"):
        raise ValueError(
            f"{setting} is '{split}', but '{path}' holds one dataset without splits. Leave "
            f"{setting} out."
        )
    return saved


def rows_to_dataset(rows: list[dict[str, Any]], name: str) -> Dataset:
    """Rows in memory as a dataset, whose columns have one type each.

    Args:
        rows: Not empty.
        name: What messages call them.

    Raises:
        ValueError: If the values of a column have no type in common; names the first such row.
    """
    placed = [(f"row {index}", row) for index, row in enumerate(rows)]
    schema, rewrite = _find_schema(lambda: [placed], name)
    return Dataset(pa.Table.from_pylist([rewrite(row) for row in rows], schema=schema))


def _cache_rows(path: str) -> Path:
    """The rows of a JSON or CSV file as an Arrow file; written unless it is there already."""
    state = Path(path).stat()
    # A file that was changed is another file.
    key = (str(Path(path).resolve()), state.st_mtime_ns, state.st_size, _CACHE_VERSION)
    cached = Path(HF_DATASETS_CACHE, "hf_sft_rows", Hasher.hash(key) + ".arrow")
    if cached.is_file():
        return cached
    schema, rewrite = _find_schema(lambda: _batches(path), f"'{path}'")
    if not schema.names:
        raise ValueError(f"'{path}' holds no rows. At least one is needed.")
    cached.parent.mkdir(parents=True, exist_ok=True)
    # Processes may do this side by side; each puts a whole file in place.
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        written = Path(folder, cached.name)
        with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(path):
                rows = [rewrite(row) for _, row in batch]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        written.replace(cached)
    return cached


def _batches(path: str) -> Iterator[Batch]:
    rows = _READERS[Path(path).suffix](path)
    while batch := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
        yield batch


def _find_schema(
    read: Callable[[], Iterable[Batch]], name: str
) -> tuple[pa.Schema, Callable[[dict[str, Any]], dict[str, Any]]]:
    """The schema that holds all rows, and what is to be done to them first.

    A content may be text in one message and a list of parts in another, but Arrow gives it one
    type. Text is then written as a list of one part, which means the same.
    """
    first: ValueError | None = None
    for rewrite in (_as_it_is, _with_parts):
        schema = pa.schema([])
        try:
            for batch in read():
                schema = _widen(schema, [(place, rewrite(row)) for place, row in batch], name)
        except _UnfitError as error:
            first = first or error
            continue
        return schema, rewrite
    assert first is not None
    raise first


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _with_parts(value: Any) -> Any:
    """The value with every text that is the content of a message as a list of one part."""
    if isinstance(value, list):
        return [_with_parts(item) for item in value]
    if not isinstance(value, dict):
        return value
    row = {key: _with_parts(item) for key, item in value.items()}
    if "role" in row and isinstance(row.get("content"), str):
        row["content"] = [{"type": "text", "text": row["content"]}]
    return row


def _widen(schema: pa.Schema, batch: Batch, name: str) -> pa.Schema:
    """The schema that holds further rows as well."""
    try:
        return _join(schema, [row for _, row in batch])
    except _UNFIT:
        pass
    # Once more row by row, because pyarrow does not say which one it was.
    for place, row in batch:
        for column, value in row.items():
            try:
                schema = _join(schema, [{column: value}])
            except UnicodeEncodeError:
                raise ValueError(
                    f"{name}, {place}: column '{column}' holds half of a surrogate pair, which "
                    "no tokenizer can encode. Repair the text, or remove the row."
                ) from None
            except _UNFIT as error:
                raise _UnfitError(
                    f"{name}, {place}: column '{column}' holds {value!r:.60}, which does not fit "
                    f"into one column with the values before it: {error}. Write all of them in "
                    "one way, for example as text, or remove the column."
                ) from None
    return schema


def _join(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Schema:
    columns = dict.fromkeys(column for row in rows for column in row)
    fields = [(name, pa.array([row.get(name) for row in rows]).type) for name in columns]
    return pa.unify_schemas([schema, pa.schema(fields)], promote_options="permissive")


def _read_json(path: str) -> PlacedRows:
    """Rows of a JSON Lines file, or of a JSON file that is one list."""
    with open(path, "rb") as file:
        is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        rows = _parse_list(file.read(), path) if is_list else _parse_lines(file, path)
        for place, row in rows:
            if not isinstance(row, dict):
                raise ValueError(
                    f"'{path}', {place} holds {row!r:.60}, but a row is a JSON object such as "
                    '{"prompt": "...", "response": "..."}. Repair or remove it.'
                )
            yield place, row


def _parse_lines(file: Any, path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                what: object = error
                if isinstance(error, json.JSONDecodeError):
                    what = f"{error.msg} (character {error.pos + 1})"
                raise ValueError(
                    f"'{path}', line {number} is not JSON: {what}. Each line has to be one JSON "
                    "object, or the whole file one list of them. Repair or remove it."
                ) from None


def _parse_list(content: bytes, path: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"'{path}' is not JSON: {error}. It begins as a list, so all of it has to be one list "
            "of objects. Repair it, or write one object per line."
        ) from None
    for index, row in enumerate(rows):
        yield f"row {index}", row


def _read_csv(path: str) -> PlacedRows:
    """Rows of a CSV file, every value as text."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            if len(set(header)) < len(header):
                raise ValueError(
                    f"'{path}' names a column twice in its first line, {header}, so one of the two "
                    "would be lost. Rename it."
                )
            for values in lines:
                if values and len(values) != len(header):
                    raise ValueError(
                        f"'{path}', line {lines.line_num}: there are {len(values)} values for the "
                        f"{len(header)} columns {header}. Put text with commas or line breaks in "
                        "double quotes."
                    )
                if values:
                    yield f"line {lines.line_num}", dict(zip(header, values, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"'{path}' is not CSV in UTF-8 near line {lines.line_num}: {error}. Repair it."
            ) from None


_READERS: dict[str, Callable[[str], PlacedRows]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
}


def is_shard_set(folder: str | Path) -> bool:
    """Whether a folder holds shards, whole or damaged."""
    return Path(folder, METADATA).is_file()
