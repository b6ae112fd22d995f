"""The model that a trainer is given, or the one that is made for each training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed

from hf_sft_plugin import MaskedSFTTrainer

Make = Callable[..., Any]


def weights_of(trainer: MaskedSFTTrainer) -> list[torch.Tensor]:
    assert trainer.model is not None
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize(
    "lora", [None, LoraConfig(target_modules=["q_proj"])], ids=["full", "lora"]
)
@pytest.mark.parametrize("takes_trial", [False, True], ids=["no argument", "trial"])
def test_a_model_is_made_for_each_training_of_the_seed_of_the_run(
    lora: LoraConfig | None,
    takes_trial: bool,
    model_factory: Make,
    tokenizer: Any,
    chat_rows: list[dict[str, Any]],
    make_config: Make,
) -> None:
    made = []

    def make() -> Any:
        model = model_factory()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        made.append(model)
        return model

    def make_for(trial: Any) -> Any:
        assert trial is None
        return make()

    rows = Dataset.from_list(chat_rows)
    settings: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer}
    settings["peft_config"] = lora
    args = make_config(max_steps=2, seed=3)
    init = make_for if takes_trial else make
    trainer = MaskedSFTTrainer(None, args, model_init=init, **settings)
    first = weights_of(trainer)
    trainer.train()
    once = weights_of(trainer)
    trainer.train()
    assert len(made) == 3
    assert all(map(torch.equal, weights_of(trainer), once))
    assert not all(map(torch.equal, first, once))
    set_seed(3)
    given = MaskedSFTTrainer(make(), args, **settings)
    assert all(map(torch.equal, weights_of(given), first))


def test_a_model_and_what_makes_one_are_not_given_together(
    model: Any, tokenizer: Any, make_config: Make
) -> None:
    args = make_config()
    with pytest.raises(ValueError, match="Both model and model_init"):
        MaskedSFTTrainer(model, args, processing_class=tokenizer, model_init=lambda: model)
    with pytest.raises(ValueError, match="Neither model nor model_init"):
        MaskedSFTTrainer(None, args, processing_class=tokenizer)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        MaskedSFTTrainer(
            None,
            args,
            processing_class=tokenizer,
            model_init=lambda: model,
            optimizers=(optimizer, None),
        )
