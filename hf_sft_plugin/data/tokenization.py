"""Step 3 of the walk: conversations become token ids with a response mask, row by row accounted."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.data.conversation import (
    RowFormat,
    check_texts,
    detect_format,
    to_conversation,
)
from hf_sft_plugin.data.response_mask import (
    Encoding,
    RenderedText,
    align_spans,
    mask_responses,
    render_chat,
)
from hf_sft_plugin.data.tokenized_rows import check_tokenized_row
from hf_sft_plugin.types import Conversation, DataOptions, RowError, TokenizedExample


@dataclass
class RowOutcome:
    """What became of one raw row: examples to train, or the reason why there are none.

    Attributes:
        row: Position of the row in its dataset.
        examples: Usually one; one per response where the chat template rewrites earlier turns.
        num_tokens: Tokens of all examples before truncation.
        num_lost: Tokens of `examples` that were cut off.
        error: Why the row is dropped; None where it is trained.
    """

    row: int
    examples: list[TokenizedExample] = field(default_factory=list)
    num_tokens: int = 0
    num_lost: int = 0
    error: RowError | None = None


def tokenize_example(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Collection[int] | None = None,
    **options: Any,
) -> list[TokenizedExample]:
    """Tokenizes one row and marks which of its tokens are trained.

    Args:
        example: A row with prompt and response (or completion), with messages, or with
            input_ids and response_mask or labels.
        tokenizer: Needs a chat template for messages, and an eos token for plain text.
        stop_token_ids: Tokens at which inference stops. None: the tokenizer's eos token.
        **options: Fields of `DataOptions`, such as `max_length` or `prompt_format`.

    Returns:
        One example; several where the chat template rewrites earlier turns, so that each
        response is trained in exactly the context it has at inference.

    Raises:
        RowError: If the row cannot be trained; says what was found and what to do.
        ValueError: If columns, tokenizer or options do not fit each other.
    """
    outcome = tokenize_rows([example], [0], tokenizer, make_options(options), stop_token_ids)[0]
    if outcome.error is not None:
        raise outcome.error
    return outcome.examples


def make_options(options: Mapping[str, Any]) -> DataOptions:
    """Builds `DataOptions`; an unknown name is an error that lists the known ones.

    Raises:
        ValueError: If a name is unknown or a value impossible.
    """
    known = list(DataOptions.__dataclass_fields__)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r}; the options are {', '.join(known)}.")
    return DataOptions(**options)


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    stop_token_ids: Collection[int] | None = None,
) -> list[RowOutcome]:
    """Tokenizes rows of one format together; the tokenizer is called once for all of them.

    Args:
        rows: Raw or tokenized rows with the same columns; not empty.
        indices: Their positions in the dataset.
        tokenizer: See `tokenize_example`.
        options: See `DataOptions`.
        stop_token_ids: See `tokenize_example`.

    Returns:
        One outcome per row, in order.

    Raises:
        ValueError: If columns, tokenizer or options do not fit each other.
    """
    row_format = detect_format(rows[0].keys(), options)
    stops = _stop_token_ids(tokenizer, options.stop_token, stop_token_ids)
    outcomes = [RowOutcome(row) for row in indices]
    if row_format.kind == "tokenized":
        for row, outcome in zip(rows, outcomes, strict=True):
            try:
                outcome.examples = [check_tokenized_row(row, outcome.row, len(tokenizer))]
            except RowError as error:
                outcome.error = error
    else:
        _tokenize_conversations(rows, outcomes, row_format, tokenizer, options, stops)
    limit = max_row_length(tokenizer, options.max_length)
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome.error is None:
            _truncate(outcome, limit, options)
            for example in outcome.examples:
                if isinstance(row.get("source"), str):
                    example["source"] = row["source"]
    return outcomes


def max_row_length(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """The longest row that is kept whole, in tokens; None where nothing sets a limit."""
    # Tokenizers without a limit of their own carry the number 1e30.
    own = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return own if max_length is None else max_length


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


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Tokenizes prompts and outputs apart, joins them, and returns them already shifted.

    With L the length of the longest joined row minus one, a row that is `p` positions short gives

    - `input_ids`: the row without its last token; if p > 0, then p - 1 zeros and the EOS id,
    - `labels`: the row without its first token, then p EOS ids,
    - `response_mask`: 1 where `labels` holds an output token, else 0.

    Args:
        prompt_strs: B prompts, tokenized with special tokens.
        output_strs: B outputs, tokenized without.
        tokenizer: Has an eos token.

    Returns:
        `input_ids` and `labels`, int64 of shape `(B, L)`, and `response_mask`, float32 of shape
        `(B, L)`. An empty output is allowed and gives a row of zeros in `response_mask`.

    Raises:
        ValueError: If the lists differ in length, are empty or hold anything but text, if a row
            has no token at all, or if the tokenizer has no eos token.
    """
    check_texts(prompt_strs, "prompt_strs")
    check_texts(output_strs, "output_strs")
    if len(prompt_strs) != len(output_strs):
        raise ValueError(
            f"There are {len(prompt_strs)} prompts but {len(output_strs)} outputs; each prompt "
            "needs exactly one output."
        )
    if len(prompt_strs) == 0:
        raise ValueError("There are no prompts: a batch needs at least one row.")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("The tokenizer has no eos token, which pads the rows. Set eos_token.")
    prompts = tokenizer(list(prompt_strs), verbose=False)["input_ids"]
    outputs = tokenizer(list(output_strs), add_special_tokens=False, verbose=False)["input_ids"]
    joined = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    empty = next((row for row, ids in enumerate(joined) if not ids), None)
    if empty is not None:
        raise ValueError(f"Row {empty}: prompt and output are both empty; give it some text.")
    length = max(map(len, joined)) - 1
    input_ids = torch.zeros(len(joined), length, dtype=torch.long)
    labels = torch.full((len(joined), length), eos)
    response_mask = torch.zeros(len(joined), length)
    for row, (prompt, ids) in enumerate(zip(prompts, joined, strict=True)):
        tokens = torch.tensor(ids)
        padding = length - (len(ids) - 1)
        input_ids[row, : len(ids) - 1] = tokens[:-1]
        if padding > 0:
            input_ids[row, -1] = eos
        labels[row, : len(ids) - 1] = tokens[1:]
        # Without a prompt the first output token is predicted from nothing, so it has no label.
        response_mask[row, max(len(prompt) - 1, 0) : len(ids) - 1] = 1
    return {"input_ids": input_ids, "labels": labels, "response_mask": response_mask}


