"""Rows that bring variables of their own for the chat template, each rendered with them alone."""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.masks.chat_shapes import ChatRenderer
from hf_sft_plugin.masks.chat_template import check_run_variables
from hf_sft_plugin.masks.rendering import RenderedText
from hf_sft_plugin.types import Conversation, DataOptions, RowError

# How many renderers are kept. If every row has other variables, none is used a second time.
_MAX_RENDERERS = 64


class RowRenderer:
    """Renders chats as `ChatRenderer` does, which remembers chats with the same variables.

    Args:
        tokenizer: See `ChatRenderer`.
        options: See `ChatRenderer`. Where a row names the same variable, that of the row counts.
        stop_texts: See `ChatRenderer`.

    Raises:
        ValueError: If the variables of the run name an argument of `apply_chat_template`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: DataOptions, stop_texts: Collection[str]
    ) -> None:
        check_run_variables(options)
        self._tokenizer = tokenizer
        self._options = options
        self._stop_texts = stop_texts
        self._renderers: dict[str, ChatRenderer] = {}

    def __call__(
        self, conversations: Sequence[Conversation], indices: Sequence[int]
    ) -> list[list[RenderedText] | RowError]:
        """What `render_chat` gives for each conversation, or the error that it raises."""
        alike: dict[str, list[int]] = {}
        for number, conversation in enumerate(conversations):
            variables = conversation.chat_template_kwargs
            key = json.dumps(variables, sort_keys=True) if variables else ""
            alike.setdefault(key, []).append(number)
        rendered: dict[int, list[RenderedText] | RowError] = {}
        for key, numbers in alike.items():
            render = self._renderer(key, conversations[numbers[0]])
            texts = render([conversations[n] for n in numbers], [indices[n] for n in numbers])
            rendered.update(zip(numbers, texts, strict=True))
        return [rendered[number] for number in range(len(conversations))]

    def _renderer(self, key: str, conversation: Conversation) -> ChatRenderer:
        if key not in self._renderers:
            if len(self._renderers) >= _MAX_RENDERERS:
                self._renderers.clear()
            assert not isinstance(self._options.chat_template_kwargs, str)
            variables = {
                **(self._options.chat_template_kwargs or {}),
                **(conversation.chat_template_kwargs or {}),
            }
            options = replace(self._options, chat_template_kwargs=variables)
            self._renderers[key] = ChatRenderer(self._tokenizer, options, self._stop_texts)
        return self._renderers[key]
