"""Step 3 of the walk: rows become token ids with a response mask."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.rows.arguments import require_row
from hf_sft_plugin.rows.formats import detect_format
from hf_sft_plugin.rows.values import check_texts
from hf_sft_plugin.tokens.row_tokenizer import RowOutcome, RowTokenizer
from hf_sft_plugin.types import DataOptions, TokenizedExample


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
    require_row(example, "example")
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
        RowError: If a row is too long and `overflow` is `error`.
    """
    row_format = detect_format(rows[0].keys(), options)
    outcomes = RowTokenizer(tokenizer, options, stop_token_ids)(rows, indices, row_format)
    return [*map(with_lists, outcomes)]


def with_lists(outcome: RowOutcome) -> RowOutcome:
    """Makes lists of what is held more tightly where there are many rows."""
    for example in outcome.examples:
        example["input_ids"] = [*example["input_ids"]]
        example["response_mask"] = [*example["response_mask"]]
    return outcome


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
