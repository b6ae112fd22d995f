"""What a single value of a raw row may be: text, a list, a weight, a flag, or JSON-like."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sft_plugin.rows.formats import RowFormat
from hf_sft_plugin.types import DataOptions, RowError


@dataclass(slots=True)
class RowSource:
    """A raw row with what is needed to read it.

    Attributes:
        row: The raw row.
        index: Its position in the dataset, for error messages.
        row_format: Which of its columns hold what.
        options: What is trained of it, and in what form.
    """

    row: Mapping[str, Any]
    index: int
    row_format: RowFormat
    options: DataOptions

    def value(self, part: str) -> Any:
        """What the row holds of a part; None where it has none."""
        return self.row_format.value(self.row, part)

    def place(self, part: str) -> str:
        """Where a part is, in the words of an error message."""
        return f"column {self.row_format.column(part)!r}"

    def error(self, problem: str, reason: str) -> RowError:
        """The error that names this row."""
        return RowError(self.index, problem, reason)

    def text(self, part: str) -> str:
        """A part that has to be text."""
        value = self.value(part)
        if not isinstance(value, str):
            found = type(value).__name__
            raise self.error(
                f"{self.place(part)} holds {found}, but text is needed. Convert or remove the row.",
                f"{self.row_format.column(part)} is {found}, not text",
            )
        if not value.isascii():
            check_unicode(value, self.index, self.place(part))
        return value

    def entries(self, part: str, needed: str) -> list[Any]:
        """A part that has to be a list with something in it."""
        value = self.value(part)
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else type(value).__name__
            raise self.error(
                f"{self.place(part)} holds {found}, but {needed} is needed. Convert or remove the "
                "row.",
                f"{self.row_format.column(part)} is {found}, not {part}",
            )
        return value


def check_texts(texts: Sequence[Any], name: str) -> None:
    """Refuses a list in which not every entry is text that a tokenizer can encode.

    Args:
        texts: The list.
        name: What the caller calls it, for error messages.

    Raises:
        ValueError: If it is one text rather than a list.
        RowError: If an entry is not text, or is broken Unicode.

    Examples:
        >>> check_texts(["hello", None], "prompts")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        hf_sft_plugin.types.RowError: Row 1: prompts holds ...
    """
    if isinstance(texts, str):
        raise ValueError(f"{name} is one text, but a list of texts is needed. Write [text].")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            found = type(text).__name__
            raise RowError(
                index,
                f"{name} holds {found}, but text is needed. Convert or remove the row.",
                f"{name} is {found}, not text",
            )
        check_unicode(text, index, name)


def check_unicode(text: str, index: int, place: str) -> None:
    """Refuses text that no tokenizer can encode.

    Args:
        text: The text.
        index: Its row, for error messages.
        place: Its column, for error messages.

    Raises:
        RowError: If the text holds a lone surrogate.

    Examples:
        >>> check_unicode("caf\u00e9", 0, "prompt")
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            index,
            f"{place} holds half of a surrogate pair at character {error.start}, which no "
            "tokenizer can encode. Repair the text, e.g. with "
            "text.encode('utf-8', 'replace').decode().",
            "broken Unicode",
        ) from error


def without_nulls(value: Any, source: RowSource, place: str) -> Any:
    """The value without the keys that hold None, at any depth; itself where there are none.

    Arrow gives every struct the keys of all others, filled with None; chat templates test for
    presence, so an absent key has to be absent again.

    Args:
        value: A value of a message or of a tool's schema.
        source: The row, for error messages.
        place: Where in the row, for error messages.

    Raises:
        RowError: If anything in it is neither text, number, flag, list nor dict with text keys,
            or is broken Unicode.
    """
    if isinstance(value, str):
        check_unicode(value, source.index, place)
        return value
    if isinstance(value, Mapping):
        return _dict_without_nulls(value, source, place)
    if isinstance(value, list | tuple):
        items = [without_nulls(item, source, place) for item in value]
        is_same = all(new is old for new, old in zip(items, value, strict=True))
        return value if is_same and isinstance(value, list) else items
    if value is None or isinstance(value, bool | int | float):
        return value
    raise _unwritable(value, source, place)


def read_weight(value: Any, share: float, source: RowSource, place: str) -> float:
    """How much a part counts: its own weight times that of the whole it belongs to.

    Args:
        value: The weight; None counts 1.
        share: The weight of the whole.
        source: The row, for error messages.
        place: Where in the row, for error messages.

    Raises:
        RowError: If it is not a finite number of 0 or more.
    """
    if value is None:
        return share
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            product = float(value) * share
        except OverflowError:
            product = math.inf
        if value >= 0 and math.isfinite(product):
            return product
    raise source.error(
        f"{place} has the weight {value!r:.40}, but a finite number of 0 or more is needed. "
        "Correct the weight, or name a column that is no weight in ignored_columns.",
        "a weight is not a finite number of 0 or more",
    )


def read_flag(value: Any, source: RowSource, place: str) -> bool | None:
    """Whether a part says that it is trained; None where it says nothing.

    Raises:
        RowError: If it says something other than true or false.
    """
    if value is None or isinstance(value, bool):
        return value
    raise source.error(
        f"{place} has 'train': {value!r:.40}, but true or false is needed. Convert it.",
        "train is not true or false",
    )


def _dict_without_nulls(value: Mapping[Any, Any], source: RowSource, place: str) -> Any:
    kept = {}
    is_same = isinstance(value, dict)
    for key, item in value.items():
        if not isinstance(key, str):
            raise _unwritable(key, source, place)
        if not key.isascii():
            check_unicode(key, source.index, place)
        if item is None:
            is_same = False
        elif isinstance(item, str):
            # Most values are ASCII text, which says so of itself without being read.
            if not item.isascii():
                check_unicode(item, source.index, place)
            kept[key] = item
        else:
            kept[key] = without_nulls(item, source, place)
            is_same = is_same and kept[key] is item
    return value if is_same else kept


def _unwritable(value: Any, source: RowSource, place: str) -> RowError:
    found = type(value).__name__
    return source.error(
        f"{place} holds {found} {value!r:.40}, which no chat template can write. Convert it to "
        "text, or remove the row.",
        f"a message holds {found}",
    )
