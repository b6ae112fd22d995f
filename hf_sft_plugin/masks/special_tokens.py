"""Control tokens that stand in the data: text such as `<|im_end|>` that somebody wrote.

A chat template writes control tokens, and so, by accident or malice, does text. Before rendering,
private characters take the place of each one in a content, one for each of its characters; after
rendering whatever still looks like a control token is the template's own. To encode the text, both
change places: a second tokenizer, which shares everything with the first one but knows control
tokens by their private characters alone, takes all others for ordinary text.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerBase

from hf_sft_plugin.encoding.texts import JoinedEncoding, encode_parts
from hf_sft_plugin.types import Conversation, RowError

_MARK = 0x100000
_MARKS = re.compile("[\U00100000-\U0010ffff]")
# A private character that a template has escaped, as JSON in ASCII does.
_ESCAPED_MARK = re.compile(r"\\ud[b][c-f][0-9a-f]\\ud[c-f]", re.IGNORECASE)


class ControlTokenMarker:
    """Finds the control tokens of a tokenizer in contents, and hides them from the template.

    Args:
        tokenizer: Knows its control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers do not mark their own eos token as special.
        named = set(tokenizer.all_special_tokens)
        self._ids = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or token.content in named)
        }
        self._texts = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self._texts)) or '(?!)'})")
        pairs = [(ord(char), _MARK + n) for n, char in enumerate(sorted({*"".join(self._texts)}))]
        # Characters to private ones and back.
        self._swapped = {**dict(pairs), **{mark: char for char, mark in pairs}}
        self._either = re.compile(f"{self._pattern.pattern}|{_MARKS.pattern}")
        # What stands for unknown text is no control token, unless it also ends a response.
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        self._control_ids = {*self._ids.values()} - unknown
        # What tells most texts apart from those that hold one, faster than the pattern does.
        self._openings = {text[:2] for text in self._texts}

    def find(self, conversation: Conversation) -> list[str]:
        """The control tokens that stand in contents, tools, variables and segments."""
        found: list[str] = []
        values = _beside_messages(conversation)
        if not values and not conversation.segments:
            try:
                told = "\n".join(chain(*((*m, *m.values()) for m in conversation.messages)))
            except TypeError:
                # Some values are not text; each is looked at.
                pass
            else:
                if not any(opening in told for opening in self._openings):
                    return found
        written = [segment.text for segment in conversation.segments]
        for value in (*conversation.messages, *values, written):
            for text in _texts(value):
                for opening in self._openings:
                    if opening in text:
                        found += self._pattern.findall(text)
                        break
        return found

    def hide(self, conversation: Conversation) -> Conversation:
        """The conversation with private characters in place of its control tokens."""
        tools, variables = conversation.tools, conversation.chat_template_kwargs
        return replace(
            conversation,
            turns=tuple(replace(t, message=self._hide(t.message)) for t in conversation.turns),
            tools=None if tools is None else tuple(self._hide(tool) for tool in tools),
            chat_template_kwargs=self._hide(variables),
        )

    def is_ambiguous(self, conversation: Conversation) -> bool:
        """Whether the contents hold private characters of their own."""
        values = (*conversation.messages, *_beside_messages(conversation))
        return any(_MARKS.search(text) for value in values for text in _texts(value))

    def show(self, text: str) -> str:
        """Text with control tokens in place of the private characters."""
        return self._swap(_MARKS, text)

    def encode(self, parts: Sequence[str]) -> JoinedEncoding:
        """Encodes parts of a rendered text: control tokens as such, hidden ones as text.

        Args:
            parts: Consecutive parts of a text in which control tokens of the data are hidden.

        Returns:
            Their tokens; the characters of each are those of the text as it was given.
        """
        if self._tokenizer.is_fast:
            encoder, known = self._encoder
            swapped = [self._swap(self._either, part) for part in parts]
            encodings = encoder.encode_batch(swapped, add_special_tokens=False)
            pieces = [([known.get(i, i) for i in each.ids], each.offsets) for each in encodings]
        else:
            encoded = [(self._encode_slowly(part), (0, len(part))) for part in parts]
            pieces = [(ids, [place] * len(ids)) for ids, place in encoded]
        return JoinedEncoding(pieces, [len(part) for part in parts], self._tokenizer.is_fast)

    def encode_response(self, text: str, stops: Collection[int]) -> list[int] | None:
        """Encodes a text in which control tokens are text, but for a stop token at its end.

        Returns:
            The token ids; None where no control token stands within the text.
        """
        ending = next((t for t in self._texts if text.endswith(t) and self._ids[t] in stops), "")
        body = text.removesuffix(ending)
        if self._pattern.search(body) is None:
            return None
        return [*self._as_text(body), *([self._ids[ending]] if ending else [])]

    def check(self, text: str, ids: Sequence[int], index: int) -> None:
        """Proves the encoding of a rendered text in which control tokens of the data are hidden.

        With letters in their place the text must have the tokens that the tokenizer itself makes
        of it, and of control tokens as many as with them.

        Args:
            text: The rendered text.
            ids: What `encode` made of it.
            index: Row of the dataset, for error messages.

        Raises:
            RowError: If that is not so, or if the template has escaped what is hidden.
        """
        blank = _MARKS.sub("x", text)
        usual = encode_parts([blank], self._tokenizer).ids
        is_same = self._num_control(ids) == self._num_control(usual)
        if not is_same or self.encode([blank]).ids != usual or _ESCAPED_MARK.search(text):
            raise _no_other_tokens(index)

    def check_responses(
        self, responses: Sequence[tuple[list[int], str]], stops: Collection[int], index: int
    ) -> None:
        """Proves what `encode_response` made of texts: only a stop token at the end is control.

        Raises:
            RowError: If that is not so.
        """
        for ids, _ in responses:
            if ids and self._num_control(ids) > (ids[-1] in stops):
                raise _no_other_tokens(index)

    @cached_property
    def _encoder(self) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer that knows control tokens by their private characters; ids it has changed."""
        usual = self._tokenizer.backend_tokenizer
        encoder = Tokenizer(usual.model)
        encoder.normalizer, encoder.pre_tokenizer = usual.normalizer, usual.pre_tokenizer
        encoder.post_processor = usual.post_processor
        tokens = self._tokenizer.added_tokens_decoder
        ids = {self._hide(token.content): token_id for token_id, token in tokens.items()}
        private = [
            AddedToken(
                self._hide(token.content),
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized and token.content not in self._ids,
            )
            for token in tokens.values()
        ]
        encoder.add_tokens(private)
        made = encoder.get_added_tokens_decoder()
        return encoder, {number: ids[token.content] for number, token in made.items()}

    def _encode_slowly(self, hidden: str) -> list[int]:
        """Token ids of a text, encoded in pieces between its control tokens."""
        ids: list[int] = []
        for number, piece in enumerate(self._pattern.split(hidden)):
            ids += [self._ids[piece]] if number % 2 else self._as_text(self.show(piece))
        return ids

    def _as_text(self, text: str) -> list[int]:
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return list(encoded["input_ids"])

    def _num_control(self, ids: Sequence[int]) -> int:
        return sum(token in self._control_ids for token in ids)

    def _swap(self, pattern: re.Pattern[str], text: str) -> str:
        return pattern.sub(lambda match: match.group().translate(self._swapped), text)

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._swap(self._pattern, value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value


def _no_other_tokens(index: int) -> RowError:
    return RowError(
        index,
        "the control tokens in the contents cannot be encoded as text: the tokenizer has no other "
        "tokens for them, or the template escapes what it writes. Remove them, or set "
        "control_tokens to 'keep'.",
        "control tokens cannot be encoded as text",
    )


def _beside_messages(conversation: Conversation) -> list[Mapping[str, Any]]:
    """What a row gives the chat template beside its messages."""
    variables = conversation.chat_template_kwargs
    return [*(conversation.tools or ()), *([variables] if variables else [])]


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
