"""Ten optimizer steps whose losses are written down, and a plain float64 loop that agrees."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer

NUM_STEPS = 10
ROWS_PER_STEP = 6
LEARNING_RATE = 1e-2
GOLDEN_LOSSES = [
    5.673480519,
    5.337654384,
    5.041977710,
    4.720897411,
    4.421362643,
    4.117453058,
    3.984145843,
    3.541185984,
    3.477960352,
    3.235531848,
]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Counting rows: the response goes on where the prompt stopped."""
    rng = random.Random(0)
    rows = []
    for _ in range(NUM_STEPS * ROWS_PER_STEP):
        start, num_prompt, num_response = rng.randint(3, 30), rng.randint(2, 6), rng.randint(1, 12)
        rows.append(
            {
                "input_ids": [*range(start, start + num_prompt + num_response), 2],
                "response_mask": [0] * num_prompt + [1] * (num_response + 1),
            }
        )
    return rows


def test_the_losses_of_ten_steps_are_as_they_were(
    rows: list[dict[str, Any]],
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    trainer = MaskedSFTTrainer(
        model_factory(),
        make_config(
            max_steps=NUM_STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=ROWS_PER_STEP // 2,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-5)


def test_a_plain_loop_in_float64_gives_the_same_losses(
    rows: list[dict[str, Any]], model_factory: Callable[..., Any]
) -> None:
    """One row at a time, with nothing of the package: forward, cross-entropy, AdamW."""
    model = model_factory().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(NUM_STEPS):
        batch = rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        count = sum(sum(row["response_mask"]) for row in batch)
        total = 0.0
        for row in batch:
            ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["response_mask"]).bool()
            logits = model(ids[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[:-1][mask[1:]], ids[1:][mask[1:]], reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-9)
