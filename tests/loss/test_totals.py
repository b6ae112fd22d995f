"""Sums and counts: added on the device, reduced once, divided once."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from hf_sft_plugin import (
    MaskedSFTConfig,
    MaskedSFTTrainer,
    ShardDataset,
    prepare_dataset,
    write_shards,
)
from hf_sft_plugin.batches.host_facts import find_trained_positions
from hf_sft_plugin.loss.masked_loss import LossNormalization, token_weights
from hf_sft_plugin.loss.token_stats import TokenStats, shift_labels
from hf_sft_plugin.loss.totals import NUM_TOTALS, Totals, WindowedTotals, row_totals


def test_the_totals_of_a_batch_are_sums_by_row() -> None:
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0] * 3, [0.0, 2.0, 0.0]], dtype=torch.float64)
    stats = TokenStats(
        log_probs=torch.tensor([-1.0, -2.0, -4.0]),
        token_entropy=torch.tensor([0.5, 0.25, 0.125]),
        is_top1=torch.tensor([1.0, 0.0, 1.0]),
    )
    totals = row_totals(
        torch.tensor([3.0, 4.0, 1.0]),
        stats,
        torch.tensor([0, 1, 7]),
        weights,
        divisors=weights.sum(-1),
        num_tokens=torch.tensor([3, 2, 3]),
    )
    rows = [Totals(*row) for row in totals.tolist()]
    assert rows == [
        Totals(5.0, 1.5, 3.0, 0.75, 1.0, 2.0, 3.0),
        Totals(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0),
        Totals(2.0, 2.0, 4.0, 0.125, 1.0, 1.0, 3.0),
    ]
    whole = rows[0] + rows[1] + rows[2]
    assert whole.means() == {
        "loss": 2.0,
        "token_entropy": 0.875 / 3,
        "token_accuracy": 2 / 3,
    }
    assert whole.means(with_nll=True) == {**whole.means(), "nll": 7 / 3}
    assert whole.perplexity() == math.exp(7 / 3)
    assert whole.counts() == {"num_response_tokens": 3, "num_tokens": 8}


@pytest.mark.parametrize("normalization", LossNormalization)
def test_tokens_that_are_not_finite_are_counted_and_are_in_no_mean(normalization: str) -> None:
    """The figures are those of the finite tokens alone; the counts are those of all tokens."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, 2, -100, 4, -100], [1, 2, 3, -100, -100]])
    loss_weights = torch.tensor([[1, 0.5, 2, 1, 1.5], [1, 1, 0, 2, 0], [1, 0.25, 1, 0, 0]])
    is_finite = torch.tensor([True, False, True, True, True, False, False, False])

    def totals(labels: torch.Tensor, keep: torch.Tensor, leaves_out: bool) -> Totals:
        targets, shifted = shift_labels(labels), shift_labels(loss_weights, fill=0)
        weights, divisors = token_weights(targets, shifted, LossNormalization(normalization))
        if normalization == "constant":
            # Each row's share of it stands for so much weight.
            divisors = weights.sum(-1) * 3
        values = torch.rand(4, 8, generator=generator.manual_seed(1), dtype=torch.float64)
        values[0, ~is_finite] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]).double()
        values[1:3, ~is_finite] = torch.nan
        losses, *stats = values[:, keep]
        positions = find_trained_positions(labels).index
        more = torch.full((3,), 5), leaves_out
        rows = row_totals(losses, TokenStats(*stats), positions, weights, divisors, *more)
        return Totals(*rows.sum(0).tolist())

    found = totals(labels, torch.ones(8, dtype=torch.bool), leaves_out=True)
    assert (found.num_response_tokens, found.num_nonfinite_losses) == (8, 4)
    left = labels.clone()
    left[0, 2] = left[1, 3] = left[2, 1] = left[2, 2] = -100
    expected = totals(left, is_finite, leaves_out=False).means(with_nll=True)
    if normalization == "example":
        # A row that lost tokens counts as much as they leave of it, so that no row is blown up.
        losses = torch.rand(4, 8, generator=generator.manual_seed(1), dtype=torch.float64)[0]
        shares = torch.tensor([0.5, 0, 1, 1.5]).double() / 5, torch.tensor([1.0]).double() / 3
        total = (shares[0] * losses[:4]).sum() + (shares[1] * losses[4]).sum()
        expected["loss"] = float(total / sum(share.sum() for share in shares))
    assert found.means(with_nll=True) == pytest.approx(expected, rel=1e-12)


