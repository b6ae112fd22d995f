"""Arguments that are something else than what is asked for, refused with the line to write."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def require_tokenizer(tokenizer: object, name: str = "tokenizer") -> None:
    """Refuses what is no tokenizer.

    Raises:
        ValueError: If it is none, such as its name.

    Examples:
        >>> require_tokenizer("gpt2")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: tokenizer is 'gpt2', ... Write AutoTokenizer.from_pretrained('gpt2').
    """
    if isinstance(tokenizer, str | os.PathLike):
        text = os.fspath(tokenizer)
        raise ValueError(
            f"{name} is {text!r}, but a tokenizer itself is needed, not its name. Write "
            f"AutoTokenizer.from_pretrained({text!r})."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"{name} is a {type(tokenizer).__name__}, but text needs a tokenizer. For a processor "
            "pass its tokenizer, processor.tokenizer."
        )


def refuse_name(dataset: object, name: str) -> None:
    """Refuses the name or path of a dataset, also as one of several by name.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(dataset, Mapping):
        for part, rows in dataset.items():
            refuse_name(rows, f"{name}[{part!r}]")
    if isinstance(dataset, str | os.PathLike):
        text = os.fspath(dataset)
        loader = _LOADERS.get(Path(text).suffix)
        source = repr(text) if loader is None else f"{loader!r}, data_files={text!r}"
        raise ValueError(
            f"{name} is {text!r}, but the rows themselves are needed, not where they are. Write "
            f"datasets.load_dataset({source}, split='train')."
        )


def stored_rows(dataset: Dataset, name: str, is_trained: bool = True) -> Dataset:
    """The rows of a dataset as they are stored, in the columns that its format shows.

    Args:
        dataset: With any format but a transform.
        name: What it is, as a message begins.
        is_trained: Whether a Trainer could take the rows in place of the caller.

    Raises:
        ValueError: If it has a transform, which would be left out here without a word.
    """
    shown = dataset.format
    if shown["type"] == "custom":
        anew = (
            "To apply it anew in every epoch, give the dataset to a Trainer with "
            "DataCollatorForPromptResponse and remove_unused_columns=False; to"
        )
        raise ValueError(
            f"{name} has a transform (with_transform or set_transform), which changes rows each "
            "time they are read, but here rows are read as they are stored. Apply it once: "
            "dataset.with_format(None).map(transform, batched=True, "
            f"remove_columns=dataset.column_names). {anew if is_trained else 'To'} leave it out, "
            "pass dataset.with_format(None)."
        )
    stored = dataset.with_format(None)
    shows_all = shown["output_all_columns"] or len(shown["columns"]) == len(stored.column_names)
    return stored if shows_all else stored.select_columns(shown["columns"])


def require_row(row: object, place: str) -> None:
    """Refuses what is no row.

    Args:
        row: Should be columns by name.
        place: What it is, as a message begins.

    Raises:
        ValueError: If it is something else, such as its text alone.
    """
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{place} is {type(row).__name__}, but a row is a dict of columns. Write "
            "{'prompt': ..., 'response': ...}."
        )


def one_dataset(dataset: Any) -> Any:
    """One dataset or one list of rows; a `Dataset` as `stored_rows` gives it.

    Raises:
        ValueError: If it is several datasets, a single row, or a name.
    """
    if isinstance(dataset, Mapping):
        if any(isinstance(value, str) for value in dataset.values()):
            raise ValueError("dataset is a single row, but rows are needed. Write [row].")
        raise ValueError(
            f"There are several datasets, {', '.join(map(str, dataset))}, but the rows of one are "
            f"needed. Pass one of them, such as dataset[{next(iter(dataset), 'train')!r}]."
        )
    refuse_name(dataset, "dataset")
    if isinstance(dataset, list | tuple):
        for index, row in enumerate(dataset):
            require_row(row, f"Row {index} of the dataset")
    return stored_rows(dataset, "The dataset") if isinstance(dataset, Dataset) else dataset


def require_choice(value: object, choices: Collection[object], name: str) -> None:
    """Refuses a value that is none of those there are.

    Raises:
        ValueError: If it is another.
    """
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}, but it has to be one of {known}.")
