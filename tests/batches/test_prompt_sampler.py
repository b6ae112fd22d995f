"""Rows with the same prompt follow each other, and every row comes once per epoch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_sft_plugin import MaskedSFTTrainer
from hf_sft_plugin.batches.data_loaders import GroupedSampler, SeededLengthSampler, group_prompts

PROMPTS = [list(range(start, start + 20)) for start in (10, 50, 90)]


def make_row(prompt: list[int], response: list[int]) -> dict[str, list[int]]:
    mask = [0] * len(prompt) + [1] * len(response)
    return {"input_ids": prompt + response, "response_mask": mask}


ROWS = [make_row(PROMPTS[number % 3], [200 + number, 2]) for number in range(12)]


def test_rows_with_equal_prompts_are_a_group() -> None:
    groups = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert group_prompts(ROWS) == groups
    assert group_prompts(Dataset.from_list(ROWS)) == groups
    labelled = [
        {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]}
        for ids, mask in (row.values() for row in ROWS)
    ]
    assert group_prompts(Dataset.from_list(labelled)) == groups


def test_the_turns_of_a_conversation_are_a_group() -> None:
    turns = [make_row(PROMPTS[0], [7, 8]), make_row([*PROMPTS[0], 7, 8, 9, 9], [5])]
    assert group_prompts([turns[1], ROWS[1], turns[0]]) == [[0, 2], [1]]


def test_prompts_that_are_too_short_to_be_shared_group_nothing() -> None:
    rows = [make_row([], [5, 6]), make_row([5], [7]), make_row([5], [8])]
    assert group_prompts(rows) == [[0], [1], [2]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(0, 9))
def test_groups_stay_whole_and_their_order_is_that_of_seed_and_epoch(
    sizes: list[int], seed: int
) -> None:
    numbers = iter(range(sum(sizes)))
    groups = [[next(numbers) for _ in range(size)] for size in sizes]
    sampler, same = GroupedSampler(groups, seed), GroupedSampler(groups, seed)
    first = list(sampler)
    assert len(sampler) == len(first)
    assert sorted(first) == list(range(sum(sizes)))
    by_start = {group[0]: group for group in groups}
    walked: list[int] = []
    while len(walked) < len(first):
        walked += by_start[first[len(walked)]]
    assert walked == first
    assert list(same) == first
    sampler.set_epoch(3)
    same.set_epoch(3)
    assert list(same) == list(sampler)


def test_the_trainer_keeps_prompts_together_in_a_new_order_each_epoch(
    model: Any, tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    def run(**settings: Any) -> list[list[int]]:
        args = make_config(
            per_device_train_batch_size=4,
            max_steps=-1,
            num_train_epochs=6,
            seed=3,
            group_by_prompt=True,
            **settings,
        )
        batches: list[list[int]] = []

        class Looking(MaskedSFTTrainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                batches.append(inputs["input_ids"][:, 0].tolist())
                return super().compute_loss(model, inputs, *args, **kwargs)

        rows = Dataset.from_list(ROWS)
        Looking(model, args, train_dataset=rows, processing_class=tokenizer).train()
        return batches

    batches = run()
    assert all(len(set(batch)) == 1 for batch in batches)
    epochs = [tuple(batch[0] for batch in batches[n : n + 3]) for n in range(0, 18, 3)]
    assert all(sorted(epoch) == [10, 50, 90] for epoch in epochs)
    assert len(set(epochs)) > 1
    assert run() == batches
    assert run(data_seed=8) != batches


def test_rows_without_tokens_and_streams_are_refused(
    model: Any, tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="Row 0 of the training data has the columns prompt, resp"):
        group_prompts([{"prompt": "a", "response": "b"}])
    with pytest.raises(ValueError, match="group_by_prompt is set, but a stream has no rows to"):
        MaskedSFTTrainer(
            model,
            make_config(group_by_prompt=True),
            train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(),
            processing_class=tokenizer,
        ).train()


def test_rows_of_one_length_follow_each_other_in_an_order_of_seed_and_epoch_alone() -> None:
    lengths = [1 + number % 40 for number in range(400)]
    sampler = SeededLengthSampler(lengths, num_rows=8, seed=3)

    def order(epoch: int) -> list[int]:
        # Whatever the process has drawn before.
        torch.rand(5)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(0)
    assert sorted(first) == list(range(400))
    widths = []
    for start in range(0, 400, 8):
        step = [lengths[row] for row in first[start : start + 8]]
        widths.append(max(step) - min(step))
    # Of eight rows of 1 to 40 tokens at random it would be 30 and more.
    assert sorted(widths)[25] <= 5
    assert order(1) != first
    assert order(0) == first
    assert list(SeededLengthSampler(lengths, num_rows=8, seed=4)) != first
