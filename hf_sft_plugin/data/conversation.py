"""Step 2 of the walk: a raw row, whatever its columns, becomes a `Conversation`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_sft_plugin.types import Conversation, DataOptions, RowError

ROLES_HELP = "a list like [{'role': 'user', 'content': '...'}, {'role': 'assistant', ...}]"


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a dataset hold what.

    Attributes:
        kind: How the rows are written.
        prompt_column: Set for `prompt_response`.
        response_column: Set for `prompt_response`.
        messages_column: Set for `messages`.
    """

    kind: Literal["tokenized", "messages", "prompt_response"]
    prompt_column: str = ""
    response_column: str = ""
    messages_column: str = ""


def detect_format(columns: Collection[str], options: DataOptions) -> RowFormat:
    """Decides from the column names how rows are written.

    Args:
        columns: The column names of the dataset, or the keys of one row.
        options: `prompt_column`, `response_column` and `messages_column` overrule the usual names.

    Raises:
        ValueError: If no format fits, or more than one does.

    Examples:
        >>> detect_format(["question", "answer"],
        ...               DataOptions(prompt_column="question", response_column="answer")).kind
        'prompt_response'
    """
    found = f"The columns are {', '.join(sorted(columns)) or 'none'}."
    if options.messages_column:
        _require(options.messages_column, columns, found)
        return RowFormat("messages", messages_column=options.messages_column)
    if options.prompt_column or options.response_column:
        prompt = options.prompt_column or "prompt"
        response = options.response_column or _usual_response_column(columns)
        _require(prompt, columns, found)
        _require(response, columns, found)
        return RowFormat("prompt_response", prompt_column=prompt, response_column=response)
    if "input_ids" in columns:
        if "response_mask" not in columns and "labels" not in columns:
            raise ValueError(
                "The rows have input_ids but neither response_mask nor labels, so nothing says "
                f"which tokens to train. Add one of the two columns. {found}"
            )
        return RowFormat("tokenized")
    has_messages = "messages" in columns
    has_prompt = "prompt" in columns
    if has_messages and has_prompt:
        raise ValueError(
            "The rows have both a prompt and a messages column. Say which one to train on: "
            f"messages_column='messages' or prompt_column='prompt'. {found}"
        )
    if has_messages:
        return RowFormat("messages", messages_column="messages")
    if has_prompt:
        response = _usual_response_column(columns)
        _require(response, columns, found)
        return RowFormat("prompt_response", prompt_column="prompt", response_column=response)
    raise ValueError(
        "No known format: rows need prompt and response (or completion), or messages, or input_ids "
        "with response_mask or labels. Name other columns with prompt_column and response_column, "
        f"or messages_column. {found}"
    )


def to_conversation(
    row: Mapping[str, Any], index: int, row_format: RowFormat, options: DataOptions
) -> Conversation:
    """Brings one raw row into its normal form.

    Args:
        row: The raw row; `row_format.kind` is `messages` or `prompt_response`.
        index: Its position in the dataset, for error messages.
        row_format: As `detect_format` gave it.
        options: `prompt_format` decides whether plain text is wrapped in chat turns.

    Raises:
        RowError: If a value has the wrong type, is empty or holds broken Unicode.

    Examples:
        >>> conversation = to_conversation({"prompt": "2+2=", "response": "4"}, 0,
        ...     RowFormat("prompt_response", "prompt", "response"), DataOptions())
        >>> [message["content"] for message in conversation.messages], conversation.is_chat
        (['2+2=', '4'], False)
    """
    if row_format.kind == "messages":
        column = row_format.messages_column
        messages = _check_messages(row.get(column), index, column)
        conversation = Conversation(messages, num_context=0, is_chat=True)
    else:
        prompt = row.get(row_format.prompt_column)
        response = row.get(row_format.response_column)
        as_text = isinstance(prompt, str) and isinstance(response, str)
        context = _as_messages(prompt, index, row_format.prompt_column, "user")
        answer = _as_messages(response, index, row_format.response_column, "assistant")
        conversation = Conversation(
            context + answer,
            num_context=len(context),
            is_chat=not as_text or options.prompt_format == "chat",
        )
    _check_responses(conversation, index)
    return conversation


