"""Which tokens are the response, and the proof: characters become tokens, and decode to the same.

A trained span begins right after the text that inference supplies and ends with the stop token
that inference waits for. Neither the role header before it nor the newline after it is trained.
"""

import re
from collections.abc import Collection, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from hf_sft_plugin.encoding.texts import PartEncoder, TextEncoding
from hf_sft_plugin.masks.rendering import Range, RenderedText, Span
from hf_sft_plugin.types import Boundary, RowError, TrainedSpan


@dataclass
class MaskedText:
    """A rendered text as tokens, with what of it is trained.

    Attributes:
        input_ids: The token ids.
        mask: 1 where a token is trained, else 0.
        weights: How much each token counts; None where every trained one counts 1.
        spans: What is trained, and why.
        proofs: Runs of trained tokens with the text that they must decode to.
        num_straddled: Edges of spans at which the whole text has other tokens than its parts.
    """

    input_ids: MutableSequence[int]
    mask: bytearray
    weights: list[float] | None
    spans: list[TrainedSpan]
    proofs: list[tuple[Sequence[int], str]]
    num_straddled: int


def mask_text(
    rendered: RenderedText,
    encoding: TextEncoding,
    encode: PartEncoder,
    stops: Mapping[int, str],
    boundary: Boundary,
    index: int,
) -> MaskedText:
    """Marks the tokens to train: each span from its first character through its stop token.

    The text is tokenized as a whole. Where a token reaches across the edge of a span, `boundary`
    decides; `split` tokenizes again in parts that meet at this edge, as inference does, which
    tokenizes the prompt alone. It also does so where a response changes the tokens before it: two
    line breaks may be one token at the end of a prompt.

    Args:
        rendered: The text and its spans.
        encoding: The encoding of the whole text.
        encode: Encodes parts of the text.
        stops: The tokens at which inference stops, and their text.
        boundary: See `DataOptions`.
        index: Row of the dataset, for error messages.

    Raises:
        RowError: If a span holds no stop token, or nothing before it, or reaches into the text of
            another turn.
    """
    text = rendered.text
    places = [_find_stop(span, text, stops) for span in rendered.spans]
    edges = _edges(rendered, places, encoding)
    straddled = {edge for edge in edges if not _is_clean(encoding, edge)}
    if boundary == "split":
        starts = edges.intersection(span.start for span in rendered.spans) - straddled
        straddled |= {edge for edge in starts if not encode.is_same_alone(text, encoding, edge)}
    num_straddled = len(straddled) if encoding.tells_characters else 0
    cuts: set[int] = set()
    if boundary == "split" or not encoding.tells_characters:
        while straddled - cuts:
            cuts |= straddled
            parts = [text[start:end] for start, end in pairwise([0, *sorted(cuts), len(text)])]
            encoding = encode(parts)
            straddled = {edge for edge in edges if not _is_clean(encoding, edge)}
    zeros = bytearray(len(encoding.ids))
    has_weights = any(
        span.weight != 1 or any(weight not in (0, 1) for *_, weight in span.weighted)
        for span in rendered.spans
    )
    weights = [0.0] * len(zeros) if has_weights else None
    masked = MaskedText(encoding.ids, zeros, weights, [], [], num_straddled)
    for span, place in zip(rendered.spans, places, strict=True):
        _mask_span(masked, span, place, rendered, encoding, stops, boundary, index)
    if cuts:
        # Inference would not cut an earlier response, which is context by then.
        masked.spans[1:] = [
            made
            if encode([text[: span.start]]).ids == masked.input_ids[: made.start]
            else replace(made, kind="rewritten")
            for span, made in list(zip(rendered.spans, masked.spans, strict=True))[1:]
        ]
    return masked


