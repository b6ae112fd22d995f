"""What is known of a batch on the host: where its tokens are, and which are trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedSFTTrainer
from hf_sft_plugin.batches.data_loaders import CollatorWithFacts
from hf_sft_plugin.batches.host_facts import (
    facts_of,
    find_trained_positions,
    positions_of_rows,
    with_facts,
)
from hf_sft_plugin.batches.response_batch import split_batch
from hf_sft_plugin.loss.masked_loss import LossNormalization

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 7))


@given(SIZES, st.integers(0, 100))
def test_they_are_those_of_the_shifted_labels(size: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 2, size, generator=generator) * 100
    found = find_trained_positions(labels)
    expected = [
        row * size[1] + column
        for row in range(size[0])
        for column in range(size[1] - 1)
        if labels[row, column + 1] != -100
    ]
    assert found.index.tolist() == found.on_host.tolist() == expected
    assert found.shape == size
    again = positions_of_rows(found.rows(), size[1])
    assert again.index.tolist() == expected
    assert again.shape == size


def test_they_move_with_their_batch_and_stay_on_the_host() -> None:
    labels = torch.tensor([[-100, 5, 6]])
    batch = CollatorWithFacts(lambda _: {"labels": labels})([])
    moved = facts_of(send_to_device(batch, torch.device("meta"))).trained
    assert moved is not None
    assert moved.index.device.type == "meta"
    assert moved.on_host.tolist() == [0, 1]


@pytest.mark.parametrize("is_known", [True, False])
def test_the_positions_of_a_larger_batch_are_not_taken_for_those_of_its_part(
    is_known: bool,
) -> None:
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    part = {"labels": labels[1:]}
    if is_known:
        part = with_facts(part, trained=find_trained_positions(labels))
    assert split_batch(part, LossNormalization.TOKEN).positions.tolist() == [1]


def train_fewer(batch: Any) -> dict[str, Any]:
    columns = torch.arange(batch["labels"].shape[1])
    return {**batch, "labels": batch["labels"].masked_fill(columns % 3 == 0, -100)}


def train_more(batch: Any) -> dict[str, Any]:
    batch["labels"][:, 1:4] = batch["input_ids"][:, 1:4]
    return dict(batch)


def read_others(batch: Any) -> dict[str, Any]:
    ids = batch["input_ids"].clone()
    ids[:, 5] = torch.arange(40, 40 + len(ids))
    return {**batch, "input_ids": ids}


@pytest.mark.parametrize("change", [train_fewer, train_more, read_others])
@pytest.mark.parametrize("padding_free", ["auto", "off"])
def test_a_batch_that_a_subclass_changes_is_trained_as_changed(
    change: Callable[[Any], dict[str, Any]],
    padding_free: str,
    model_factory: Any,
    make_config: Any,
    tokenizer: Any,
) -> None:
    """As if the collator had made it so; the rows share a prompt, until that is changed."""

    class Changing(MaskedSFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, change(inputs), *args, **kwargs)

    class ChangingCollator(DataCollatorForPromptResponse):
        def __call__(self, rows: Any) -> Any:
            return change(super().__call__(rows))

    collator = ChangingCollator(tokenizer)
    rows = [
        {"input_ids": [7] * 20 + [10 + n] * 6, "response_mask": [0] * 20 + [1] * 6}
        for n in range(4)
    ]
    settings = {
        "max_steps": 1,
        "optim": "sgd",
        "per_device_train_batch_size": 4,
        "padding_free": padding_free,
        # A divisor that knows nothing of labels.
        "loss_normalization": "constant",
        "normalize_constant": 10.0,
    }
    runs = []
    for trainer_class, own in ((Changing, None), (MaskedSFTTrainer, collator)):
        trainer = trainer_class(
            model_factory().double(),
            make_config(**settings),
            data_collator=own,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append((trainer.state.log_history[0], trainer.model))
    (found, model), (expected, reference) = runs
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-14)
    assert found["num_response_tokens"] == expected["num_response_tokens"]
    for parameter, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=1e-14)
