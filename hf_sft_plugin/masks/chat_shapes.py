"""Rendering chats of one shape without rendering each of them many times.

Most chats of a dataset have the same roles in the same order and differ only in their contents. A
template that treats contents as opaque text writes the same around them in all these chats. So one
chat of each shape is rendered in full, with a placeholder for each content, and the contents of the
others are filled in. If the template provably cannot tell contents apart, this is enough. Otherwise
the whole chat and the prompt of its last response are rendered too, and must equal what was filled
in. Rows whose contents a template might inspect, and every hundredth row, are rendered in full.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.masks.chat_template import TEMPLATE_ERRORS, render_messages, render_turns
from hf_sft_plugin.masks.opaque_contents import OpaqueTemplate
from hf_sft_plugin.masks.rendering import Range, RenderedText, Span, render_chat
from hf_sft_plugin.masks.response_openings import common_length
from hf_sft_plugin.masks.stop_tokens import stop_probes
from hf_sft_plugin.types import Conversation, DataOptions, RowError

# Contents that templates are known to look into: tags, control tokens, JSON.
_TELLING_START, _TELLING_END = "<[{", ">]}"
_NUM_TRIALS = 3
# Private characters that stand for contents.
_PLACEHOLDER = 0xE000
_PLACEHOLDERS = re.compile("[\ue000-\uf8ff]")
_AUDIT_EVERY = 100
# Chats that a template writes in one call.
_NUM_AT_ONCE = 100


@dataclass
class _Shape:
    """What the template writes around contents.

    Attributes:
        texts: The rendered texts, with one placeholder for each content; None where the template
            does not treat contents as opaque.
        prompt: What inference supplies before the last response, cut at its placeholders; None
            where nothing is generated.
        needles: The template is proven to write all contents so that hold none of these; None
            where that is not proven.
        num_rows: Rows seen so far.
    """

    texts: list[RenderedText] | None
    prompt: list[str] | None = None
    needles: set[str] | None = None
    num_rows: int = 0


@dataclass
class _Candidate:
    """A conversation that was filled into a shape.

    Attributes:
        shape: The shape.
        texts: What it came to.
        prompt: What inference supplies before the last response; None where nothing is generated.
        is_as_rendered: Whether the template writes the whole and the prompt so.
    """

    shape: _Shape
    texts: list[RenderedText]
    prompt: str | None
    is_as_rendered: bool


@dataclass
class ChatRenderer:
    """Renders chats as `render_chat` does, and remembers what chats of one shape have in common.

    Attributes:
        tokenizer: See `render_chat`.
        options: See `render_chat`.
        stop_texts: See `render_chat`.
    """

    tokenizer: PreTrainedTokenizerBase
    options: DataOptions
    stop_texts: Collection[str]
    _shapes: dict[Any, _Shape | None] = field(default_factory=dict)

    @cached_property
    def _template(self) -> OpaqueTemplate:
        return OpaqueTemplate(self.tokenizer, self.options)

    def __call__(
        self, conversations: Sequence[Conversation], indices: Sequence[int]
    ) -> list[list[RenderedText] | RowError]:
        """What `render_chat` gives for each conversation, or the error that it raises."""
        candidates = [self._fill_shape(conversation) for conversation in conversations]
        filled = [
            (conversation, candidate)
            for conversation, candidate in zip(conversations, candidates, strict=True)
            if candidate is not None and not candidate.is_as_rendered
        ]
        wholes = self._render_all([each.messages for each, _ in filled])
        asked = [
            (each.messages[: candidate.texts[-1].spans[-1].turn], candidate)
            for each, candidate in filled
            if candidate.prompt is not None
        ]
        prompts = self._render_all([messages for messages, _ in asked], generation_prompt=True)
        for (_, candidate), whole in zip(filled, wholes, strict=True):
            candidate.is_as_rendered = candidate.texts[-1].written == whole
        for (_, candidate), prompt in zip(asked, prompts, strict=True):
            candidate.is_as_rendered &= candidate.prompt == prompt
        rendered: list[list[RenderedText] | RowError] = []
        for number, index in enumerate(indices):
            try:
                rendered.append(self._decide(conversations[number], candidates[number], index))
            except RowError as error:
                rendered.append(error)
        return rendered

    def _fill_shape(self, conversation: Conversation) -> _Candidate | None:
        """Fills a conversation into its shape; None where it has to be rendered in full."""
        contents = _opaque_contents(conversation)
        if contents is None:
            return None
        key = tuple((t.message["role"], t.train, t.weight) for t in conversation.turns)
        if key not in self._shapes:
            # Most shapes of long chats occur only once; a shape pays off from the second chat on.
            self._shapes[key] = None
            return None
        shape = self._shapes[key]
        if shape is None:
            shape = self._shapes[key] = self._find_shape(conversation)
        if shape.texts is None:
            return None
        texts = [_fill(text, contents) for text in shape.texts]
        if shape.needles is not None:
            told = "\n".join(contents)
            if not any(needle in told for needle in shape.needles):
                return _Candidate(shape, texts, None, is_as_rendered=True)
        prompt = None
        if shape.prompt is not None:
            # The text around the contents alternates with the contents.
            filled = zip_longest(shape.prompt, contents[: len(shape.prompt) - 1], fillvalue="")
            prompt = "".join(chain.from_iterable(filled))
        return _Candidate(shape, texts, prompt, is_as_rendered=False)

    def _decide(
        self, conversation: Conversation, candidate: _Candidate | None, index: int
    ) -> list[RenderedText]:
        """What was filled in; the full rendering if that is wrong, and for a sample of rows."""
        if candidate is None or candidate.shape.texts is None:
            return self._in_full(conversation, index)
        shape = candidate.shape
        shape.num_rows += 1
        if not candidate.is_as_rendered:
            return self._in_full(conversation, index)
        if shape.num_rows <= _NUM_TRIALS or shape.num_rows % _AUDIT_EVERY == 0:
            filled, shape.texts = shape.texts, None
            texts = self._in_full(conversation, index)
            if texts == candidate.texts:
                shape.texts = filled
            return texts
        return candidate.texts

    def _render_all(
        self, chats: Sequence[list[dict[str, Any]]], generation_prompt: bool = False
    ) -> list[str | None]:
        """Renders many chats at once; None for all of them where the template refuses one."""
        texts: list[str | None] = []
        for start in range(0, len(chats), _NUM_AT_ONCE):
            some = chats[start : start + _NUM_AT_ONCE]
            try:
                texts += render_messages(some, self.tokenizer, self.options, generation_prompt)
            except TEMPLATE_ERRORS:
                texts += [None] * len(some)
        return texts

    def _in_full(self, conversation: Conversation, index: int) -> list[RenderedText]:
        return render_chat(conversation, self.tokenizer, index, self.options, self.stop_texts)

    def _find_shape(self, conversation: Conversation) -> _Shape:
        """Renders placeholders, and sees whether each went to one place."""
        turns = tuple(
            replace(turn, message={**turn.message, "content": chr(_PLACEHOLDER + number)})
            for number, turn in enumerate(conversation.turns)
        )
        hollow = replace(conversation, turns=turns)
        try:
            texts = self._in_full(hollow, 0)
            span = texts[-1].spans[-1]
            prompt = None
            if span.kind != "text" and turns[span.turn].message["role"] == "assistant":
                written = render_turns(
                    hollow, span.turn, self.tokenizer, 0, self.options, generation_prompt=True
                )
                prompt = _PLACEHOLDERS.split(written)
                # Some contents may begin as the prompt goes on, which changes what is trained.
                beyond = written[common_length(texts[-1].text, written) :][:1]
                if beyond.strip() and beyond not in _TELLING_START:
                    return _Shape(None)
        except RowError:
            return _Shape(None)
        is_whole = len(texts[-1].contents) == len(turns)
        if not is_whole or not all(_is_clear(text) for text in texts):
            return _Shape(None)
        return _Shape(texts, prompt, self._find_needles(hollow, texts))

    def _find_needles(self, hollow: Conversation, texts: Sequence[RenderedText]) -> set[str] | None:
        """What contents may not hold, or the template might not write them like placeholders."""
        messages = hollow.messages
        trained = [number for number, turn in enumerate(hollow.turns) if turn.train and number > 0]
        # All that `render_chat` renders.
        asked = {(len(messages), False)}
        asked |= {(turn, is_prompt) for turn in trained for is_prompt in (False, True)}
        asked |= {(turn + 1, False) for turn in trained}
        chats = [(messages[:number], is_prompt) for number, is_prompt in asked]
        for made in texts:
            if made.added is not None:
                probes = stop_probes(messages[: made.spans[-1].turn + 1])
                chats += [(probe, False) for probe in probes]
        needles: set[str] = set()
        for chat, is_prompt in chats:
            try:
                text = render_turns(
                    hollow, len(chat), self.tokenizer, 0, self.options, is_prompt, chat
                )
            except RowError:
                # Not needed, as the shape was found without it.
                continue
            written = self._template.write(chat, is_prompt)
            if written is None or written[0] != text:
                return None
            needles |= written[1]
        return needles


def _opaque_contents(conversation: Conversation) -> list[str] | None:
    """The contents, where nothing in the chat could make a template write something else."""
    if conversation.tools:
        return None
    contents = []
    for turn in conversation.turns:
        content = turn.message.get("content")
        if len(turn.message) != 2 or not content or turn.weighted:
            return None
        if "</" in content or "<|" in content or "/think" in content or "/no_think" in content:
            return None
        if (
            content[0] in _TELLING_START
            or content[-1] in _TELLING_END
            or content != content.strip()
        ):
            return None
        contents.append(content)
    return contents


def _is_clear(text: RenderedText) -> bool:
    """Whether every placeholder went to one place, in order, and nothing else was found."""
    places = [content[0] for content in text.contents if content is not None]
    return (
        len(places) == len(text.contents)
        and places == sorted(set(places))
        and all(text.text.count(chr(_PLACEHOLDER + n)) == 1 for n in range(len(places)))
        and not text.is_altered
        and not text.is_unseen
    )


def _fill(text: RenderedText, contents: list[str]) -> RenderedText:
    """Puts contents where placeholders are, and moves everything accordingly."""
    places = [content[0] for content in text.contents if content is not None]
    pieces = []
    # Characters up to and with each placeholder, and how far what follows it moves.
    moves: list[Range] = []
    position = shift = 0
    for place, content in zip(places, contents, strict=False):
        pieces += [text.text[position:place], content]
        position = place + 1
        shift += len(content) - 1
        moves.append((place, shift))
    pieces.append(text.text[position:])

    def move(char: int) -> int:
        """Where a character went; one at a placeholder is the first of its content."""
        moved = char
        for place, by in moves:
            if place >= char:
                break
            moved = char + by
        return moved

    def move_range(chars: Range | None) -> Range | None:
        return None if chars is None else (move(chars[0]), move(chars[1]))

    spans = tuple(
        _move_span(span, move(span.start), move_range(span.content), move(span.bound))
        for span in text.spans
    )
    moved = tuple(map(move_range, text.contents))
    return RenderedText("".join(pieces), spans, moved, added=move_range(text.added))


def _move_span(span: Span, start: int, content: Range | None, bound: int) -> Span:
    return Span(start, content, bound, span.turn, span.kind, span.weight, span.needs_stop)
