"""Control tokens that stand in the data: text such as `<|im_end|>` that somebody wrote.

A chat template writes control tokens, and so, by accident or malice, does text. Before rendering,
each one in a content is replaced by a private character; after rendering whatever still looks like
a control token is the template's own, and what the private characters stand for is encoded as
ordinary text.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.data.text_encoding import JoinedEncoding
from hf_sft_plugin.types import Conversation

_MARK = 0x100000
_MARKS = re.compile("[\U00100000-\U0010ffff]")


class ControlTokenMarker:
    """Finds the control tokens of a tokenizer in contents, and hides them from the template.

    Args:
        tokenizer: Knows its control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {
            token.content: (token_id, token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content
        }
        self._ids = {text: token_id for text, (token_id, _) in special.items()}
        self._texts = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or "(?!)")
        # Space that a control token swallows belongs to it.
        swallowing = (
            (r"\s*" * token.lstrip) + re.escape(text) + (r"\s*" * token.rstrip)
            for text in self._texts
            for _, token in [special[text]]
        )
        self._split = re.compile("|".join(swallowing) or "(?!)")
        # What tells most texts apart from those that hold one, faster than the pattern does.
        self._openings = {text[:2] for text in self._texts}

    def find(self, conversation: Conversation) -> list[str]:
        """The control tokens that stand in contents, tools and segments."""
        found: list[str] = []
        written = [segment.text for segment in conversation.segments]
        for value in (*conversation.messages, *(conversation.tools or ()), written):
            for text in _texts(value):
                for opening in self._openings:
                    if opening in text:
                        found += self._pattern.findall(text)
                        break
        return found

    def hide(self, conversation: Conversation) -> Conversation:
        """The conversation with private characters in place of its control tokens."""
        turns = []
        for turn in conversation.turns:
            content = turn.message.get("content")
            untrained = turn.untrained
            if isinstance(content, str) and untrained:
                untrained = tuple(
                    (len(self._hide(content[:start])), len(self._hide(content[:end])))
                    for start, end in untrained
                )
            turns.append(replace(turn, message=self._hide(turn.message), untrained=untrained))
        tools = conversation.tools
        return replace(
            conversation,
            turns=tuple(turns),
            tools=None if tools is None else tuple(self._hide(tool) for tool in tools),
        )

    def is_ambiguous(self, conversation: Conversation) -> bool:
        """Whether the contents hold private characters of their own."""
        values = (*conversation.messages, *(conversation.tools or ()))
        return any(_MARKS.search(text) for value in values for text in _texts(value))

    def show(self, text: str) -> str:
        """Text with control tokens in place of the private characters."""
        return _MARKS.sub(lambda match: self._texts[ord(match.group()) - _MARK], text)

    def encode(self, parts: Sequence[str]) -> JoinedEncoding:
        """Encodes parts of a rendered text: control tokens as such, hidden ones as text.

        Args:
            parts: Consecutive parts of a text in which control tokens of the data are hidden.

        Returns:
            Their tokens; the characters of each are those of the text as it was given.
        """
        pieces: list[tuple[list[int], list[tuple[int, int]]]] = []
        for part in parts:
            input_ids: list[int] = []
            offsets: list[tuple[int, int]] = []
            position = 0
            for match in [*self._split.finditer(part), None]:
                start, end = match.span() if match else (len(part), len(part))
                if position < start:
                    ids, places = self._encode_text(part[position:start])
                    input_ids += ids
                    offsets += [(position + a, position + b) for a, b in places]
                if match:
                    token = self._pattern.search(match.group())
                    assert token is not None
                    input_ids.append(self._ids[token.group()])
                    offsets.append((start, end))
                position = end
            pieces.append((input_ids, offsets))
        lengths = [len(part) for part in parts]
        return JoinedEncoding(pieces, lengths, self._tokenizer.is_fast)

    def encode_response(self, text: str, stops: Collection[int]) -> list[int] | None:
        """Encodes a text in which control tokens are text, but for a stop token at its end.

        Returns:
            The token ids; None where no control token stands within the text.
        """
        ending = next((t for t in self._texts if text.endswith(t) and self._ids[t] in stops), "")
        body = text.removesuffix(ending)
        if self._pattern.search(body) is None:
            return None
        encoded = self._tokenizer(
            body, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [*encoded["input_ids"], *([self._ids[ending]] if ending else [])]

    def _encode_text(self, hidden: str) -> tuple[list[int], list[tuple[int, int]]]:
        text = self.show(hidden)
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=self._tokenizer.is_fast,
            return_attention_mask=False,
            verbose=False,
        )
        input_ids = encoded["input_ids"]
        if not self._tokenizer.is_fast:
            return input_ids, [(0, len(hidden))] * len(input_ids)
        # Character positions of the shown text, as positions of the hidden one.
        places = [
            place
            for place, char in enumerate(hidden)
            for _ in (self.show(char) if _MARKS.match(char) else char)
        ]
        ends = [*places, len(hidden)]
        return input_ids, [
            (places[a] if a < len(places) else len(hidden), ends[b - 1] + 1 if b > a else ends[a])
            for a, b in encoded["offset_mapping"]
        ]

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(
                lambda match: chr(_MARK + self._texts.index(match.group())), value
            )
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value


def _texts(value: Any) -> Iterator[str]:
    """All texts within nested values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, str):
                yield item
            else:
                yield from _texts(item)
