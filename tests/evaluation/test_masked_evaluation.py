"""Evaluations count every response, and say so where there is none.

That their figures are exact is tested with those of training, in `test_masked_loss_mixin.py`.
"""

from collections import UserList
from collections.abc import Callable
from typing import Any

import pytest
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Trainer

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


ROWS = [{"input_ids": [5 + n, 7, 9, 2], "response_mask": [0, 1, 1, 1]} for n in range(5)]


class OwnTrainer(MaskedLossMixin, Trainer):
    """Any `Trainer` with the mixin."""


def without_datasets(kind: type[Trainer], has_length: bool = True) -> Any:
    """A trainer whose data come in batches that were made elsewhere."""

    class OwnLoaders(kind):  # type: ignore[misc, valid-type]
        def make_batches(self) -> list[Any]:
            return [self.data_collator(ROWS[start : start + 2]) for start in (0, 2, 4)]

        def get_train_dataloader(self) -> Any:
            return self.make_batches() if has_length else (b for b in self.make_batches() * 9)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return self.make_batches() if has_length else iter(self.make_batches())

    return OwnLoaders


def make_own(
    kind: type[Trainer], args: MaskedSFTConfig, model: Any, tokenizer: Any, **more: Any
) -> Any:
    collator = DataCollatorForPromptResponse(tokenizer)
    return kind(model, args, data_collator=collator, processing_class=tokenizer, **more)


@pytest.mark.parametrize("kind", [OwnTrainer, MaskedSFTTrainer])
@pytest.mark.parametrize("has_length", [True, False])
def test_batches_that_were_made_elsewhere_are_trained_and_evaluated(
    kind: type[Trainer],
    has_length: bool,
    model_factory: Callable[..., Any],
    tokenizer: Any,
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    settings = {"max_steps": 6, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    args = make_config(**settings, eval_strategy="steps", eval_steps=3)
    own_loaders = without_datasets(kind, has_length)
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS}
    expected = make_own(kind, args, model_factory(), tokenizer, **rows)
    own = make_own(own_loaders, args, model_factory(), tokenizer, **rows)
    alone = make_own(own_loaders, make_config(**settings), model_factory(), tokenizer)
    assert alone.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]
    alone.train()
    for trainer in (expected, own):
        trainer.train()
    losses = [
        [log.get("loss", log.get("eval_loss")) for log in trainer.state.log_history]
        for trainer in (expected, own)
    ]
    assert losses[0] == losses[1]
    trained = [log["loss"] for log in expected.state.log_history if "loss" in log]
    assert [log["loss"] for log in alone.state.log_history if "loss" in log] == trained
    assert len(trained) == 6


def test_predictions_for_such_batches_are_complete_at_the_end_of_an_epoch(
    model: Any, tokenizer: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    shapes: list[Any] = []

    def record(predictions: EvalPrediction) -> dict[str, float]:
        shapes.append(predictions.predictions.shape)
        return {}

    class OwnEvaluation(OwnTrainer):
        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return [self.data_collator(ROWS[:3]), self.data_collator(ROWS[3:])]

    # The last training batch of an epoch is one row.
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS, "compute_metrics": record}
    make_own(OwnEvaluation, make_config(**settings), model, tokenizer, **rows).train()
    assert shapes == [(5, 4)] * 3


def test_responses_are_not_generated_for_batches_whose_rows_are_unknown(
    model: Any, tokenizer: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    args = make_config(predict_with_generate=True)
    trainer = make_own(without_datasets(MaskedSFTTrainer), args, model, tokenizer)
    with pytest.raises(ValueError, match=r"without a dataset.* set predict_with_generate to False"):
        trainer.evaluate()
