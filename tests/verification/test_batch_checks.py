"""Labels that are other tokens, and responses that do not teach to stop, are found."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from verified_trainers import first_step, make_rows

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedSFTConfig
from hf_sft_plugin.preparation.ledger import Ledger
from hf_sft_plugin.verification.batch_checks import BATCH_CHECKS, check_batches, find_spans
from hf_sft_plugin.verification.checks import VerificationCheck

Check = Callable[..., dict[str, VerificationCheck]]


@pytest.fixture
def check(model: Any, tokenizer: Any, make_config: Callable[..., MaskedSFTConfig]) -> Check:
    def run(rows: Any = None, collator: Any = None, **settings: Any) -> Any:
        args = make_config(per_device_train_batch_size=6)
        step = first_step(model, args, tokenizer, rows, collator=collator, **settings)
        return dict(zip(BATCH_CHECKS, check_batches(step), strict=True))

    return run


def test_spans_are_found_in_padding_of_either_side() -> None:
    part = {
        "input_ids": np.array([[0, 0, 5, 6, 7, 2, 9], [5, 6, 7, 8, 2, 0, 0]]),
        "labels": np.array([[-100, -100, -100, 6, -100, 2, 9], [-100] * 3 + [8, 2] + [-100] * 2]),
        "attention_mask": np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),
    }
    found = [(s.ids.tolist(), s.following, s.row_length, s.is_last) for s in find_spans(part)]
    assert found == [([6], 7, 5, False), ([2, 9], None, 5, True), ([8, 2], None, 5, True)]


def test_rows_as_they_should_be_pass_and_show_their_text(check: Check) -> None:
    labels, stops = check().values()
    assert (labels.value, stops.value) == (0, 0)
    assert labels.note == "of 42 trained tokens have another label"
    assert stops.note.startswith("of 6 trained spans lose theirs, 6 end with one; the first: ")
    assert stops.note.endswith("<|im_end|>'")


def test_labels_that_a_collator_has_moved_already_are_found(check: Check, tokenizer: Any) -> None:
    def collate(rows: Any) -> Any:
        batch = DataCollatorForPromptResponse(tokenizer)(rows)
        return {**batch, "labels": batch["labels"].roll(-1, dims=1)}

    found = check(collator=collate)["labels"]
    # Every span of n tokens is n labels of the tokens after them.
    assert found.value == 42
    assert found.has_failed
    assert "one step left" in found.remedy


def test_a_mask_that_lost_the_stop_token_is_found(check: Check) -> None:
    rows = make_rows()
    rows[2]["response_mask"][-1] = 0
    found = check(rows)["stop tokens"]
    assert (found.value, found.has_failed) == (1, True)
    assert "5 end with one; the first that does not: " in found.note


def test_rows_without_any_stop_token_are_found_unless_they_were_cut(check: Check) -> None:
    rows = [{name: values[:-1] for name, values in row.items()} for row in make_rows()]
    assert check(rows)["stop tokens"].value == 6
    blocks = [{name: values[:5] for name, values in row.items()} for row in make_rows()]
    assert check(blocks)["stop tokens"].value == 0


@pytest.mark.parametrize(("num_stopped", "num_lost"), [(6, 1), (5, 0)])
def test_the_ledger_says_whether_every_row_has_to_end_with_a_stop_token(
    num_stopped: int, num_lost: int, check: Check
) -> None:
    rows = make_rows()
    rows[2] = {name: values[:-1] for name, values in rows[2].items()}
    ledgers = {"train": Ledger(num_rows=6, num_examples=6, num_stopped=num_stopped)}
    assert check(rows, ledgers=ledgers)["stop tokens"].value == num_lost


def test_without_tokens_or_a_tokenizer_the_reason_is_said(check: Check, model: Any) -> None:
    found = check(processing_class=None)["stop tokens"]
    assert found.value is None
    assert "processing_class" in found.note
    embeddings = model.get_input_embeddings()

    def collate(rows: Any) -> Any:
        ids = torch.tensor([row["input_ids"][:6] for row in rows])
        return {"inputs_embeds": embeddings(ids).detach(), "labels": ids}

    found = check(collator=collate, max_tokens_per_microbatch=None)
    assert [each.value for each in found.values()] == [None, None]