def test_where_no_token_is_finite_the_means_are_not_numbers() -> None:
    totals = Totals(num_response_tokens=3.0, num_nonfinite_losses=3.0)
    assert all(math.isnan(value) for value in totals.means(with_nll=True).values())
    assert totals.means().keys() == {"loss", "token_entropy", "token_accuracy"}


def test_a_long_run_does_not_lose_tokens_to_rounding() -> None:
    """In float32 one token more is lost from 2^24 on."""
    window = WindowedTotals()
    window.add(torch.full((NUM_TOTALS,), 2.0**24, dtype=torch.float64))
    window.add(torch.ones(NUM_TOTALS, dtype=torch.float64))
    assert window.close(Accelerator(cpu=True)).counts()["num_tokens"] == 2**24 + 1


def test_no_tokens_have_no_means() -> None:
    assert Totals(num_tokens=5.0).means() == {}


def test_a_hopeless_perplexity_is_infinite_rather_than_an_error() -> None:
    assert Totals(nll=1e6, num_response_tokens=1.0).perplexity() == math.inf


def test_closing_a_window_moves_it_into_the_run() -> None:
    accelerator = Accelerator(cpu=True)
    totals = WindowedTotals()
    totals.add(torch.full((NUM_TOTALS,), 2.0, dtype=torch.float64))
    assert totals.peek(accelerator).loss == 2.0
    assert totals.run.loss == 0.0
    assert totals.close(accelerator).loss == 2.0
    assert totals.close(accelerator).loss == 0.0
    assert totals.run.loss == 2.0


@pytest.mark.parametrize(
    ("num_processes", "expected"), [(2, [1.0, 2.0]), (1, [3.0]), (3, [3.0, 0.0, 0.0])]
)
def test_every_process_goes_on_with_its_window_unless_their_number_has_changed(
    num_processes: int, expected: list[float]
) -> None:
    found = []
    for index in range(num_processes):
        process: Any = SimpleNamespace(
            num_processes=num_processes,
            process_index=index,
            is_main_process=index == 0,
            device=torch.device("cpu"),
            reduce=lambda values, reduction: values,
        )
        totals = WindowedTotals()
        totals.restore(Totals(loss=9.0), [Totals(loss=1.0), Totals(loss=2.0)], process)
        assert totals.run.loss == 9.0
        found.append(totals.peek(process).loss)
    assert found == expected


def test_a_window_that_was_added_keeps_its_own_tensor() -> None:
    totals, batch = WindowedTotals(), torch.ones(NUM_TOTALS, dtype=torch.float64)
    totals.add(batch)
    totals.add(batch)
    assert batch.tolist() == [1.0] * NUM_TOTALS
    assert totals.peek(Accelerator(cpu=True)).loss == pytest.approx(2.0)


def test_the_means_of_each_source_are_those_of_its_rows_alone(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    texts = ("world", "the answer", "4", "this question is", "system")
    rows = [
        {"prompt": "hello", "response": text, "source": "book" if i % 2 else "web"}
        for i, text in enumerate(texts)
    ]
    trainer = MaskedSFTTrainer(
        model, make_config(), eval_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    metrics = trainer.evaluate()
    for name in ("book", "web"):
        own = Dataset.from_list([row for row in rows if row["source"] == name])
        alone = trainer.evaluate(own.remove_columns("source"))
        for key in ("loss", "token_entropy", "token_accuracy"):
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"], rel=1e-6)
    (one,) = {row["source"] for row in rows[:1]}
    assert f"eval_{one}_loss" not in trainer.evaluate(Dataset.from_list(rows[:1]))


def test_rows_of_a_shard_set_keep_their_source(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "hello", "response": text, "source": source}
        for text, source in (("world", "web"), ("the answer", "book"), ("4", "web"))
    ]
    prepared, _ = prepare_dataset(Dataset.from_list(rows), tokenizer)
    write_shards(tmp_path / "set", {"train": prepared}, tokenizer)
    trainer = MaskedSFTTrainer(model, make_config(), processing_class=tokenizer)
    expected = trainer.evaluate(prepared)
    found = trainer.evaluate(ShardDataset(tmp_path / "set"))
    named = {key for key in expected if key.startswith(("eval_web_", "eval_book_"))}
    assert {"eval_web_loss", "eval_book_token_accuracy"} <= named
    assert {key: found[key] for key in named} == {key: expected[key] for key in named}
    blocks = trainer.evaluate(ShardDataset(tmp_path / "set", block_size=8))
    assert not named & set(blocks)
