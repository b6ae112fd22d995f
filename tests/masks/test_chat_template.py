"""Chat templates write one chat or many, and what they cannot write is said in one sentence."""

from collections.abc import Callable
from typing import Any

import pytest

from hf_sft_plugin import DataOptions, RowError
from hf_sft_plugin.masks.chat_template import TEMPLATE_ERRORS, render_messages, render_turns
from hf_sft_plugin.types import Conversation, Turn

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
HELLO = "<|im_start|>user\nhello<|im_end|>\n"
WORLD = "<|im_start|>assistant\nworld<|im_end|>\n"


def conversation(messages: list[dict[str, str]], **more: Any) -> Conversation:
    return Conversation(tuple(Turn(message, True) for message in messages), **more)


def test_many_chats_are_written_as_each_alone(tokenizer: Any) -> None:
    chats = [CHAT, CHAT[:1], [*CHAT, *CHAT]]
    options = DataOptions()
    texts = render_messages(chats, tokenizer, options)
    assert texts == [HELLO + WORLD, HELLO, (HELLO + WORLD) * 2]
    assert texts == [
        render_turns(conversation(chat), len(chat), tokenizer, 0, options) for chat in chats
    ]


def test_the_generation_prompt_follows_the_first_turns(tokenizer: Any) -> None:
    options = DataOptions()
    text = render_turns(conversation(CHAT), 1, tokenizer, 0, options, generation_prompt=True)
    assert text == HELLO + "<|im_start|>assistant\n"
    assert render_messages([CHAT[:1]], tokenizer, options, generation_prompt=True) == [text]


def test_tools_and_variables_reach_the_template(tokenizer_factory: Callable[..., Any]) -> None:
    tokenizer = tokenizer_factory(
        chat_template="{{ tools[0].name }} {{ mood }} {{ messages[0].content }}"
    )
    options = DataOptions(chat_template_kwargs={"mood": "calm"})
    tools = ({"name": "add"},)
    assert render_messages([CHAT], tokenizer, options, tools=tools) == ["add calm hello"]
    text = render_turns(conversation(CHAT, tools=tools), 2, tokenizer, 0, options)
    assert text == "add calm hello"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content.strip() }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_refusal_names_the_row(template: str, tokenizer_factory: Callable[..., Any]) -> None:
    tokenizer = tokenizer_factory(chat_template=template)
    with pytest.raises(RowError, match="Row 7: the chat template refuses the conversation: "):
        render_turns(conversation(CHAT), 2, tokenizer, 7, DataOptions())
    with pytest.raises(TEMPLATE_ERRORS):
        render_messages([CHAT], tokenizer, DataOptions())


def test_a_broken_template_is_no_matter_of_the_row(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(chat_template="line one\n{% for %}")
    with pytest.raises(ValueError, match=r"cannot be read: .* \(line 2 of it\)") as caught:
        render_turns(conversation(CHAT), 2, tokenizer, 7, DataOptions())
    assert not isinstance(caught.value, RowError)


def test_broken_unicode_from_a_template_is_refused(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(chat_template="{{ messages[0].content }}\ud800")
    with pytest.raises(RowError, match="half of a surrogate pair"):
        render_turns(conversation(CHAT), 2, tokenizer, 0, DataOptions())
