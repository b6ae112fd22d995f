"""A row with its trained tokens: what a run would train, seen before anything is paid for."""

import heapq
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, Literal, TypeAlias

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.masks.stop_tokens import find_stop_token
from hf_sft_plugin.preparation.ledger import remarks_of
from hf_sft_plugin.rows.arguments import one_dataset, require_choice, require_tokenizer
from hf_sft_plugin.rows.formats import detect_format
from hf_sft_plugin.tokens.row_tokenizer import RowOutcome
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows
from hf_sft_plugin.types import DataOptions, RowError, TokenizedExample, TrainedSpan

Only = Literal["longest", "truncated", "set_aside", "split"]
Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]

_BATCH_SIZE = 256
# A character of four bytes takes at most four tokens, or one more where tokens straddle characters.
_LONGEST_GROUP = 8
_RAW_LENGTH = 2000
_BEGINNINGS = {
    "exact": "begins where inference begins to generate",
    "shared_prefix": "begins where a finished response parts from the generation prompt, which "
    "the chat template writes differently before it",
    "rewritten": "begins where inference begins to generate, but inference would have shown it "
    "other earlier turns, or other tokens of them",
    "text": "trained as it is written",
    "given": "the row came tokenized, with this mask",
}


@dataclass(frozen=True)
class TokenizationSetup:
    """Everything that decides what of a row is trained.

    Attributes:
        tokenizer: Tokenizer with its chat template.
        options: See `DataOptions`.
        stop_token_ids: Tokens at which inference stops. None: the tokenizer's eos token.
    """

    tokenizer: PreTrainedTokenizerBase
    options: DataOptions = field(default_factory=DataOptions)
    stop_token_ids: Collection[int] | None = None
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def stops(self) -> frozenset[int]:
        """The tokens that end a response."""
        if self.options.stop_token is not None:
            return frozenset([find_stop_token(self.tokenizer, self.options.stop_token)])
        eos = self.tokenizer.eos_token_id
        given = [] if eos is None else [eos]
        return frozenset(given if self.stop_token_ids is None else self.stop_token_ids)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """What a few tokens in a row say, with the space before a word."""
        if len(token_ids) > 1:
            return self._decode(token_ids)
        (token_id,) = token_ids
        if token_id not in self._texts:
            self._texts[token_id] = self._decode(token_ids)
        return self._texts[token_id]

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))
        token = self.tokenizer.convert_ids_to_tokens(token_ids[0])
        # SentencePiece writes the space before a word so; decoding drops it where a text begins.
        is_stripped = isinstance(token, str) and token.startswith("\u2581") and text[:1] != " "
        return " " + text if is_stripped else text


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that make readable text: one, or all those that share a character.

    Attributes:
        text: What they say.
        ids: Their ids.
        mask: For each, whether it is trained.
        span: Position of its span among the notes of the example; None for context.
    """

    text: str
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    span: int | None

    @property
    def trained(self) -> bool:
        """Whether any of the tokens is trained."""
        return any(self.mask)


@dataclass(frozen=True)
class SpanNote:
    """Why a run of tokens is trained.

    Attributes:
        span: The run.
        num_tokens: How many of its tokens are trained.
        reason: Which message it is and why it is trained, as a sentence.
    """

    span: TrainedSpan
    num_tokens: int
    reason: str


@dataclass(frozen=True)
class PreviewedExample:
    """One example of a row: its text in pieces, and why some of them are trained."""

    pieces: tuple[Piece, ...]
    notes: tuple[SpanNote, ...]

    @property
    def num_trained(self) -> int:
        """Trained tokens."""
        return sum(sum(piece.mask) for piece in self.pieces)

    def runs(self) -> Iterator[tuple[bool, SpanNote | None, list[Piece]]]:
        """Runs of context and of each trained span in order: trained or not, why, what."""
        runs = groupby(self.pieces, key=lambda p: (p.trained, p.span if p.trained else None))
        for (trained, span), pieces in runs:
            yield trained, None if span is None else self.notes[span], list(pieces)


@dataclass(frozen=True)
class PreviewedRow:
    """What became of one row of a dataset, readable.

    Attributes:
        row: Position of the row in its dataset.
        examples: What is trained; several where the row was split, none where it was set aside.
        num_tokens: Tokens before truncation.
        num_lost: Tokens that were cut off.
        error: Why the row is set aside; None where it is trained.
        source: Where the row came from, if the dataset says so.
        raw: Beginning of the row as it is written in the dataset, as JSON.
        remarks: What else is to be known of it, in the words of the ledger.
    """

    row: int
    examples: tuple[PreviewedExample, ...]
    num_tokens: int
    num_lost: int
    error: RowError | None
    source: str | None
    raw: str
    remarks: tuple[str, ...] = ()

    @property
    def num_trained(self) -> int:
        """Trained tokens of all examples."""
        return sum(example.num_trained for example in self.examples)


def preview_rows(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int = 5,
    only: Only | None = None,
    containing: str | None = None,
    source: str | None = None,
    stop_token_ids: Collection[int] | None = None,
    **options: Any,
) -> list[PreviewedRow]:
    """Tokenizes rows as training would, and shows what of them is trained and why.

    Args:
        dataset: Rows in any form that `prepare_dataset` takes.
        tokenizer: See `tokenize_example`.
        num_rows: How many rows at most.
        only: The longest rows, longest first; or the first that are truncated, set aside or split.
        containing: Only rows in which this text stands.
        source: Only rows whose column `source` says this.
        stop_token_ids: See `tokenize_example`.
        **options: Fields of `DataOptions`. With `overflow='error'` a row that would stop the run
            is shown as set aside.

    Returns:
        The rows, in the order of the dataset unless the longest were asked for.

    Raises:
        ValueError: If columns, tokenizer or options do not fit each other.
    """
    require_tokenizer(tokenizer)
    require_choice(only, _FILTERS, "only")
    setup = TokenizationSetup(tokenizer, make_options(options), stop_token_ids)
    keeps = _FILTERS[only]
    found: list[tuple[RowOutcome, Mapping[str, Any]]] = []
    for rows, indices in batches_of(dataset, setup, containing, source):
        outcomes = tokenize_like(rows, indices, setup)
        found += [pair for pair in zip(outcomes, rows, strict=True) if keeps(pair[0])]
        if only == "longest":
            found = heapq.nlargest(num_rows, found, key=lambda pair: pair[0].num_tokens)
        elif len(found) >= num_rows:
            break
    return [preview_outcome(outcome, row, setup) for outcome, row in found[:num_rows]]


def preview_outcome(
    outcome: RowOutcome, row: Mapping[str, Any], setup: TokenizationSetup
) -> PreviewedRow:
    """Makes what became of a row readable.

    Args:
        outcome: What `tokenize_rows` made of the row.
        row: The row.
        setup: What it was made with.
    """
    stops = setup.stops
    spans = outcome.spans or [[] for _ in outcome.examples]
    source = row.get("source")
    return PreviewedRow(
        row=outcome.row,
        examples=tuple(
            _preview_example(example, notes, setup.text_of, stops)
            for example, notes in zip(outcome.examples, spans, strict=True)
        ),
        num_tokens=outcome.num_tokens,
        num_lost=outcome.num_lost,
        error=outcome.error,
        source=str(source) if isinstance(source, str | int) else None,
        raw=json.dumps(dict(row), ensure_ascii=False, default=str)[:_RAW_LENGTH],
        remarks=tuple(remarks_of(outcome)),
    )


def split_pieces(
    input_ids: Sequence[int], text_of: Callable[[Sequence[int]], str]
) -> list[tuple[str, int]]:
    """Cuts tokens into readable pieces.

    Args:
        input_ids: The tokens.
        text_of: What tokens in a row say.

    Returns:
        The text of each piece, and how many tokens it takes.
    """
    pieces = []
    start = 0
    while start < len(input_ids):
        texts = [text_of(input_ids[start : start + 1])]
        if "\ufffd" in texts[0]:
            end = min(start + _LONGEST_GROUP, len(input_ids))
            texts += [text_of(input_ids[start:e]) for e in range(start + 2, end + 1)]
        whole = [num for num, text in enumerate(texts, 1) if "\ufffd" not in text]
        # Bytes that are no text, or stand for the replacement character itself, are one piece.
        unreadable = [num for num, text in enumerate(texts, 1) if text == "\ufffd"]
        num_tokens = whole[0] if whole else (unreadable or [1])[-1]
        pieces.append((texts[num_tokens - 1], num_tokens))
        start += num_tokens
    return pieces


def batches_of(
    dataset: Rows, setup: TokenizationSetup, containing: str | None, source: str | None
) -> Iterator[tuple[list[Mapping[str, Any]], list[int]]]:
    """The rows that pass the filters on what they say, with their positions, some at a time."""
    rows: Rows = one_dataset(dataset)
    if isinstance(rows, Dataset) and len(rows):
        detect_format(rows.column_names, setup.options, rows.features)
    passing = (
        (index, row)
        for index, row in enumerate(rows)
        if (source is None or str(row.get("source")) == source)
        and (containing is None or _holds(row, containing, setup.tokenizer))
    )
    while batch := list(islice(passing, _BATCH_SIZE)):
        yield [row for _, row in batch], [index for index, _ in batch]


def tokenize_like(
    rows: Sequence[Mapping[str, Any]], indices: Sequence[int], setup: TokenizationSetup
) -> list[RowOutcome]:
    """Tokenizes rows as a setup does, without stopping at a row that is too long."""
    options = setup.options
    if options.overflow == "error":
        # A preview should show the row that would stop the run.
        options = replace(options, overflow="drop")
    return tokenize_rows(rows, indices, setup.tokenizer, options, setup.stop_token_ids)


def _holds(value: Any, text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text stands anywhere in a row, however deep."""
    if isinstance(value, str):
        return text in value
    if isinstance(value, Mapping):
        if "input_ids" in value:
            return text in str(tokenizer.decode(value["input_ids"]))
        return any(_holds(part, text, tokenizer) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_holds(part, text, tokenizer) for part in value)
    return False


