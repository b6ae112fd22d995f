"""The tokens at which inference stops, which every response has to end with."""

from collections.abc import Collection, Mapping

from transformers import PreTrainedTokenizerBase


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
    """The token that is put after a text that is trained to its end.

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
