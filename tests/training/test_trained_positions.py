"""The positions that are trained, known before the batch is on a device."""

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st

from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.training.response_batch import CollatorWithLayout, split_batch
from hf_sft_plugin.training.trained_positions import (
    TRAINED_POSITIONS,
    find_trained_positions,
    positions_of_rows,
)

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
    batch = CollatorWithLayout(lambda _: {"labels": labels})([])
    moved = send_to_device(batch, torch.device("meta"))[TRAINED_POSITIONS]
    assert moved.index.device.type == "meta"
    assert moved.on_host.tolist() == [0, 1]


@pytest.mark.parametrize("is_known", [True, False])
def test_the_positions_of_a_larger_batch_are_not_taken_for_those_of_its_part(
    is_known: bool,
) -> None:
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    part = {"labels": labels[1:]}
    if is_known:
        part[TRAINED_POSITIONS] = find_trained_positions(labels)
    assert split_batch(part, LossNormalization.TOKEN).positions.tolist() == [1]
