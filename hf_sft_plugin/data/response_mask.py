"""Which tokens are the response: found from how the chat template renders, never from markers.

A trained span begins right after the text that inference supplies (the turns before the response,
rendered with the generation prompt) and ends with the stop token that inference waits for. Neither
the role header before it nor the newline after it is trained.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.data.conversation import check_unicode
from hf_sft_plugin.types import Conversation, RowError

# Token ids of a text, and the characters `[start, end)` that each token covers. A tokenizer that
# cannot tell gives every token the whole text, which `align_spans` answers by cutting at each edge.
Encoding = tuple[list[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class RenderedText:
    """A conversation as one text.

    Attributes:
        text: What the model reads.
        spans: Characters `[start, end)` of each turn to train: from the end of what inference
            supplies to the end of the turn, which comes after its stop token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render_chat(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, index: int
) -> list[RenderedText]:
    """Renders a conversation with the tokenizer's chat template and finds its responses.

    A template may write an earlier turn differently once later turns exist (one that drops old
    reasoning does). Then no single text shows every response the context it has at inference, so
    the conversation becomes one text per response; otherwise it becomes one text.

    Args:
        conversation: A conversation with `is_chat`.
        tokenizer: Has a chat template.
        index: Row of the dataset, for error messages.

    Raises:
        RowError: If the template refuses the conversation, or writes a response that does not
            continue what inference supplies.
    """
    messages = conversation.messages
    render = partial(_render, messages, tokenizer, index)
    # A response that opens the conversation has no prompt to answer: it is context only.
    turns = [
        turn
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and turn >= max(conversation.num_context, 1)
    ]
    if not turns:
        raise RowError(
            index,
            "the only response opens the conversation, so there is no prompt that it answers. "
            "Put the turn it answers before it, or remove the row.",
            "response without a prompt",
        )
    starts, texts = [], []
    for turn in turns:
        prompt = render(turn, add_generation_prompt=True)
        text = render(turn + 1)
        if not text.startswith(prompt):
            raise RowError(
                index,
                f"at inference the model would continue {prompt[-60:]!r}, but the chat template "
                f"writes the response of message {turn} as {text[-120:]!r}, which does not begin "
                "so. Training on it would teach a continuation that is never asked for. Use a "
                "template whose generation prompt is how it begins a response.",
                "response does not continue the generation prompt",
            )
        starts.append(len(prompt))
        texts.append(text)
    whole = render(len(messages))
    if all(whole.startswith(text) for text in texts):
        ends = [len(text) for text in texts]
        return [RenderedText(whole, tuple(zip(starts, ends, strict=True)))]
    return [
        RenderedText(text, ((start, len(text)),)) for start, text in zip(starts, texts, strict=True)
    ]


def _render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    num_messages: int,
    add_generation_prompt: bool = False,
) -> str:
    """The first turns as text."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages[:num_messages]),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError) as error:
        raise RowError(
            index,
            f"the chat template refuses the conversation: {error}. Bring the roles and contents "
            "into the form that the template expects, or remove the row.",
            "refused by the chat template",
        ) from error
    assert isinstance(text, str)
    check_unicode(text, index, "the rendered conversation")
    return text


def align_spans(
    rendered: RenderedText, encoding: Encoding, encode: Callable[[str], Encoding]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Maps spans of characters to spans of tokens.

    The text is tokenized as a whole. Where a token reaches across the edge of a span, or offsets
    leave out the white space at the edge, so that its token could be on either side, the text is
    tokenized again in two parts that meet at this edge. Inference does the same: it tokenizes the
    prompt without knowing the response.

    Args:
        rendered: The text and its spans.
        encoding: The encoding of the whole text.
        encode: Encodes a part of the text.

    Returns:
        The token ids, and `[start, end)` of each span in tokens.
    """
    edges = {edge for span in rendered.spans for edge in span}
    input_ids, offsets = encoding
    # Where the number of tokens before an edge is known for certain: at the ends and at cuts.
    known = {0: 0, len(rendered.text): len(input_ids)}
    while True:
        starts = [start for start, _ in offsets]
        found = {edge: bisect_left(starts, edge) for edge in edges - known.keys()}
        unclear = {
            edge
            for edge, token in found.items()
            if (token > 0 and offsets[token - 1][1] != edge)
            or (token < len(starts) and starts[token] != edge)
        }
        if not unclear:
            positions = {**found, **known}
            return input_ids, [(positions[start], positions[end]) for start, end in rendered.spans]
        cuts = sorted(unclear | known.keys())
        input_ids, offsets, known = [], [], {0: 0}
        for begin, end in pairwise(cuts):
            part_ids, part_offsets = encode(rendered.text[begin:end])
            input_ids += part_ids
            offsets += [(begin + start, begin + stop) for start, stop in part_offsets]
            known[end] = len(input_ids)


def mask_responses(
    input_ids: list[int],
    spans: Sequence[tuple[int, int]],
    stop_token_ids: Collection[int],
    index: int,
    decode: Callable[[list[int]], str],
) -> list[int]:
    """Marks the tokens to train: each span up to and including its stop token.

    Args:
        input_ids: The tokens of one row.
        spans: `[start, end)` in tokens, as `align_spans` gave them.
        stop_token_ids: The tokens at which inference stops.
        index: Row of the dataset, for error messages.
        decode: Token ids to text, for error messages.

    Returns:
        1 where a token is trained, else 0; as long as `input_ids`.

    Raises:
        RowError: If a span holds no stop token, or nothing before it.

    Examples:
        Token 2 is the stop token, token 9 the newline that the template writes after it.

        >>> mask_responses([5, 6, 7, 2, 9], [(2, 5)], {2}, index=0, decode=str)
        [0, 0, 1, 1, 0]
    """
    mask = [0] * len(input_ids)
    for start, end in spans:
        stop = end - 1
        while stop >= start and input_ids[stop] not in stop_token_ids:
            stop -= 1
        if stop < start:
            raise RowError(
                index,
                f"the response ends in {decode(input_ids[max(start, end - 20) : end])!r}, without "
                f"a stop token ({_names(stop_token_ids, decode)}), so the model would never learn "
                "to stop. Set stop_token to the token that ends a turn of the chat template.",
                "no stop token after the response",
            )
        if stop == start:
            raise RowError(
                index,
                "the chat template writes nothing of the response but its stop token, so there is "
                "nothing to learn from it. Use a template that writes what the message holds, or "
                "remove the row.",
                "empty response",
            )
        mask[start : stop + 1] = [1] * (stop + 1 - start)
    return mask


def _names(token_ids: Collection[int], decode: Callable[[list[int]], str]) -> str:
    return ", ".join(repr(decode([token_id])) for token_id in sorted(token_ids)) or "none is set"
