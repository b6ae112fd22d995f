"""Trainers to verify, for the tests of what a verification is made of."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedLossMixin, MaskedSFTConfig
from hf_sft_plugin.verification.first_step import FirstStep


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""

    step: FirstStep

    def verify_first_step(self, batches: Any, num_items: Any) -> None:
        self.step = FirstStep(self, batches, num_items)
        raise _ReachedError


class _ReachedError(Exception):
    """The first step was about to begin."""


def make_rows(num_rows: int = 6) -> list[dict[str, Any]]:
    """Rows of 4 tokens that are read and 2 to 11 that are trained, the last the stop token."""
    return [
        {
            "input_ids": [*range(40 + n, 44 + n), *range(100 + 9 * n, 101 + 11 * n), 2],
            "response_mask": [0] * 4 + [1] * (2 * n + 2),
        }
        for n in range(num_rows)
    ]


def first_step(
    model: nn.Module,
    args: MaskedSFTConfig,
    tokenizer: Any,
    rows: Any = None,
    trainer_class: type[OwnTrainer] = OwnTrainer,
    collator: Callable[..., Any] | None = None,
    **settings: Any,
) -> FirstStep:
    """The first step of a training, right before it is taken."""
    trainer = trainer_class(
        model=model,
        args=args,
        data_collator=collator or DataCollatorForPromptResponse(tokenizer),
        train_dataset=make_rows() if rows is None else rows,
        processing_class=tokenizer,
    )
    for name, value in settings.items():
        setattr(trainer, name, value)
    try:
        trainer.train()
    except _ReachedError:
        return trainer.step
    raise AssertionError("a training has a first step")
