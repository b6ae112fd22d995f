"""Messages as text, as the tokenizer's chat template writes them."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.rows.conversation import RESERVED_VARIABLES
from hf_sft_plugin.rows.values import check_unicode
from hf_sft_plugin.types import Conversation, DataOptions, RowError

# A run may set these all the same.
_OF_THE_RUN = frozenset(("chat_template", "tools"))
# What a chat template may raise.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError)


def check_run_variables(options: DataOptions) -> None:
    """Refuses `chat_template_kwargs` of a run that would change how a template is called.

    Raises:
        ValueError: If a name among them is none that a run may set.
    """
    for name in sorted(RESERVED_VARIABLES - _OF_THE_RUN):
        if name in (options.chat_template_kwargs or {}):
            raise ValueError(
                f"chat_template_kwargs names {name!r}, which says how the template is called and "
                "is no variable for it, so no row could be rendered. Remove it."
            )


def render_messages(
    chats: Sequence[Sequence[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[str]:
    """Messages of many chats as texts, as the tokenizer's chat template writes them.

    Raises:
        Exception: One of `TEMPLATE_ERRORS`, if the template refuses any of them.
    """
    assert not isinstance(options.chat_template_kwargs, str)
    variables = options.chat_template_kwargs or {}
    if tools:
        variables = {**variables, "tools": list(tools)}
    render: Callable[..., Any] = tokenizer.apply_chat_template
    texts: list[str] = render(
        chats, tokenize=False, add_generation_prompt=generation_prompt, **variables
    )
    return texts


def render_turns(
    conversation: Conversation,
    num_turns: int,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    options: DataOptions,
    generation_prompt: bool = False,
    messages: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The first turns as text, as the tokenizer's chat template writes them.

    Args:
        conversation: A conversation with turns.
        num_turns: How many of them.
        tokenizer: Has a chat template.
        index: Row of the dataset, for error messages.
        options: `chat_template_kwargs` matter here.
        generation_prompt: Whether what opens a response follows.
        messages: Instead of those of the turns.

    Raises:
        RowError: If the template refuses the turns, or writes broken Unicode.
        ValueError: If it is no template.
    """
    shown = conversation.messages if messages is None else messages
    try:
        (text,) = render_messages(
            [shown[:num_turns]], tokenizer, options, generation_prompt, conversation.tools
        )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template cannot be read: {error.message} (line {error.lineno} of it), so no "
            "conversation can be rendered. Correct the template."
        ) from error
    except TEMPLATE_ERRORS as error:
        raise RowError(
            index,
            f"the chat template refuses the conversation: {error}. Bring the roles and contents "
            "into the form that the template expects, or remove the row.",
            "refused by the chat template",
        ) from error
    check_unicode(text, index, "the rendered conversation")
    return text
