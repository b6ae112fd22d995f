"""Where two setups train different text: compared by what it says, row by row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, zip_longest

from hf_sft_plugin.preview.preview import (
    PreviewedRow,
    Rows,
    TokenizationSetup,
    batches_of,
    preview_outcome,
    tokenize_like,
)
from hf_sft_plugin.tokens.row_tokenizer import RowOutcome
from hf_sft_plugin.types import RowError

_CONTEXT_LENGTH = 24
# Control tokens, words with the space before them, spaces, and any other character by itself.
_WORD = re.compile(r"<[^<>\s]{1,40}>|\s*\w+|\s+|.", re.DOTALL)

# A text, and for each of its characters whether it is trained.
_MarkedText = tuple[str, list[bool]]


@dataclass(frozen=True)
class TextChange:
    """Text that is trained with one setup and not with the other.

    Attributes:
        here: True: trained with the first setup only; False: with the second only.
        before: A little of the text before it.
        text: The text.
        after: A little of the text after it.
    """

    here: bool
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class RowChange:
    """A row of which two setups train different text.

    Attributes:
        row: Position of the row in its dataset.
        changes: What is trained by one of them only, in order.
        here: Why the first setup sets the row aside; None where it does not.
        there: Why the second does.
    """

    row: int
    changes: tuple[TextChange, ...]
    here: RowError | None
    there: RowError | None


@dataclass(frozen=True)
class Diff:
    """Where two setups differ.

    Attributes:
        num_rows: Rows compared.
        num_changed: Rows of which they train different text.
        rows: The first few of those.
    """

    num_rows: int
    num_changed: int
    rows: tuple[RowChange, ...]


def diff_rows(
    dataset: Rows,
    here: TokenizationSetup,
    there: TokenizationSetup,
    *,
    num_rows: int = 5,
    containing: str | None = None,
    source: str | None = None,
) -> Diff:
    """Finds the rows of which two setups train different text.

    Where both write a row alike, as far as they keep it, characters are compared; where they do not
    (another chat template), the words that are trained.

    Args:
        dataset: See `preview_rows`.
        here: The first setup.
        there: The second.
        num_rows: How many changed rows are shown at most; all are counted.
        containing: See `preview_rows`.
        source: See `preview_rows`.

    Raises:
        ValueError: If columns, tokenizer or options do not fit each other.
    """
    num_compared, num_changed = 0, 0
    shown: list[RowChange] = []
    for rows, indices in batches_of(dataset, here, containing, source):
        pairs = zip(
            tokenize_like(rows, indices, here), tokenize_like(rows, indices, there), strict=True
        )
        for row, (one, other) in zip(rows, pairs, strict=True):
            num_compared += 1
            if here.tokenizer is there.tokenizer and _alike(one, other):
                continue
            change = compare_rows(
                preview_outcome(one, row, here), preview_outcome(other, row, there)
            )
            if change is not None:
                num_changed += 1
                shown += [change][: num_rows - len(shown)]
    return Diff(num_compared, num_changed, tuple(shown))


def _alike(one: RowOutcome, other: RowOutcome) -> bool:
    return one.examples == other.examples and (one.error is None) == (other.error is None)


def compare_rows(here: PreviewedRow, there: PreviewedRow) -> RowChange | None:
    """What of one row is trained by one of two setups only; None where they train the same."""
    one, other = _marked_text(here), _marked_text(there)
    if one[0].startswith(other[0]) or other[0].startswith(one[0]):
        marks = list(zip_longest(one[1], other[1], fillvalue=False))
        only_here = [mine and not yours for mine, yours in marks]
        only_there = [yours and not mine for mine, yours in marks]
    elif _trained_texts(here) == _trained_texts(there):
        only_here, only_there = [], []
    else:
        only_here, only_there = _compare_words(one, other)
    found = [
        *_changes(one[0], only_here, here=True),
        *_changes(other[0], only_there, here=False),
    ]
    if not found and (here.error is None) == (there.error is None):
        return None
    changes = tuple(change for _, change in sorted(found, key=lambda pair: pair[0]))
    return RowChange(here.row, changes, here.error, there.error)


def _marked_text(row: PreviewedRow) -> _MarkedText:
    """All examples of a row as one text."""
    text = ""
    marks: list[bool] = []
    for number, example in enumerate(row.examples):
        if number:
            text += "\n"
            marks.append(False)
        for piece in example.pieces:
            marks += [piece.trained] * len(piece.text)
        text += "".join(piece.text for piece in example.pieces)
    return text, marks


def _trained_texts(row: PreviewedRow) -> list[str]:
    return [
        "".join(piece.text for piece in pieces)
        for example in row.examples
        for trained, _, pieces in example.runs()
        if trained
    ]


def _compare_words(here: _MarkedText, there: _MarkedText) -> tuple[list[bool], list[bool]]:
    """Characters that are trained on one side, in words that the other side does not train."""
    ones, others = _words(here), _words(there)
    only_here, only_there = [False] * len(here[0]), [False] * len(there[0])
    # Rows that differ by truncation begin alike, which needs no search.
    num_alike = 0
    while num_alike < min(len(ones), len(others)) and ones[num_alike] == others[num_alike]:
        num_alike += 1
    matcher = SequenceMatcher(
        None,
        [word[:2] for word in ones[num_alike:]],
        [word[:2] for word in others[num_alike:]],
        autojunk=False,
    )
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            continue
        for marks, words in (
            (only_here, ones[num_alike + i : num_alike + j]),
            (only_there, others[num_alike + k : num_alike + m]),
        ):
            for word, trained, start in words:
                marks[start : start + len(word)] = [trained] * len(word)
    return only_here, only_there


def _words(marked: _MarkedText) -> list[tuple[str, bool, int]]:
    """Words with whether they are trained and where they begin; cut at the edges of spans."""
    words, start = [], 0
    for trained, marks in groupby(marked[1]):
        end = start + len(list(marks))
        words += [
            (match.group(), trained, match.start())
            for match in _WORD.finditer(marked[0], start, end)
        ]
        start = end
    return words


def _changes(text: str, marks: Sequence[bool], here: bool) -> list[tuple[int, TextChange]]:
    """The marked runs of a text, each with its position."""
    changes, start = [], 0
    for marked, run in groupby(marks):
        end = start + len(list(run))
        if marked:
            before = _shorten(text[:start], keep_end=True)
            after = _shorten(text[end:], keep_end=False)
            changes.append((start, TextChange(here, before, text[start:end], after)))
        start = end
    return changes


def _shorten(text: str, keep_end: bool) -> str:
    if len(text) <= _CONTEXT_LENGTH:
        return text
    return "\u2026" + text[-_CONTEXT_LENGTH:] if keep_end else text[:_CONTEXT_LENGTH] + "\u2026"
