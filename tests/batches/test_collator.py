"""Rows become one padded batch that any Trainer, and any loop, can train on."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Qwen3ForCausalLM, Trainer, TrainingArguments

from hf_sft_plugin import (
    IGNORE_INDEX,
    DataCollatorForPromptResponse,
    RowError,
    get_response_log_probs,
    masked_normalize,
    prepare_dataset,
)

LONG = {"input_ids": [5, 6, 7, 2], "response_mask": [0, 0, 1, 1]}
SHORT = {"input_ids": [5, 6, 2], "response_mask": [0, 0, 1]}
RAW = [
    {"prompt": "hello", "response": "world"},
    {"prompt": "what is this", "response": "the answer to this question"},
    {"prompt": "0123", "response": "4"},
]


class StrictModel(Qwen3ForCausalLM):
    """Has no room for inputs that it does not name, as many models from outside the library."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        """The forward of the model."""
        return super().forward(input_ids, attention_mask, labels=labels)


def test_rows_are_padded_on_the_right_and_only_responses_have_labels(tokenizer: Any) -> None:
    batch = DataCollatorForPromptResponse(tokenizer)([LONG, SHORT])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 2], [5, 6, 2, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "labels": [[-100, -100, 7, 2], [-100, -100, 2, -100]],
        "response_mask": [[0, 0, 1, 1], [0, 0, 1, 0]],
    }
    assert {value.dtype for value in batch.values()} == {torch.long}


@pytest.mark.parametrize("pad_token", [None, "<|im_end|>"])
def test_a_pad_token_that_is_the_eos_token_is_harmless(
    pad_token: str | None, tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory(pad_token=pad_token)
    batch = DataCollatorForPromptResponse(tokenizer)([LONG, SHORT])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 6, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, -100, 2, -100]]


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(pad_token=None, eos_token=None)
    with pytest.raises(ValueError, match=r"neither a pad nor an eos token.*tokenizer\.pad_token"):
        DataCollatorForPromptResponse(tokenizer)


@pytest.mark.parametrize(("multiple", "length"), [(None, 4), (1, 4), (4, 4), (8, 8), (3, 6)])
def test_the_length_is_rounded_up_to_a_multiple(
    multiple: int | None, length: int, tokenizer: Any
) -> None:
    batch = DataCollatorForPromptResponse(tokenizer, pad_to_multiple_of=multiple)([LONG, SHORT])
    assert {tuple(value.shape) for value in batch.values()} == {(2, length)}
    assert batch["attention_mask"].sum() == 7
    assert batch["response_mask"].sum() == 3
    packed = DataCollatorForPromptResponse(tokenizer, pad_to_multiple_of=multiple)(
        [{"documents": [LONG, SHORT]}]
    )
    assert packed["input_ids"].shape == (2, 4)


def test_weights_stand_where_tokens_are_trained_and_are_1_for_rows_without(tokenizer: Any) -> None:
    weighted = {**LONG, "loss_weights": [9.0, 9.0, 0.5, 2.0]}
    batch = DataCollatorForPromptResponse(tokenizer)([weighted, SHORT])
    assert batch["loss_weights"].tolist() == [[0, 0, 0.5, 2.0], [0, 0, 1, 0]]
    assert batch["loss_weights"].dtype == torch.float32


def test_the_response_mask_stays_out_where_models_do_not_know_it(tokenizer: Any) -> None:
    batch = DataCollatorForPromptResponse(tokenizer, return_response_mask=False)([LONG])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


@pytest.mark.parametrize("kind", ["lists", "numpy", "torch"])
def test_raw_rows_make_the_batch_of_prepared_rows(kind: str, tokenizer: Any) -> None:
    collator = DataCollatorForPromptResponse(tokenizer, prompt_format="chat", max_length=30)
    prepared, _ = prepare_dataset(
        Dataset.from_list(RAW), tokenizer, prompt_format="chat", max_length=30
    )
    rows = list(prepared.with_format(None if kind == "lists" else kind))
    on_the_fly, ahead = collator(RAW), collator(rows)
    assert on_the_fly.keys() == ahead.keys()
    assert all(torch.equal(on_the_fly[name], ahead[name]) for name in ahead)


def test_labels_may_stand_in_for_the_mask(tokenizer: Any) -> None:
    row = {"input_ids": LONG["input_ids"], "labels": [-100, -100, 7, 2]}
    collator = DataCollatorForPromptResponse(tokenizer)
    expected = collator([LONG])
    batch = collator([row])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "There are no rows to collate"),
        ({"input_ids": [[5, 6]]}, "one dict of columns, but the collator takes a list of rows"),
        ([RAW[0], {"prompt": "a", "response": ""}], "Row 1 of the batch: the response is empty"),
        ([{"prompt": "a", "response": 5}], "Row 0 of the batch: column 'response' holds int"),
        ([{"words": "a"}], "No known format"),
        (
            [LONG, {**LONG, "response_mask": [1]}],
            "Row 1 of the batch: input_ids has 4 tokens but response_mask has 1",
        ),
        ([LONG, {**LONG, "input_ids": [5, 300, 7, 2]}], "Row 1 of the batch: input_ids holds 300"),
        ([LONG, {**LONG, "input_ids": [5, -1, 7, 2]}], "Row 1 of the batch: input_ids holds -1"),
        (
            [LONG, {**LONG, "response_mask": [0, 0, 7, 1]}],
            "Row 1 of the batch: response_mask holds 7",
        ),
        (
            [{**LONG, "loss_weights": [1.0, 1.0, -1.0, 1.0]}],
            "Row 0 of the batch: loss_weights holds -1.0",
        ),
        ([{**LONG, "labels": LONG["input_ids"]}], "Row 0 of the batch: labels trains token 0"),
        ("ab", "Row 0 of the batch is str, but a row is a dict of columns"),
        (
            [LONG, {"input_ids": [], "response_mask": []}],
            "Row 1 of the batch: no token of the row is trained",
        ),
        (
            [{**LONG, "attention_mask": [0] * 4}],
            "Row 0 of the batch: no token of the row is trained",
        ),
        ([{**LONG, "loss_weights": [1.0]}], "loss_weights has 1"),
        (
            [{"input_ids": [5, 999], "labels": [-100, 999]}],
            "Row 0 of the batch: input_ids holds 999",
        ),
    ],
)
def test_rows_that_make_no_batch_are_refused(rows: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        DataCollatorForPromptResponse(tokenizer)(rows)


@pytest.mark.parametrize(
    ("overflow", "input_ids", "mask"),
    [
        ("keep_start", [[5, 6, 7]], [[0, 0, 1]]),
        ("keep_end", [[6, 7, 2]], [[0, 1, 1]]),
    ],
)
def test_tokenized_rows_are_cut_to_the_limit_as_raw_ones_are(
    overflow: str, input_ids: list[list[int]], mask: list[list[int]], tokenizer: Any
) -> None:
    collator = DataCollatorForPromptResponse(tokenizer, max_length=3, overflow=overflow)
    batch = collator([LONG])
    assert batch["input_ids"].tolist() == input_ids
    assert batch["response_mask"].tolist() == mask


def test_a_tokenized_row_cut_before_its_response_is_refused(tokenizer: Any) -> None:
    with pytest.raises(
        RowError, match="Row 1 of the batch: the response begins after the first 2 tokens of 4"
    ):
        DataCollatorForPromptResponse(tokenizer, max_length=2)(
            [{"input_ids": [5, 6], "response_mask": [0, 1]}, LONG]
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_make_the_batch_of_rows_without_padding(side: str, tokenizer: Any) -> None:
    collator = DataCollatorForPromptResponse(tokenizer)
    rows = []
    for row in (LONG, SHORT):
        num_pads = 6 - len(row["input_ids"])
        attention = [1] * len(row["input_ids"])
        rows.append(
            {
                name: [pad] * num_pads + values if side == "left" else values + [pad] * num_pads
                for name, values, pad in (
                    ("input_ids", row["input_ids"], 2),
                    ("response_mask", row["response_mask"], 0),
                    ("attention_mask", attention, 0),
                )
            }
        )
    batch, expected = collator(rows), collator([LONG, SHORT])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_the_rows_that_were_given_stay_as_they_were(tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 2], "response_mask": [1, 0, 1], "loss_weights": [1.0, 2.0, 3.0]}]
    before = copy.deepcopy(rows)
    first = DataCollatorForPromptResponse(tokenizer)(rows)
    assert rows == before
    assert first["response_mask"].tolist() == [[0, 0, 1]]
    assert first["loss_weights"].tolist() == [[0, 0, 3]]


def test_a_block_that_trains_nothing_is_read_adds_nothing_and_is_spoken_of_once(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A block of a shard set may lie within a prompt."""
    collator = DataCollatorForPromptResponse(tokenizer)
    block = {"input_ids": [8, 9], "response_mask": [0, 0]}
    batch = collator([LONG, block])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100] * 4]
    # Nothing predicts the first token, so a mask of only that is as good as none.
    assert collator([{"input_ids": [2], "response_mask": [1]}])["labels"].tolist() == [[-100]]
    assert [record.getMessage() for record in caplog.records] == [
        "Row 1 of a batch has no trained token. It is read and adds nothing to the loss, and so "
        "are others like it; prepare_dataset drops and counts them."
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (RAW[0], {"messages": [{"role": "user", "content": "a"}]}),
        (RAW[0], {"prompt": "a", "completion": "b"}),
        (RAW[0], LONG),
        (LONG, RAW[0]),
        (RAW[0], {"words": "a"}),
        (RAW[0], {"prompt": "a"}),
        (RAW[0], {**RAW[0], "text": "a"}),
    ],
)
def test_rows_of_one_batch_are_of_one_format(
    first: dict[str, Any], second: dict[str, Any], tokenizer: Any
) -> None:
    ours, theirs = ", ".join(sorted(first)), ", ".join(sorted(second))
    message = f"Row 0 of the batch has the columns {ours}, but row 2 has {theirs}. The rows of one"
    with pytest.raises(ValueError, match=re.escape(message)):
        DataCollatorForPromptResponse(tokenizer)([first, first, second])


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_column": "question", "response_column": "answer"},
        {"messages_column": "chat"},
        {"data_format": "messages"},
    ],
    ids=str,
)
def test_options_that_name_the_columns_of_raw_rows_do_not_hinder_prepared_ones(
    options: dict[str, Any], tokenizer: Any
) -> None:
    batch = DataCollatorForPromptResponse(tokenizer, **options)([LONG, SHORT])
    expected = DataCollatorForPromptResponse(tokenizer)([LONG, SHORT])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_columns_that_a_row_may_go_without_may_differ(tokenizer: Any) -> None:
    collator = DataCollatorForPromptResponse(tokenizer)
    rows = [{**RAW[0], "id": 7}, {**RAW[1], "weight": 1.0, "source": "book"}, RAW[2]]
    batch, expected = collator(rows), collator(RAW)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    by_labels = {"input_ids": SHORT["input_ids"], "labels": [-100, -100, 2]}
    batch, expected = collator([LONG, by_labels]), collator([LONG, SHORT])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_an_unknown_option_is_refused_at_once(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="Unknown option 'max_len'"):
        DataCollatorForPromptResponse(tokenizer, max_len=5)
    with pytest.raises(
        RowError, match="Row 0 of the batch: the row has 4 tokens, but max_length is 3"
    ):
        DataCollatorForPromptResponse(tokenizer, max_length=3, overflow="error")(
            [{"input_ids": LONG["input_ids"], "labels": LONG["input_ids"]}]
        )


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 299), st.booleans()), min_size=1, max_size=20),
        min_size=1,
        max_size=6,
    ),
    multiple=st.none() | st.integers(1, 16),
)
def test_whatever_the_rows_each_keeps_its_tokens_and_its_mask(
    rows: list[list[tuple[int, bool]]],
    multiple: int | None,
    tokenizer_factory: Callable[..., Any],
) -> None:
    collator = DataCollatorForPromptResponse(tokenizer_factory(), pad_to_multiple_of=multiple)
    batch = collator(
        [
            {"input_ids": [t for t, _ in row], "response_mask": [int(m) for _, m in row]}
            for row in rows
        ]
    )
    for number, row in enumerate(rows):
        is_row = batch["attention_mask"][number].bool()
        assert is_row.tolist() == [True] * len(row) + [False] * (is_row.numel() - len(row))
        assert batch["input_ids"][number][is_row].tolist() == [token for token, _ in row]
        expected = [token if mark else IGNORE_INDEX for token, mark in row]
        expected[0] = IGNORE_INDEX  # nothing comes before the first token, so nothing predicts it
        assert batch["labels"][number][is_row].tolist() == expected
        assert batch["labels"][number][~is_row].eq(IGNORE_INDEX).all()
        assert torch.equal(batch["labels"] != IGNORE_INDEX, batch["response_mask"].bool())


