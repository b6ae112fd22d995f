"""Token ids back to text, one token at a time where the text of a token is always the same.

A byte-level tokenizer gives every token its bytes, whatever is beside it, so a text of which every
token is whole characters is the texts of its tokens. Other texts are decoded by the tokenizer, and
one in a hundred both ways.
"""

import json
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

_AUDIT_EVERY = 100
# What a decoder writes for bytes that are no characters by themselves.
_REPLACEMENT = "\ufffd"


class TokenDecoder:
    """Decodes token ids, control tokens included.

    Args:
        tokenizer: Made them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: _TokenTexts | None = None
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if backend is not None and backend.decoder is not None:
            kind = json.loads(backend.decoder.__getstate__())["type"]
            self._texts = _TokenTexts(backend.decode) if kind == "ByteLevel" else None

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """One text per list of ids."""
        if self._texts is None:
            return self._decode_rows(rows)
        made = [self._texts.join(ids) for ids in rows]
        asked = [n for n, text in enumerate(made) if text is None or n % _AUDIT_EVERY == 0]
        for number, text in zip(asked, self._decode_rows([rows[n] for n in asked]), strict=True):
            assert made[number] in (None, text), f"tokens make another text than {text[:200]!r}"
            made[number] = text
        return [text or "" for text in made]

    def _decode_rows(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The tokenizer's own decoding, without what transformers tidies up."""
        if self._tokenizer.is_fast:
            backend = self._tokenizer.backend_tokenizer
            return list(backend.decode_batch([*map(list, rows)], skip_special_tokens=False))
        decode = self._tokenizer.decode
        return [str(decode(list(ids), clean_up_tokenization_spaces=False)) for ids in rows]


class _TokenTexts(dict[int, str]):
    """The text of each token, decoded when it is first asked for."""

    def __init__(self, decode: Callable[..., str]) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, token: int) -> str:
        text = self._decode([token], skip_special_tokens=False)
        if _REPLACEMENT in text:
            raise LookupError(token)
        self[token] = text
        return text

    def join(self, ids: Sequence[int]) -> str | None:
        """The text of many; None where one of them is no text by itself."""
        try:
            return "".join(map(self.__getitem__, ids))
        except LookupError:
            return None