def _stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, stop_token: str | None, given: Collection[int] | None
) -> frozenset[int]:
    if stop_token is not None:
        return frozenset([find_stop_token(tokenizer, stop_token)])
    if given is not None:
        return frozenset(given)
    return frozenset([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _tokenize_conversations(
    rows: Sequence[Mapping[str, Any]],
    outcomes: Sequence[RowOutcome],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    stops: frozenset[int],
) -> None:
    """Fills the outcomes of raw rows; a row that fails keeps its error."""
    plain: list[tuple[RowOutcome, Conversation]] = []
    chat: list[tuple[RowOutcome, RenderedText]] = []
    for row, outcome in zip(rows, outcomes, strict=True):
        try:
            conversation = to_conversation(row, outcome.row, row_format, options)
            if conversation.is_chat:
                _require_chat_template(tokenizer)
                texts = render_chat(conversation, tokenizer, outcome.row)
                chat += [(outcome, text) for text in texts]
            else:
                plain.append((outcome, conversation))
        except RowError as error:
            outcome.error = error
    _fill_plain(plain, tokenizer, options, stops)
    encodings = _encode([text.text for _, text in chat], tokenizer)
    for (outcome, text), encoding in zip(chat, encodings, strict=True):
        try:
            outcome.examples.append(_mask_chat(text, encoding, tokenizer, stops, outcome.row))
        except RowError as error:
            outcome.error, outcome.examples = error, []


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            "The rows are conversations, but the tokenizer has no chat template to write them "
            "with. Set tokenizer.chat_template (the recipe: --chat_template_path), or use the "
            "tokenizer of the model's chat version."
        )


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    """Encodes whole texts, control tokens included, with the characters of each token."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        verbose=False,
    )
    if tokenizer.is_fast:
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    return [
        (input_ids, [(0, len(text))] * len(input_ids))
        for text, input_ids in zip(texts, encoded["input_ids"], strict=True)
    ]


def _mask_chat(
    text: RenderedText,
    encoding: Encoding,
    tokenizer: PreTrainedTokenizerBase,
    stops: frozenset[int],
    row: int,
) -> TokenizedExample:
    encode_part = partial(_encode_one, tokenizer=tokenizer)
    input_ids, spans = align_spans(text, encoding, encode_part)
    mask = mask_responses(
        input_ids, spans, stops, row, decode=lambda ids: str(tokenizer.decode(ids))
    )
    return {"input_ids": input_ids, "response_mask": mask}


def _encode_one(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    return _encode([text], tokenizer)[0]


def _fill_plain(
    plain: Sequence[tuple[RowOutcome, Conversation]],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    stops: frozenset[int],
) -> None:
    """Joins prompt, response and stop token.

    Prompt and response are tokenized apart, because inference tokenizes the prompt alone.
    """
    if not plain:
        return
    eos = tokenizer.eos_token_id
    if stops and eos not in stops:
        eos = min(stops)
    if eos is None:
        raise ValueError(
            "The tokenizer has no eos token, so nothing can end a response and the model would "
            "never learn to stop. Set tokenizer.eos_token (the recipe: --stop_token)."
        )
    texts = [[message["content"] for message in c.messages] for _, c in plain]
    prompts = tokenizer([prompt for prompt, _ in texts], verbose=False)["input_ids"]
    responses = tokenizer(
        [response for _, response in texts], add_special_tokens=False, verbose=False
    )["input_ids"]
    for (outcome, _), (text, _), prompt, response in zip(
        plain, texts, prompts, responses, strict=True
    ):
        # Some tokenizers end every text with eos; inference would not continue after it.
        if (
            prompt
            and prompt[-1] == tokenizer.eos_token_id
            and not text.endswith(str(tokenizer.eos_token))
        ):
            prompt = prompt[:-1]
        if not response:
            outcome.error = RowError(
                outcome.row,
                "the tokenizer makes no token of the response. Fill or remove it.",
                "empty response",
            )
            continue
        if response[-1] not in stops:
            response = [*response, eos]
        mask = [0] * len(prompt) + [1] * len(response)
        outcome.examples = [{"input_ids": prompt + response, "response_mask": mask}]


def _truncate(outcome: RowOutcome, limit: int | None, options: DataOptions) -> None:
    """Cuts examples to the limit, counts what is lost and drops a row that loses its response."""
    outcome.num_tokens = sum(len(example["input_ids"]) for example in outcome.examples)
    longest = max(len(example["input_ids"]) for example in outcome.examples)
    if limit is not None and longest > limit:
        if options.overflow == "error":
            raise RowError(
                outcome.row,
                f"the row has {longest} tokens, but max_length is {limit}. Raise max_length, or "
                "set overflow to 'keep_start' or 'drop'.",
                "longer than max_length",
            )
        if options.overflow == "drop":
            outcome.error = RowError(
                outcome.row,
                f"the row has {longest} tokens, but max_length is {limit}. Raise max_length to "
                "keep it.",
                "longer than max_length",
            )
            outcome.examples = []
            return
        outcome.examples = [_cut(example, limit) for example in outcome.examples]
    for example in outcome.examples:
        # Nothing comes before the first token, so nothing predicts it.
        example["response_mask"][0:1] = [0] * len(example["response_mask"][0:1])
    outcome.examples = [example for example in outcome.examples if any(example["response_mask"])]
    outcome.num_lost = outcome.num_tokens - sum(len(e["input_ids"]) for e in outcome.examples)
    if not outcome.examples:
        cut = limit is not None and longest > limit
        outcome.error = RowError(
            outcome.row,
            f"the response begins after the first {limit} tokens of {longest}, where the row is "
            "cut. Raise max_length, or remove the row."
            if cut
            else "no token of the row is trained: its response_mask is 0 everywhere (or its "
            "labels are all ignored). Mark the response, or remove the row.",
            "no response left within max_length" if cut else "no trained token",
        )


def _cut(example: TokenizedExample, limit: int) -> TokenizedExample:
    cut: TokenizedExample = {
        "input_ids": example["input_ids"][:limit],
        "response_mask": example["response_mask"][:limit],
    }
    if "loss_weights" in example:
        cut["loss_weights"] = example["loss_weights"][:limit]
    return cut