def _preview_example(
    example: TokenizedExample,
    spans: Sequence[TrainedSpan],
    text_of: Callable[[Sequence[int]], str],
    stops: frozenset[int],
) -> PreviewedExample:
    """The pieces of an example, each with the span it belongs to."""
    ids, mask = example["input_ids"], example["response_mask"]
    span_of = {
        token: number for number, span in enumerate(spans) for token in range(span.start, span.end)
    }
    pieces, start = [], 0
    for text, num_tokens in split_pieces(ids, text_of):
        end = start + num_tokens
        # A piece at the edge of a span may begin outside it.
        inside = [span_of[token] for token in range(start, end) if token in span_of]
        pieces.append(
            Piece(
                text, tuple(ids[start:end]), tuple(mask[start:end]), inside[0] if inside else None
            )
        )
        start = end
    notes = tuple(
        SpanNote(s, sum(mask[s.start : s.end]), _reason(s, example, stops)) for s in spans
    )
    return PreviewedExample(tuple(pieces), notes)


def _reason(span: TrainedSpan, example: TokenizedExample, stops: frozenset[int]) -> str:
    """Why a span is trained, how it ends and how much it counts."""
    if span.kind == "given":
        name = "given"
    else:
        name = f"{'segment' if span.kind == 'text' else 'message'} {span.turn}, {span.kind}"
    parts = [f"{name.replace('_', ' ')}: {_BEGINNINGS[span.kind]}"]
    last = example["input_ids"][: span.end][-1]
    if last in stops:
        parts.append("ends with its stop token")
    elif span.kind not in ("text", "given"):
        parts.append("cut off before its stop token")
    weighed = [*zip(example.get("loss_weights", []), example["response_mask"], strict=False)]
    weights = {weight for weight, trained in weighed[span.start : span.end] if trained}
    if weights - {1.0}:
        low, high = min(weights), max(weights)
        parts.append(f"each token counts {low:g}" + (f" to {high:g}" if low < high else ""))
    return ", ".join(parts)


_FILTERS: Mapping[Only | None, Callable[[RowOutcome], bool]] = {
    None: lambda outcome: True,
    "longest": lambda outcome: True,
    "truncated": lambda outcome: outcome.error is None and outcome.num_lost > 0,
    "set_aside": lambda outcome: outcome.error is not None,
    "split": lambda outcome: len(outcome.examples) > 1,
}
