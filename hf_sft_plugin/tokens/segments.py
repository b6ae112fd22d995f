"""Texts that no chat template touches: joined exactly as they are written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.masks.stop_tokens import end_token
from hf_sft_plugin.types import Segment, TokenizedExample, TrainedSpan


@dataclass(frozen=True)
class JoinedSegments:
    """The segments of one row as tokens.

    Attributes:
        example: Tokens and mask.
        spans: What is trained.
        proofs: Trained token ids, and the text that they must decode to.
    """

    example: TokenizedExample
    spans: list[TrainedSpan]
    proofs: list[tuple[list[int], str]]


def join_segments(
    rows: Sequence[Sequence[Segment]],
    tokenizer: PreTrainedTokenizerBase,
    stops: Mapping[int, str],
    encode_response: Callable[[str], list[int] | None] | None = None,
) -> list[JoinedSegments | None]:
    """Tokenizes segments apart, because inference tokenizes a prompt alone, and joins them.

    The first segment gets the tokenizer's special tokens; the last one, where it is trained, ends
    with a stop token.

    Args:
        rows: The segments of each row; none is empty.
        tokenizer: See `tokenize_example`.
        stops: The tokens that end a response.
        encode_response: Encodes a trained segment, or gives None for the usual way.

    Returns:
        Per row its tokens; None where the tokenizer makes no token of its end.

    Raises:
        ValueError: If nothing could end a response.
    """
    eos = end_token(tokenizer, stops)
    merged = [_merge(segments) for segments in rows]
    firsts = tokenizer([each[0].text for each in merged], verbose=False)["input_ids"]
    later = [segment.text for each in merged for segment in each[1:]]
    encoded = (
        tokenizer(later, add_special_tokens=False, verbose=False)["input_ids"] if later else []
    )
    others = iter(encoded)
    joined: list[JoinedSegments | None] = []
    for parts, first in zip(merged, firsts, strict=True):
        ids = [_opening(first, parts[0].text, tokenizer), *(next(others) for _ in parts[1:])]
        if not ids[-1]:
            joined.append(None)
            continue
        if encode_response is not None:
            others_of = zip(parts[1:], ids[1:], strict=True)
            ids[1:] = [(p.train and encode_response(p.text)) or usual for p, usual in others_of]
        pairs = list(zip(parts, ids, strict=True))
        proofs = [(part_ids, part.text) for part, part_ids in pairs[1:] if part.train]
        if parts[-1].train and ids[-1][-1] not in stops:
            ids[-1] = [*ids[-1], eos]
        joined.append(JoinedSegments(*_join(parts, ids), proofs))
    return joined


def _opening(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a first text: one bos at most, and no eos that the text does not have."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if ids and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _join(
    segments: Sequence[Segment], ids: Sequence[list[int]]
) -> tuple[TokenizedExample, list[TrainedSpan]]:
    """The tokens of segments as one example, and the spans of those that are trained."""
    input_ids: list[int] = []
    mask: list[int] = []
    weights: list[float] = []
    spans = []
    for number, (segment, tokens) in enumerate(zip(segments, ids, strict=True)):
        start, end = len(input_ids), len(input_ids) + len(tokens)
        input_ids += tokens
        mask += [int(segment.train and segment.weight > 0)] * len(tokens)
        weights += [segment.weight] * len(tokens)
        if segment.train and tokens:
            spans.append(TrainedSpan(start, end, number, "text"))
    has_weights = any(segment.weight != 1 for segment in segments if segment.train)
    example: TokenizedExample = {"input_ids": input_ids, "response_mask": mask}
    if has_weights:
        example["loss_weights"] = weights
    return example, spans


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours that are trained alike become one text, as the model reads them."""
    merged = [segments[0]]
    for segment in segments[1:]:
        last = merged[-1]
        if (segment.train, segment.weight) == (last.train, last.weight):
            merged[-1] = replace(last, text=last.text + segment.text)
        else:
            merged.append(segment)
    return merged
