"""Batches padded on the left run as those padded on the right do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from one_step import Gradients
from torch import Tensor

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
)
from hf_sft_plugin.batches.data_loaders import CollatorWithFacts
from hf_sft_plugin.batches.host_facts import facts_of, tensors_of
from hf_sft_plugin.batches.left_padding import move_padding_right


def make_rows() -> list[dict[str, Any]]:
    """Nine rows of 4 to 28 tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = [4 + (number * 11) % 25 for number in range(9)]
    ids = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "response_mask": [0, 0] + [1] * (len(row) - 2)} for row in ids]


class LeftCollator(DataCollatorForPromptResponse):
    """Pads on the left."""

    def __call__(self, rows: Any) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        num_padding = (batch["attention_mask"] == 0).sum(-1, keepdim=True)
        width = batch["attention_mask"].shape[1]
        columns = (torch.arange(width) - num_padding) % width
        return {name: value.take_along_dim(columns, dim=1) for name, value in batch.items()}


@pytest.mark.parametrize("multiple", [None, 64])
def test_a_batch_padded_on_the_left_becomes_the_one_padded_on_the_right(
    multiple: int | None, tokenizer: Any
) -> None:
    expected, left = (
        CollatorWithFacts(collator(tokenizer, pad_to_multiple_of=multiple), share_prompts=True)(
            make_rows()
        )
        for collator in (DataCollatorForPromptResponse, LeftCollator)
    )
    assert not torch.equal(left["input_ids"], expected["input_ids"])
    found = move_padding_right(left, multiple)
    assert found.keys() == expected.keys()
    for name in tensors_of(found):
        assert torch.equal(found[name], expected[name]), name
    layout, truth = facts_of(found).layout, facts_of(expected).layout
    assert (layout.shape, layout.document_lengths) == (truth.shape, truth.document_lengths)
    assert torch.equal(layout.index, truth.index)
    assert torch.equal(layout.position_ids, truth.position_ids)
    assert layout.are_rows
    assert [row.tolist() for row in layout.documents] == [row.tolist() for row in truth.documents]
    assert torch.equal(facts_of(found).trained.index, facts_of(expected).trained.index)


def test_other_batches_are_left_alone(tokenizer: Any) -> None:
    right = CollatorWithFacts(DataCollatorForPromptResponse(tokenizer))(make_rows())
    left = LeftCollator(tokenizer)(make_rows())
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    own = CollatorWithFacts(lambda _: {**left, "position_ids": positions})(make_rows())
    for batch in (right, left, own, [right]):
        assert move_padding_right(batch) is batch


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_padding_on_the_left_has_the_budget_and_the_gradient_of_padding_on_the_right(
    model_type: str,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    gradients, ran = [], []

    class Watched(MaskedSFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append(inputs["attention_mask"].sum(-1).tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    own = {"n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    for collator in (DataCollatorForPromptResponse(tokenizer), LeftCollator(tokenizer)):
        keeper = Gradients()
        trainer = Watched(
            model_factory(model_type, **(own if model_type == "gpt2" else {})).double(),
            make_config(
                max_steps=1,
                per_device_train_batch_size=3,
                gradient_accumulation_steps=3,
                max_grad_norm=0.0,
            ),
            data_collator=collator,
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
            callbacks=[keeper],
        )
        trainer.train()
        gradients += keeper.values
        assert "GB needed for" in trainer.describe_speed()["memory"]
    # All nine rows at once, both times.
    assert len(ran) == 2
    assert sorted(ran[0]) == sorted(ran[1]) == sorted(len(row["input_ids"]) for row in make_rows())
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert float(difference) < 1e-12


def test_the_summary_says_where_batches_run_as_they_come(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    def with_positions(rows: Any) -> dict[str, Tensor]:
        batch = LeftCollator(tokenizer)(rows)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return batch

    trainer = MaskedSFTTrainer(
        model,
        make_config(max_steps=1),
        data_collator=with_positions,
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
    )
    assert isinstance(trainer, MaskedLossMixin)
    trainer.train()
    assert trainer.describe_speed()["memory"] == "not estimated, so batches run as they come"
