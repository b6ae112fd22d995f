"""Batches taken apart, and laid end to end."""

from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from hf_sft_plugin.batches.data_loaders import CollatorWithFacts
from hf_sft_plugin.batches.host_facts import facts_of, find_layout, with_facts
from hf_sft_plugin.batches.response_batch import split_batch, without_padding
from hf_sft_plugin.loss.masked_loss import LossNormalization

IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [0, 0, 0, 0], [10, 11, 12, 13]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
LABELS = torch.tensor([[-100, 6, 7, -100], [-100, 9, -100, -100], [-100] * 4, [-100, 11, -100, 13]])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded on the left."""
    return {name: tensor.roll(1, dims=1) for name, tensor in batch.items()}


def test_rows_are_laid_end_to_end_in_their_order() -> None:
    layout = find_layout(BATCH)
    assert layout is not None
    assert layout.document_lengths == [3, 2, 4]
    assert layout.flatten(IDS).tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert layout.boundaries.tolist() == [0, 3, 5, 9]
    assert layout.boundaries.dtype == torch.int32
    assert layout.model_inputs()["max_length_q"] == 4


def test_padding_may_be_on_the_left() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 6], [-100, 8, 9]]),
    }
    layout = find_layout(batch)
    assert layout is not None
    assert layout.flatten(batch["input_ids"]).tolist() == [[5, 6, 7, 8, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 0, 1, 2]]


def test_positions_given_with_a_batch_are_kept() -> None:
    positions = torch.tensor([[3, 4, 5, 0], [0, 1, 0, 0], [0] * 4, [0, 1, 2, 3]])
    layout = find_layout({**BATCH, "position_ids": positions})
    assert layout is not None
    assert layout.position_ids.tolist() == [[3, 4, 5, 0, 1, 0, 1, 2, 3]]
    assert layout.document_lengths == [3, 2, 4]


def test_packed_rows_are_documents_where_their_positions_begin_anew() -> None:
    packed = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 1], *[[0, 1, 2, 3]] * 3])}
    layout = find_layout(packed)
    assert layout is not None
    assert layout.document_lengths == [2, 2, 4, 4, 4]


def test_what_collators_of_packed_rows_say_of_documents_is_said_anew() -> None:
    said = {
        "cu_seq_lens_q": torch.tensor([0, 1, 16]),
        "cu_seq_lens_k": torch.tensor([0, 1, 16]),
        "max_length_q": 15,
        "max_length_k": 15,
        "seq_idx": torch.zeros(1, 16),
    }
    positions = torch.tensor([[0, 1, 0, 1], *[[0, 1, 2, 3]] * 3])
    packed = {"input_ids": IDS, "position_ids": positions, "labels": LABELS}
    plain, told = (
        without_padding(split_batch(batch, LossNormalization.TOKEN))
        for batch in (packed, {**packed, **said})
    )
    assert plain is not None
    assert told is not None
    assert told.model_inputs.keys() == plain.model_inputs.keys()
    assert told.model_inputs["cu_seq_lens_q"].tolist() == [0, 2, 4, 8, 12, 16]
    assert told.model_inputs["max_length_k"] == 4


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "labels": LABELS},
        {"labels": LABELS, "attention_mask": MASK},
        {**BATCH, "pixel_values": torch.zeros(4, 3, 2, 2)},
        {**BATCH, "token_type_ids": torch.zeros_like(IDS)},
        {**BATCH, "position_ids": torch.zeros(3, 4, 4, dtype=torch.long)},
        {**BATCH, "attention_mask": torch.ones(4, 1, 4, 4)},
        {**BATCH, "attention_mask": torch.zeros_like(MASK)},
        # Documents by number, and a hole.
        {**BATCH, "attention_mask": torch.tensor([[1, 1, 2, 2]] * 4)},
        {**BATCH, "attention_mask": torch.tensor([[1, 0, 1, 1]] * 4)},
        # The first token is predicted from padding.
        {**BATCH, "attention_mask": torch.tensor([[0, 1, 1, 1]] * 4), "labels": IDS},
    ],
    ids=[
        "nothing is padded",
        "no tokens",
        "images",
        "token types",
        "positions in three dimensions",
        "a mask of four dimensions",
        "no tokens at all",
        "numbered documents",
        "a hole",
        "a target of padding",
    ],
)
def test_batches_that_might_mean_something_else_keep_their_shape(batch: dict[str, Tensor]) -> None:
    assert find_layout(batch) is None


@pytest.mark.parametrize("is_known", [True, False], ids=["layout given", "layout found"])
def test_targets_and_weights_follow_their_tokens(is_known: bool) -> None:
    weights = torch.arange(16.0).view(4, 4)
    inputs: dict[str, Any] = {**BATCH, "loss_weights": weights, "note": "kept"}
    if is_known:
        inputs = with_facts(inputs, layout=find_layout(inputs))
    batch = split_batch(inputs, LossNormalization.TOKEN)
    flat = without_padding(batch)
    assert flat is not None
    assert flat.targets.tolist() == [[6, 7, -100, 9, -100, 11, -100, 13, -100]]
    assert flat.weights.tolist() == [[1, 2, 0, 5, 0, 13, 0, 15, 0]]
    assert flat.model_inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert flat.model_inputs["note"] == "kept"
    assert "attention_mask" not in flat.model_inputs
    # What metrics are made of keeps a row for each row.
    assert flat.divisors.tolist() == batch.divisors.tolist()
    assert flat.num_tokens.tolist() == [3, 2, 0, 4]


def test_the_layout_of_a_larger_batch_is_not_taken_for_that_of_its_part() -> None:
    whole = find_layout(BATCH)
    part = {name: tensor[2:] for name, tensor in BATCH.items()}
    part = with_facts(part, layout=whole)
    flat = without_padding(split_batch(part, LossNormalization.TOKEN))
    assert flat is not None
    assert flat.model_inputs["input_ids"].tolist() == [[10, 11, 12, 13]]


def test_the_layout_travels_with_its_batch() -> None:
    def collate(rows: list[int]) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in BATCH.items()}

    loader = DataLoader(range(4), batch_size=2, collate_fn=CollatorWithFacts(collate))
    batches = [send_to_device(batch, torch.device("meta")) for batch in loader]
    layouts = [facts_of(batch).layout for batch in batches]
    assert [layout.document_lengths for layout in layouts if layout] == [[3, 2], [4]]
    assert all(layout and layout.index.device.type == "meta" for layout in layouts)


def test_a_batch_without_a_layout_stays_as_it_is() -> None:
    for batch in ({"input_ids": IDS}, [1, 2], {"labels": LABELS, "text": ["a"]}):
        assert CollatorWithFacts(lambda _, batch=batch: batch)([]) == batch