def check_parts(read: str, expected: str, written: str, index: int) -> None:
    """Refuses a text that reads differently because it was encoded in parts.

    Some tokenizers put a space before each part, which inference would not.

    Args:
        read: The tokens of the parts, decoded.
        expected: The tokens of the whole text, decoded.
        written: The text.
        index: Row of the dataset, for error messages.

    Raises:
        RowError: If something was added.
    """
    # Control tokens may swallow space, but nothing may be added to what is written.
    is_same = "".join(read.split()) == "".join(expected.split()) and len(read) <= len(written)
    if not is_same and read not in (expected, written):
        raise RowError(
            index,
            f"encoded in parts, the text reads {read[:80]!r} instead of {expected[:80]!r}, because "
            "the tokenizer adds to each part. Set boundary to 'include' or 'exclude', as a token "
            "reaches across the edge of a response.",
            "the tokenizer cannot encode in parts",
        )


def _edges(
    rendered: RenderedText, places: Sequence[Range | None], encoding: TextEncoding
) -> set[int]:
    """The characters at which a token has to begin."""
    edges = {span.start for span in rendered.spans}
    edges |= {edge for span in rendered.spans for part in span.weighted for edge in part[:2]}
    for span, place in zip(rendered.spans, places, strict=True):
        if place is None and span.content:
            edges.add(span.content[1])
        if place is not None and not encoding.tells_characters:
            edges.add(place[1])
    return edges - {0, len(rendered.text)}


def _is_clean(encoding: TextEncoding, edge: int) -> bool:
    """Whether one token ends and another begins at a character."""
    if edge in encoding.seams:
        return True
    token = encoding.token_at(edge)
    # White space that offsets leave out could belong to the token on either side.
    return (
        token is not None
        and encoding.characters(token)[0] == edge
        and encoding.token_at(edge - 1) is not None
    )


def _token_from(encoding: TextEncoding, char: int, text: str, boundary: Boundary) -> int:
    """The first token at or after a character; `boundary` decides about one that is cut."""
    if char in encoding.seams:
        return encoding.seams[char]
    covered = char
    while covered < len(text) and encoding.token_at(covered) is None:
        covered += 1
    token = encoding.token_at(covered) if covered < len(text) else len(encoding.ids)
    assert token is not None
    if boundary == "exclude" and covered < len(text):
        # Space that offsets leave out may belong to the token after it.
        is_unclear = char > 0 and encoding.token_at(char - 1) is None
        return token + (is_unclear or encoding.characters(token)[0] < char)
    return token


def _mask_span(
    masked: MaskedText,
    span: Span,
    place: Range | None,
    rendered: RenderedText,
    encoding: TextEncoding,
    stops: Mapping[int, str],
    boundary: Boundary,
    index: int,
) -> None:
    """Marks one span, and notes what its tokens must decode to."""
    text = rendered.text
    if place is None and span.needs_stop:
        raise RowError(
            index,
            f"the response ends in {text[max(span.start, span.bound - 60) : span.bound]!r}, "
            f"without a stop token ({_names(stops.values())}), so the model would never learn to "
            "stop. Set stop_token to the token that ends a turn of the chat template; where it "
            "writes none, multi_turn has to be 'auto' or 'split'.",
            "no stop token after the response",
        )
    start = _token_from(encoding, span.start, text, boundary)
    told, last = place or (_last_character(span),) * 2
    end = _token_from(encoding, last, text, boundary)
    stop: int | None = end
    if place is None:
        cut = encoding.token_at(last)
        end += boundary == "include" and cut is not None and encoding.characters(cut)[0] < last
    else:
        # A control token may include the space after it, so it is found by its first character.
        stop = end - 1 if last in encoding.seams else encoding.token_at(told)
        if stop is None or stops.get(masked.input_ids[stop]) != text[told:last]:
            raise _disagreement(span, span.turn, text[span.start : last], index)
        end = stop + 1
    assert stop is not None
    if start >= stop:
        raise RowError(
            index,
            "the chat template writes nothing of the response but its stop token, so there is "
            "nothing to learn from it. Use a template that writes what the message holds, or "
            "remove the row.",
            "empty response",
        )
    _check_turns(span, (span.start, last), rendered, index)
    if place is not None and span.needs_stop:
        _check_stops(span, place, text, stops, index)
    masked.mask[start:end] = bytes([span.weight > 0]) * (end - start)
    if masked.weights is not None:
        masked.weights[start:end] = [span.weight] * (end - start)
    for first, after, weight in span.weighted:
        tokens = (_token_from(encoding, edge, text, boundary) for edge in (first, after))
        part = slice(*tokens)
        num_tokens = len(masked.mask[part])
        masked.mask[part] = bytes([weight > 0]) * num_tokens
        if masked.weights is not None:
            masked.weights[part] = [weight] * num_tokens
    masked.spans.append(TrainedSpan(start, end, span.turn, span.kind))
    if boundary == "split" or not masked.num_straddled:
        masked.proofs.append((masked.input_ids[start:stop], text[span.start : told]))


