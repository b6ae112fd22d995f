"""A further witness of a mask: what `{% generation %}` markers in a chat template mark.

Templates place them differently, with or without the header, the stop token and the newline after
it, so they decide nothing. But what is trained of a response lies within them, and nobody else's
content does.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hf_sft_plugin.masks.content_markers import Range
from hf_sft_plugin.types import Conversation, DataOptions, RowError

# What transformers takes for a marker.
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def marked_ranges(
    conversation: Conversation,
    num_turns: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
) -> list[Range]:
    """The characters between the markers, as transformers finds them.

    Args:
        conversation: A conversation with turns.
        num_turns: How many of them.
        text: What the chat template writes of them.
        tokenizer: Has a chat template.
        options: `chat_template_kwargs` matter here.

    Returns:
        Ranges in order, of which no two meet; none where the template has no markers.
    """
    assert not isinstance(options.chat_template_kwargs, str)
    variables = {**tokenizer.special_tokens_map, **(options.chat_template_kwargs or {})}
    tools = list(conversation.tools or ()) or None
    template = tokenizer.get_chat_template(variables.pop("chat_template", None), tools)
    if not _MARKER.search(template):
        return []
    messages = conversation.messages[:num_turns]
    render: Callable[..., Any] = render_jinja_template
    (again,), (ranges,) = render(
        [messages], tools, chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    # A template that looks at the clock may write another text, to which the ranges belong.
    return _joined(ranges) if again == text else []


def check_markers(
    conversation: Conversation,
    marked: Sequence[Range],
    contents: Sequence[Range | None],
    trained: Sequence[int],
    index: int,
) -> None:
    """Compares what is marked with where the contents stand.

    Args:
        conversation: A conversation with turns.
        marked: See `marked_ranges`; none is no witness.
        contents: The contents of its first messages; None where one went unseen.
        trained: Which of its turns are trained.
        index: Row of the dataset, for error messages.

    Raises:
        RowError: If a content that is trained is not marked, or one that is not the model's is.
    """
    turns = zip(conversation.turns, contents, strict=False)
    for number, (turn, content) in enumerate(turns):
        if content is None or not marked:
            continue
        start, end = content
        if turn.message["role"] == "assistant":
            is_whole = any(first <= start and end <= after for first, after in marked)
            is_wrong, verb = number in trained and not is_whole, "leave out"
        else:
            is_touched = any(first < end and start < after for first, after in marked)
            is_wrong, verb = is_touched and not turn.train, "reach into"
        if is_wrong:
            raise RowError(
                index,
                f"the generation markers of the chat template {verb} the content of message "
                f"{number} ({turn.message['role']}), so two ways to find the responses disagree, "
                "and no mask of this row can be trusted. Correct the markers, or take them out of "
                "the template: masks are found without them.",
                "generation markers disagree with the mask",
            )


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Ranges that meet made one, as where a thought and the content after it are marked apart."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
