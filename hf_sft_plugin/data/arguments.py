"""Arguments that are something else than what is asked for, refused with the line to write."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

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


def require_rows_of_one(dataset: object) -> None:
    """Refuses what is not one dataset or one list of rows.

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


def require_choice(value: object, choices: Collection[object], name: str) -> None:
    """Refuses a value that is none of those there are.

    Raises:
        ValueError: If it is another.
    """
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}, but it has to be one of {known}.")
