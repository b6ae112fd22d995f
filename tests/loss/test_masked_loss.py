"""The masked sum, the micro-batch primitive and the weights of every normalization."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import (
    IGNORE_INDEX,
    LossNormalization,
    masked_normalize,
    sft_microbatch_train_step,
)
from hf_sft_plugin.loss.masked_loss import token_weights, weighted_sum

TENSOR = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
MASK = torch.tensor([[1, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("dim", "expected"),
    [(None, 6.5), (0, [2.5, 2.5, 1.5]), (1, [2.0, 4.5]), (-1, [2.0, 4.5])],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_masked_sum_is_divided_by_the_constant(
    dim: int | None, expected: Any, dtype: torch.dtype
) -> None:
    assert masked_normalize(TENSOR, MASK.to(dtype), dim, 2).tolist() == expected


def test_a_float_mask_weighs() -> None:
    assert masked_normalize(TENSOR, torch.full((2, 3), 0.5)).item() == 10.5


def test_the_constant_may_be_a_count_per_example() -> None:
    counts = torch.tensor([2.0, 4.0])
    assert masked_normalize(TENSOR, MASK, 1, counts).tolist() == [2.0, 2.25]


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_any_rank_and_any_dimension_equals_a_sum_of_products(shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 2, shape, generator=generator)
    for dim in (None, *range(-len(shape), len(shape))):
        expected = (tensor * mask).sum() if dim is None else (tensor * mask).sum(dim)
        torch.testing.assert_close(masked_normalize(tensor, mask, dim, 3.0), expected / 3)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_masked_value_cannot_poison_sum_or_gradient(poison: float, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.0, poison, 2.0], requires_grad=True)
    result = masked_normalize(tensor, torch.tensor([1, 0, 1], dtype=dtype))
    result.backward()
    assert result.item() == 3.0
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [1.0, 0.0, 1.0]


def test_a_mask_of_another_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \(3,\) but the tensor \(2, 3\)"):
        masked_normalize(TENSOR, torch.ones(3))


def test_the_microbatch_step_gives_the_numbers_of_its_contract() -> None:
    log_probs = torch.tensor(
        [[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], requires_grad=True
    )
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    loss, metadata = sft_microbatch_train_step(log_probs, mask, 2)
    assert loss.item() == pytest.approx(0.7)
    assert not loss.requires_grad
    assert metadata["num_tokens"] == 7
    assert isinstance(metadata["num_tokens"], int)
    masked_sum = metadata["masked_sum"]
    assert isinstance(masked_sum, torch.Tensor)
    assert masked_sum.item() == pytest.approx(-2.8)
    assert not masked_sum.requires_grad
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-0.25, -0.25, 0.0, -0.25], [-0.25, -0.25, -0.25, -0.25]]


def test_the_microbatch_step_divides_by_the_constant_once_and_by_g_twice() -> None:
    log_probs = torch.full((1, 3), -6.0, requires_grad=True)
    loss, _ = sft_microbatch_train_step(log_probs, torch.ones(1, 3), 3, normalize_constant=2.0)
    assert loss.item() == pytest.approx(18 / 2 / 9)


def test_a_step_without_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 0"):
        sft_microbatch_train_step(torch.zeros(1, 1), torch.ones(1, 1), 0)


TARGETS = torch.tensor([[7, 8, IGNORE_INDEX], [9, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX] * 3])
WEIGHTS = torch.tensor([[1.0, 3.0, 9.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]])


@pytest.mark.parametrize(
    ("normalization", "loss_weights", "weights", "divisors"),
    [
        ("token", None, [[1, 1, 0], [1, 0, 0], [0, 0, 0]], [2, 1, 0]),
        ("token", WEIGHTS, [[1, 3, 0], [0.5, 0, 0], [0, 0, 0]], [4, 0.5, 0]),
        ("example", None, [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]], [1, 1, 0]),
        ("example", WEIGHTS, [[0.25, 0.75, 0], [1, 0, 0], [0, 0, 0]], [1, 1, 0]),
        ("constant", WEIGHTS, [[1, 3, 0], [0.5, 0, 0], [0, 0, 0]], [0, 0, 0]),
    ],
)
def test_each_normalization_weighs_tokens_and_counts_rows_as_it_says(
    normalization: str, loss_weights: Any, weights: Any, divisors: Any
) -> None:
    result = token_weights(TARGETS, loss_weights, LossNormalization(normalization))
    assert result[0].tolist() == weights
    assert result[1].tolist() == divisors
    assert result[0].dtype == torch.float64


def test_a_weight_of_zero_hides_an_impossible_token() -> None:
    loss = weighted_sum(torch.tensor([1.0, torch.inf]), torch.tensor([2.0, 0.0]))
    assert loss.item() == 2.0
