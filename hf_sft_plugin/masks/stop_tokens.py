"""The tokens at which inference stops, which every response has to end with."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.types import RowError

# Private characters that stand for a response and for the turn after it.
_RESPONSE, _NEXT = "\U000ffffc", "\U000ffffd"
# Keys under which a response calls tools, and the role of their answers.
_ANSWERS = {"tool_calls": "tool", "function_call": "function"}


def find_stop_token(tokenizer: PreTrainedTokenizerBase, stop_token: str) -> int:
    """The id of a stop token given by name.

    Raises:
        ValueError: If the tokenizer does not know it.
    """
    token_id = tokenizer.get_vocab().get(stop_token)
    if token_id is None:
        raise ValueError(
            f"stop_token {stop_token!r} is not a token of the tokenizer's vocabulary. Name one of "
            "its tokens, or add it with tokenizer.add_special_tokens."
        )
    return token_id


def resolve_stop_tokens(
    tokenizer: PreTrainedTokenizerBase, stop_token: str | None, given: Collection[int] | None
) -> dict[int, str]:
    """The tokens that end a response, and their text.

    Args:
        tokenizer: Its eos token ends a response where nothing else is said.
        stop_token: See `DataOptions`; comes first.
        given: Token ids, such as those of a generation config; come second.

    Raises:
        ValueError: If the tokenizer does not know one of them.
    """
    if stop_token is not None:
        stops = {find_stop_token(tokenizer, stop_token)}
    elif given is not None:
        stops = set(given)
    else:
        stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    unknown = [stop for stop in stops if not 0 <= stop < len(tokenizer)]
    if unknown:
        raise ValueError(
            f"The stop token {unknown[0]} is not one of the {len(tokenizer)} tokens of the "
            "tokenizer. Give the tokenizer that belongs to the model, or name a stop_token."
        )
    return {stop: str(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(stops)}


def end_token(tokenizer: PreTrainedTokenizerBase, stops: Mapping[int, str]) -> int:
    """The token to put behind a text whose end is trained.

    Raises:
        ValueError: If there is none.
    """
    eos = tokenizer.eos_token_id
    if stops and eos not in stops:
        eos = min(stops)
    if eos is None:
        raise ValueError(
            "The tokenizer has no eos token, so nothing can end a response and the model would "
            "never learn to stop. Set tokenizer.eos_token (the recipe: --stop_token)."
        )
    return int(eos)


def stop_texts(tokenizer: PreTrainedTokenizerBase, stops: Mapping[int, str]) -> list[str]:
    """The texts of the stop tokens; the default one comes first."""
    if not stops:
        return []
    first = end_token(tokenizer, stops)
    return [stops[first], *(text for stop, text in stops.items() if stop != first)]


def stop_probes(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Chats that show what a chat template writes behind the response that ends a chat.

    Args:
        messages: The last one is a response.

    Returns:
        The chat with another response; and with one more turn, in which a tool answers where the
        response calls one.
    """
    *before, response = messages
    plain = {"role": response["role"], "content": _RESPONSE}
    calls = {key: response[key] for key in _ANSWERS if response.get(key)}
    called = {**plain, **calls}
    role = next((_ANSWERS[key] for key in calls), "user")
    following = {"role": role, "content": _NEXT}
    return [[*before, plain], [*before, called, following]]


def stop_behind(
    render: Callable[..., str], messages: Sequence[dict[str, Any]], stops: Collection[str]
) -> str | None:
    """The stop token to put behind the last response of a chat, where the template writes none.

    If a stop token stands there once another turn follows, as where inference stops at the header
    of the next turn, it is this one; otherwise it is the first of the stop tokens.

    Args:
        render: Writes the first so many of some messages; may raise `RowError`.
        messages: The chat; its last message is the response.
        stops: The tokens at which inference stops, as text.

    Returns:
        Its text, with the space that the template writes before it; None where the template ends a
        response in something else, or where there is no stop token.
    """
    own, longer = stop_probes(messages)
    try:
        tail = render(len(own), messages=own).rpartition(_RESPONSE)[2]
    except RowError:
        return None
    if tail.strip() or not stops:
        return None
    try:
        both = render(len(longer), messages=longer).rpartition(_NEXT)[0]
        alone = render(len(own), messages=longer).rstrip()
    except RowError:
        both = alone = ""
    if _RESPONSE in both:
        between = both.rpartition(_RESPONSE)[2]
    else:
        # The template writes the calls instead of a content; take what follows the calls.
        between = both[len(alone) :] if both.startswith(alone) else ""
    found = [(between.find(stop), -len(stop), stop) for stop in stops if stop in between]
    if not found:
        return next(iter(stops))
    place, _, stop = min(found)
    return between[len(between[:place].rstrip()) : place] + stop
