"""Evaluations count every response, and say so where there is none.

That their figures are exact is tested with those of training, in `test_masked_loss_mixin.py`.
"""

from collections import UserList
from collections.abc import Callable
from typing import Any

import pytest
from transformers import DataCollatorForSeq2Seq, Trainer

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
)


class Unchecked(UserList[Any]):
    """Rows of a kind that the trainer leaves to the collator."""


def test_an_evaluation_of_conversations_that_split_counts_every_response(
    tokenizer_factory: Callable[..., Any],
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    # Earlier responses are written otherwise, so each conversation makes two examples.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' or loop.last %}"
        "{{ m.content }}{% else %}said{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [("user", "hello"), ("assistant", "world"), ("user", "what"), ("assistant", "this")]
    messages = [{"role": role, "content": text} for role, text in turns]

    class OwnTrainer(MaskedLossMixin, Trainer):
        pass

    tokenizer = tokenizer_factory(chat_template=template)
    figures = []
    for batch_size in (1, 4):
        trainer = OwnTrainer(
            model,
            make_config(per_device_eval_batch_size=batch_size),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            eval_dataset=[{"messages": messages}] * 5,
        )
        figures.append(trainer.evaluate())
    assert figures[0]["eval_num_response_tokens"] == figures[1]["eval_num_response_tokens"]
    assert figures[0]["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=1e-6)


def test_an_evaluation_without_response_tokens_is_refused(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        eval_dataset=Unchecked([{"input_ids": [5, 6], "labels": [-100, -100]}]),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="No row of the evaluation data has a response token"):
        trainer.evaluate()
