"""Checks of a step's batches before any model sees them: what is trained, and where it ends."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.models.loading import stop_tokens
from hf_sft_plugin.types import IGNORE_INDEX, visible
from hf_sft_plugin.verification.checks import VerificationCheck, not_run
from hf_sft_plugin.verification.first_step import FirstStep

BATCH_CHECKS = ("labels", "stop tokens")
_NUM_CHARACTERS = 60

_ON_LABELS = (
    "The label of a position is the token at it; the trainer moves labels one step left by itself. "
    "Here they are other tokens, as when a collator has moved them already: have it leave them "
    "in place, with -100 where nothing is trained."
)
_ON_STOPS = (
    "The model would not learn to stop there. The response mask, or the labels, have to reach as "
    "far as the token at which inference stops, and the rows have to hold it: prepare_dataset "
    "makes such rows, and recipes/preview.py shows what of a row is trained."
)


class Span(NamedTuple):
    """Tokens that are trained, one after another, in one row.

    Attributes:
        ids: The tokens.
        following: The token after them; None at the end of the row.
        row_length: Tokens of the row.
        is_last: Whether no other span of the row follows.
    """

    ids: NDArray[np.int64]
    following: int | None
    row_length: int
    is_last: bool


def check_batches(step: FirstStep) -> list[VerificationCheck]:
    """Compares labels with tokens, and reads the trained spans again.

    Args:
        step: Its micro-batches are looked at, nothing is run.
    """
    parts = [
        {
            name: value.cpu().numpy()
            for name in ("input_ids", "labels", "attention_mask")
            if (value := part.get(name)) is not None
        }
        for part in step.microbatches
    ]
    if not all("input_ids" in part for part in parts):
        return [not_run(name, "the batches have no input_ids") for name in BATCH_CHECKS]
    trained = [part["labels"] != IGNORE_INDEX for part in parts]
    pairs = list(zip(parts, trained, strict=True))
    num_other = sum(int((p["labels"] != p["input_ids"])[t].sum()) for p, t in pairs)
    num_trained = sum(int(t.sum()) for t in trained)
    note = f"of {num_trained:,} trained tokens have another label"
    labels = VerificationCheck(BATCH_CHECKS[0], num_other, 0, note, _ON_LABELS)
    return [labels, _check_stops(step, [span for part in parts for span in find_spans(part)])]


def find_spans(part: Mapping[str, NDArray[Any]]) -> Iterator[Span]:
    """The trained spans of the rows of a batch."""
    mask = part.get("attention_mask", np.ones_like(part["input_ids"]))
    for ids, labels, is_real in zip(part["input_ids"], part["labels"], mask == 1, strict=True):
        ids, is_trained = ids[is_real], (labels != IGNORE_INDEX)[is_real]
        edges = np.flatnonzero(np.diff(np.pad(is_trained, 1).astype(np.int8)))
        for start, end in edges.reshape(-1, 2):
            following = int(ids[end]) if end < len(ids) else None
            yield Span(ids[start:end], following, len(ids), bool(end == edges[-1]))


def _check_stops(step: FirstStep, spans: list[Span]) -> VerificationCheck:
    name, trainer = BATCH_CHECKS[1], step.trainer
    # A processor of several kinds of data carries the tokenizer.
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return not_run(name, "the trainer has no tokenizer; give it as processing_class")
    stops = getattr(trainer, "stop_token_ids", None)
    if stops is None:
        stops = stop_tokens(step.unwrapped, tokenizer, None)
    if not spans or not stops:
        reason = "no token of these rows is trained" if stops else "the tokenizer has no eos token"
        return not_run(name, reason)
    stopped = [span.ids[-1] in stops for span in spans]
    lost = [
        not is_stopped and span.following in stops
        for span, is_stopped in zip(spans, stopped, strict=True)
    ]
    lengths = {span.row_length for span in spans}
    ledger = getattr(trainer, "ledgers", {}).get("train")
    # Rows of one length are blocks, or cut.
    all_stop = not any(stopped) and len(lengths) > 1
    if ledger is not None:
        all_stop = 0 < ledger.num_stopped == ledger.num_examples
    if all_stop:
        lost = [
            not s if span.is_last else n for span, s, n in zip(spans, stopped, lost, strict=True)
        ]
    shown = lost.index(True) if any(lost) else 0
    text = visible(str(tokenizer.decode(spans[shown].ids))).replace("\n", " ")
    if len(text) > _NUM_CHARACTERS:
        half = _NUM_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    note = (
        f"of {len(spans):,} trained spans lose theirs, {sum(stopped):,} end with one; "
        f"{'the first that does not' if any(lost) else 'the first'}: {text!r}"
    )
    return VerificationCheck(name, sum(lost), 0, note, _ON_STOPS)
