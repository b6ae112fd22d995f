"""Which tokens of a row belong to which mask of an evaluation: a few bits for each token.

Training has one mask. An evaluation can be asked for figures over others in the same pass; then its
rows carry a column `eval_masks`, as they carry a `response_mask`.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from hf_sft_plugin.types import DataOptions, TokenizedExample, TrainedSpan

# What the numbers of the column are made of. To the mask `all` belongs every token.
EVAL_MASK_BITS = {"response": 1, "last_response": 2}


def needs_column(options: DataOptions, eval_masks: Collection[str]) -> bool:
    """Whether masks are asked for that neither `response_mask` nor the tokens alone can tell.

    Examples:
        >>> needs_column(DataOptions(), ["response", "all"])
        False
        >>> needs_column(DataOptions(train_on="all"), ["response"])
        True
    """
    return not {*eval_masks} <= {options.trained_mask, "all"}


def with_every_response(options: DataOptions) -> DataOptions:
    """The options under which all responses of a row are found, whatever is trained of them."""
    return replace(options, train_on="response", use_loss_mask=True)


def mark_masks(
    examples: Sequence[TokenizedExample],
    spans: Sequence[Sequence[TrainedSpan]],
    trains_last: bool = False,
    is_whole_chat: bool = False,
) -> None:
    """Writes the column into the examples of one row, whose masks show every response.

    Args:
        examples: In the order of the conversation, before any of them is cut.
        spans: What each example trains.
        trains_last: Whether only the last response is trained; `response_mask` is made so.
        is_whole_chat: Whether all tokens of a chat are trained, which then count the same.

    Examples:
        >>> example = {"input_ids": [5, 6, 7, 8], "response_mask": [0, 1, 0, 1]}
        >>> spans = [TrainedSpan(1, 2, 1, "exact"), TrainedSpan(3, 4, 3, "exact")]
        >>> mark_masks([example], [spans])
        >>> example["eval_masks"]
        [0, 1, 0, 3]
    """
    response, last = EVAL_MASK_BITS.values()
    for number, (example, own) in enumerate(zip(examples, spans, strict=True)):
        mask = example["response_mask"]
        marks = [response * is_trained for is_trained in mask]
        for span in own if number == len(examples) - 1 else ():
            if span.turn == own[-1].turn:
                marks[span.start : span.end] = [
                    (response | last) * m for m in mask[span.start : span.end]
                ]
        example["eval_masks"] = marks
        if is_whole_chat:
            example.pop("loss_weights", None)
        if trains_last:
            example["response_mask"] = [int(mark & last > 0) for mark in marks]


def missing_column(eval_masks: Collection[str], where: str) -> ValueError:
    """The error about rows that came tokenized, and do not say what was asked of them.

    Args:
        eval_masks: What was asked for.
        where: The rows, such as `The rows of the eval data`.
    """
    return ValueError(
        f"{where} came tokenized without the column eval_masks, so nobody knows which of their "
        f"tokens belong to which of the masks {', '.join(eval_masks)}. Give the rows as they were "
        "before, prepare them with prepare_dataset(..., eval_masks=[...]), add the column (of each "
        "token the sum of 1 where it is in a response and 2 where that is the last one), or leave "
        "eval_masks out."
    )