def test_a_plain_trainer_trains_raw_rows_of_a_model_that_refuses_what_it_does_not_know(
    tokenizer: Any, model: Any, tmp_path: Path
) -> None:
    model = StrictModel(model.config)
    with pytest.raises(TypeError, match="response_mask"):
        model(**DataCollatorForPromptResponse(tokenizer)(RAW))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            remove_unused_columns=False,
            per_device_train_batch_size=3,
            max_steps=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForPromptResponse(tokenizer, return_response_mask=False),
        train_dataset=Dataset.from_list(RAW),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    after = list(model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_loop_with_accelerate_gets_the_gradient_of_the_mean_over_response_tokens(
    tokenizer: Any, model: Any
) -> None:
    # The same loss by torch's own cross entropy on the labels, before the loop changes the model.
    batch = DataCollatorForPromptResponse(tokenizer)(RAW)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    gradients = torch.autograd.grad(expected, list(model.parameters()))

    accelerator = Accelerator(cpu=True)
    loader = DataLoader(RAW, batch_size=3, collate_fn=DataCollatorForPromptResponse(tokenizer))
    prepared, loader = accelerator.prepare(model, loader)
    for batch in loader:
        inputs, targets = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
        mask = batch["response_mask"][:, 1:]
        log_probs = get_response_log_probs(prepared, inputs, targets)["log_probs"]
        loss = -masked_normalize(log_probs, mask, normalize_constant=mask.sum())
        accelerator.backward(loss)
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_error_of_a_batch_that_quotes_a_row_cannot_act_on_the_terminal(tokenizer: Any) -> None:
    row = {"messages": [{"role": "\x1b[2J", "content": "a"}]}
    with pytest.raises(RowError) as caught:
        DataCollatorForPromptResponse(tokenizer)([row])
    assert str(caught.value).startswith("Row 0 of the batch: ")
    assert "\u241b[2J" in str(caught.value)
    assert "\x1b" not in str(caught.value)