def check_texts(texts: Sequence[Any], name: str) -> None:
    """Refuses a list in which not every entry is text that a tokenizer can encode.

    Args:
        texts: The list.
        name: What the caller calls it, for error messages.

    Raises:
        ValueError: If it is one text rather than a list.
        RowError: If an entry is not text, or is broken Unicode.
    """
    if isinstance(texts, str):
        raise ValueError(f"{name} is one text, but a list of texts is needed. Write [text].")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            found = type(text).__name__
            raise RowError(
                index,
                f"{name} holds {found}, but text is needed. Convert or remove the row.",
                f"{name} is {found}, not text",
            )
        check_unicode(text, index, name)


def check_unicode(text: str, index: int, place: str) -> None:
    """Refuses text that no tokenizer can encode.

    Args:
        text: The text.
        index: Its row, for error messages.
        place: Its column, for error messages.

    Raises:
        RowError: If the text holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            index,
            f"{place} holds half of a surrogate pair at character {error.start}, which no "
            "tokenizer can encode. Repair the text, e.g. with "
            "text.encode('utf-8', 'replace').decode().",
            "broken Unicode",
        ) from error


def _usual_response_column(columns: Collection[str]) -> str:
    return "completion" if "completion" in columns and "response" not in columns else "response"


def _require(column: str, columns: Collection[str], found: str) -> None:
    if column not in columns:
        raise ValueError(
            f"There is no column {column!r}. {found} Name the right ones with prompt_column and "
            "response_column, or messages_column."
        )


def _as_messages(value: Any, index: int, column: str, role: str) -> tuple[dict[str, Any], ...]:
    """One side of a prompt/response row as messages."""
    if isinstance(value, str):
        check_unicode(value, index, f"column {column!r}")
        return ({"role": role, "content": value},)
    if isinstance(value, list):
        return _check_messages(value, index, column)
    raise RowError(
        index,
        f"column {column!r} holds {type(value).__name__}, but text or {ROLES_HELP} is needed. "
        "Convert or remove the row.",
        f"{column} is {type(value).__name__}, not text",
    )


def _check_messages(value: Any, index: int, column: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type(value).__name__
        raise RowError(
            index,
            f"column {column!r} holds {what}, but {ROLES_HELP} is needed. Convert or remove the "
            "row.",
            f"{column} is {what}, not messages",
        )
    messages = []
    for turn, message in enumerate(value):
        place = f"column {column!r}, message {turn}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(
                index,
                f"{place} is {message!r:.80}, but a dict with 'role' and 'content' is needed. "
                "Convert or remove the row.",
                "a message without a role",
            )
        content = message.get("content")
        if isinstance(content, str):
            check_unicode(content, index, place)
        elif content is not None or not message.get("tool_calls"):
            raise RowError(
                index,
                f"{place} has content of type {type(content).__name__}, but text is needed. "
                "Convert or remove the row.",
                "message content is not text",
            )
        # Arrow gives every struct the keys of all others, filled with None; templates test for
        # presence, so an absent key has to be absent again.
        messages.append({k: v for k, v in message.items() if v is not None or k == "content"})
    return tuple(messages)


def _check_responses(conversation: Conversation, index: int) -> None:
    responses = [
        message
        for message in conversation.messages[conversation.num_context :]
        if message["role"] == "assistant"
    ]
    if not responses:
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise RowError(
            index,
            f"no message to train has the role 'assistant' (the roles are {roles}). Rename the "
            "role of the responses to 'assistant', or remove the row.",
            "no assistant message",
        )
    for message in responses:
        if not (message["content"] or "").strip() and not message.get("tool_calls"):
            raise RowError(
                index,
                "the response is empty, so there is nothing to learn from it. Fill or remove it.",
                "empty response",
            )