def _last_character(span: Span) -> int:
    return span.content[1] if span.content else span.bound


def _find_stop(span: Span, text: str, stops: Mapping[int, str]) -> Range | None:
    """The characters of the stop token that ends a turn: the first one after what it says."""
    if span.content is None and (span.bound == len(text) or span.kind != "rewritten"):
        # Nothing shows where the content ends, but the bound is the end of the turn.
        ending = _any_of(stops.values())
        last = re.compile(rf"({ending})(?:\s|{ending})*\Z").search(text, span.start, span.bound)
        start, stop = (last.start(), last[1]) if last else (-1, "")
    else:
        first = span.content[1] if span.content else span.start
        found = [(text.find(stop, first, span.bound), stop) for stop in stops.values()]
        start, stop = min((f for f in found if f[0] >= 0), default=(-1, ""))
    if start < 0:
        return None
    if not span.needs_stop and text[span.content[1] if span.content else 0 : start].strip():
        return None
    return start, start + len(stop)


def _check_stops(span: Span, place: Range, text: str, stops: Mapping[int, str], index: int) -> None:
    """Refuses a response that goes on behind a stop token, where inference stops."""
    ending = re.compile(_any_of(stops.values()))
    beyond = ""
    if first := ending.search(text, span.start, span.content[0] if span.content else place[0]):
        beyond = text[first.end() : place[0]]
    elif span.has_calls and span.kind != "rewritten":
        last = max((text.rfind(stop, place[1], span.bound) for stop in stops.values()), default=-1)
        beyond = ending.sub("", text[place[1] : max(last, place[1])])
    if beyond.strip():
        raise RowError(
            index,
            f"the chat template writes a stop token within message {span.turn}, before "
            f"{beyond.strip()[:80]!r}, so inference would stop there and never write what follows. "
            "Set stop_token to the token that ends a whole turn of the chat template.",
            "a stop token within a response",
        )


def _any_of(stops: Collection[str]) -> str:
    """A pattern of stop tokens, the longest first."""
    return "|".join(map(re.escape, sorted(stops, key=len, reverse=True))) or "(?!)"


def _check_turns(span: Span, chars: Range, rendered: RenderedText, index: int) -> None:
    """The second derivation: the span holds the content of its turn and no other content."""
    if span.kind == "text":
        return
    for turn, content in enumerate(rendered.contents):
        content = span.content if turn == span.turn else content
        if content is None:
            continue
        is_inside = chars[0] <= content[0] and content[1] <= chars[1]
        overlaps = content[0] < chars[1] and content[1] > chars[0]
        if not is_inside if turn == span.turn else overlaps:
            raise _disagreement(span, turn, rendered.text[slice(*chars)], index)


def _disagreement(span: Span, turn: int, trained: str, index: int) -> RowError:
    return RowError(
        index,
        f"two ways to find the response of message {span.turn} disagree about message {turn}: the "
        f"generation prompt says {trained[:80]!r}. The chat template moves or repeats contents, so "
        "no mask of this row can be trusted. Use another template, or remove the row.",
        "two derivations of the mask disagree",
    )


def _names(texts: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(texts))) or "none is set"
