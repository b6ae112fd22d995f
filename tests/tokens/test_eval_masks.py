"""Rows to evaluate on know which of their tokens are in a response, and which in the last one."""

from typing import Any

import pytest
from datasets import Dataset

from hf_sft_plugin import prepare_dataset, prepare_stream
from hf_sft_plugin.tokens.eval_masks import needs_column
from hf_sft_plugin.types import DataOptions

BOTH = ["response", "last_response"]
# Every earlier turn is written otherwise once later ones follow.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}({{ m.content }}){% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": messages}


def masks_of(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The two masks in the column of a row."""
    return [m & 1 for m in row["eval_masks"]], [m >> 1 for m in row["eval_masks"]]


def prepare(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    return prepare_dataset(Dataset.from_list(rows), tokenizer, **options)[0].to_list()


@pytest.mark.parametrize("overflow", ["keep_start", "keep_end", "keep_response"])
@pytest.mark.parametrize("max_length", [None, 30, 16])
def test_the_masks_are_those_of_a_preparation_for_each(
    max_length: int | None, overflow: str, tokenizer: Any
) -> None:
    rows = [
        chat("hello", "world", "what is this", "the answer"),
        chat("hello", "world"),
        chat("a", "b", "c", "d", "e", "f"),
    ]
    options: Any = {"max_length": max_length, "overflow": overflow, "max_dropped_share": 1.0}
    for row in rows:
        try:
            made = prepare([row], tokenizer, eval_masks=BOTH, **options)
        except ValueError:
            # Not one token of a response is left.
            with pytest.raises(ValueError, match=r"dropped|trained"):
                prepare([row], tokenizer, **options)
            continue
        (found,) = made
        for train_on, mask in zip(BOTH, masks_of(found), strict=True):
            try:
                (expected,) = prepare([row], tokenizer, train_on=train_on, **options)
            except ValueError:
                # Of the last response nothing is left.
                assert not any(mask)
                continue
            if found["input_ids"] == expected["input_ids"]:
                assert mask == expected["response_mask"]
            else:
                # A row that is trained on its last response alone can lose other turns.
                assert sum(mask) == sum(expected["response_mask"])


def test_a_row_split_in_pieces_keeps_its_masks(tokenizer: Any) -> None:
    row = chat("hello", "world", "what is this", "the answer to this question")
    (whole,) = prepare([row], tokenizer, eval_masks=BOTH)
    pieces = prepare([row], tokenizer, eval_masks=BOTH, max_length=9, overflow="split")
    blocks = []
    for start in range(0, len(whole["input_ids"]), 9):
        marks = whole["eval_masks"][start : start + 9]
        # Nothing predicts the first token of a piece.
        marks[0] = 0
        if any(marks):
            blocks.append((whole["input_ids"][start : start + 9], marks))
    assert len(blocks) > 2
    assert [(piece["input_ids"], piece["eval_masks"]) for piece in pieces] == blocks


def test_of_a_conversation_that_becomes_several_rows_the_last_has_the_last_response(
    tokenizer_factory: Any,
) -> None:
    tokenizer = tokenizer_factory(chat_template=REWRITING)
    rows = [chat("hello", "world", "what is", "this"), chat("a", "b")]
    first, second, other = prepare(rows, tokenizer, eval_masks=BOTH)
    for row, has_last in ((first, False), (second, True), (other, True)):
        response, last = masks_of(row)
        assert response == row["response_mask"]
        assert last == (response if has_last else [0] * len(response))
    # Trained on its last response, the first row is there for the sake of the other mask.
    made = prepare(rows, tokenizer, eval_masks=BOTH, train_on="last_response")
    assert [row["eval_masks"] for row in made] == [
        row["eval_masks"] for row in (first, second, other)
    ]
    assert [row["response_mask"] for row in made] == [masks_of(row)[1] for row in made]


def test_text_without_a_template_and_streams_have_the_masks(tokenizer: Any) -> None:
    segments = [("hello", False), (" world", True), (" what", False), (" is this", True)]
    texts = [{"segments": [{"text": text, "train": train} for text, train in segments]}]
    (row,) = prepare(texts, tokenizer, eval_masks=BOTH)
    response, last = masks_of(row)
    assert response == row["response_mask"]
    start = max(n for n, mark in enumerate(response) if not mark) + 1
    assert last == [0] * start + [1] * (len(last) - start)
    stream = prepare_stream(
        Dataset.from_list(texts).to_iterable_dataset(), tokenizer, eval_masks=BOTH
    )
    assert next(iter(stream))["eval_masks"] == row["eval_masks"]


def test_rows_carry_the_column_only_where_it_is_needed(tokenizer: Any) -> None:
    rows = [chat("hello", "world")]
    for eval_masks in ([], ["response"], ["all"]):
        assert "eval_masks" not in prepare(rows, tokenizer, eval_masks=eval_masks)[0]
    assert "eval_masks" in prepare(rows, tokenizer, eval_masks=["response"], train_on="all")[0]
    assert needs_column(DataOptions(use_loss_mask=False), ["response"])
    assert not needs_column(DataOptions(train_on="last_response"), ["last_response", "all"])
    stream = prepare_stream(Dataset.from_list(rows).to_iterable_dataset(), tokenizer)
    assert "eval_masks" not in next(iter(stream))


def test_rows_trained_whole_keep_their_masks_beside(tokenizer: Any) -> None:
    row = chat("hello", "world", "what is", "this")
    (plain,) = prepare([row], tokenizer, eval_masks=BOTH)
    for options in ({"train_on": "all"}, {"use_loss_mask": False}):
        (whole,) = prepare([row], tokenizer, eval_masks=BOTH, **options)
        assert whole["response_mask"] == [0] + [1] * (len(whole["input_ids"]) - 1)
        assert whole["eval_masks"] == plain["eval_masks"]
