"""Any `nn.Module` that gives logits is trained by their exact loss, or refused with the reason."""

import math
from collections import UserList, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTTrainer,
    verify_training,
)

Make = Callable[..., Any]
Named = namedtuple("Named", ("hidden", "logits"))
OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits: (logits, None),
    "dict": lambda logits: {"logits": logits, "hidden": logits.sum()},
    "ModelOutput": lambda logits: CausalLMOutput(logits=logits),
    "named tuple": lambda logits: Named(logits.sum(), logits),
}


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of a user."""


class Rows(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


class Plain(nn.Module):
    """Predicts from the mean of what came before, and knows nothing of transformers."""

    def __init__(self, give: Callable[[Tensor], Any] = OUTPUTS["tensor"]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(300, 8), nn.Linear(8, 300)
        self.give = give

    def logits_of(self, ids: Tensor) -> Tensor:
        counts = torch.arange(1, ids.shape[1] + 1).unsqueeze(-1)
        logits: Tensor = self.head(self.embed(ids).cumsum(1) / counts)
        return logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert attention_mask.shape == input_ids.shape
        return self.give(self.logits_of(input_ids))


class Wrapped(nn.Module):
    """A model of transformers in a module of a user, who hands everything on."""

    def __init__(self, model: Any, give: Callable[[Tensor], Any] = OUTPUTS["tuple"]) -> None:
        super().__init__()
        self.model, self.give = model, give

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.give(self.model(input_ids=input_ids, attention_mask=attention_mask).logits)


class Delegating(Wrapped):
    """The same, with all names of the model."""

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class HalfDelegating(Wrapped):
    """The same, with the names of a model, and a result that is none of transformers'."""

    @property
    def config(self) -> Any:
        return self.model.config

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()


class Gradient(TrainerCallback):
    """Keeps the gradient of the last optimizer step."""

    value: Tensor

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.value = torch.cat([p.grad.flatten() for p in kwargs["model"].parameters()])


def make_rows(num_rows: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(3, 300, (4 + 3 * n,), generator=generator).tolist(),
            "response_mask": [0, 0, *[1] * (2 + 3 * n)],
        }
        for n in range(num_rows)
    ]


def truth(model: Any, logits_of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """Loss and gradient, one row at a time."""
    model.zero_grad()
    losses = []
    for row in make_rows():
        ids = torch.tensor([row["input_ids"]])
        log_p = logits_of(ids)[0, 1:-1].log_softmax(-1)
        losses.append(-log_p.gather(-1, ids[0, 2:, None])[:, 0])
    loss = torch.cat(losses).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.item(), gradient


@pytest.fixture
def make_trainer(tokenizer: Any, make_config: Make) -> Callable[..., OwnTrainer]:
    def make(model: nn.Module, **settings: Any) -> OwnTrainer:
        fields = {
            "max_steps": 1,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 3,
        }
        trainer = OwnTrainer(
            model,
            make_config(**fields | settings),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Rows(make_rows()),
            eval_dataset=Rows(make_rows()),
        )
        trainer.add_callback(Gradient())
        return trainer

    return make


def assert_exact(trainer: Any, loss: float, gradient: Tensor) -> None:
    """Training and evaluation give what single rows give in float64."""
    trainer.train()
    keeper = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradient))
    assert (keeper.value - gradient).norm() <= 1e-12 * gradient.norm()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-12)
    figures = trainer.evaluate()
    assert figures["eval_loss"] == pytest.approx(loss, rel=1e-12)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)


@pytest.mark.parametrize("output", OUTPUTS)
def test_logits_are_found_in_whatever_a_module_returns(
    output: str, make_trainer: Callable[..., OwnTrainer]
) -> None:
    model = Plain(OUTPUTS[output]).double()
    assert_exact(make_trainer(model), *truth(model, model.logits_of))


@pytest.mark.parametrize("wrapper", [Wrapped, Delegating, HalfDelegating])
@pytest.mark.parametrize("output", ["tuple", "dict"])
def test_a_wrapped_model_is_trained_like_the_model_itself(
    wrapper: type[Wrapped],
    output: str,
    model_factory: Make,
    make_trainer: Callable[..., OwnTrainer],
    widen: Callable[[nn.Module], None],
) -> None:
    own = model_factory().double()
    widen(own)
    model = wrapper(own, OUTPUTS[output])
    assert_exact(make_trainer(model), *truth(own, lambda ids: own(ids).logits))


def test_what_metrics_see_are_the_predictions_of_the_module(
    make_trainer: Callable[..., OwnTrainer],
) -> None:
    model = Plain(OUTPUTS["dict"])
    trainer = make_trainer(model, per_device_eval_batch_size=1)
    predictions = trainer.predict(Rows(make_rows())).predictions
    for row, predicted in zip(make_rows(), predictions, strict=True):
        expected = model.logits_of(torch.tensor([row["input_ids"]]))[0].argmax(-1)
        assert predicted[: len(expected)].tolist() == expected.tolist()


def test_a_plain_module_is_verified_saved_and_resumed(
    make_trainer: Callable[..., OwnTrainer],
) -> None:
    fields = {"max_steps": 4, "learning_rate": 1e-2, "gradient_accumulation_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole = make_trainer(Plain(), **fields, **saving)
    assert not any(check.has_failed for check in verify_training(whole))
    whole.train()
    resumed = make_trainer(Plain(), **fields, **saving)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight)


def test_a_trainer_that_prepares_rows_takes_it_too(tokenizer: Any, make_config: Make) -> None:
    model = Plain(OUTPUTS["dict"]).double()
    keeper = Gradient()
    trainer = MaskedSFTTrainer(
        model,
        make_config(
            max_steps=1, per_device_train_batch_size=6, learning_rate=0.0, max_grad_norm=0.0
        ),
        train_dataset=Dataset.from_list(make_rows()),
        eval_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
        callbacks=[keeper],
    )
    assert_exact(trainer, *truth(model, model.logits_of))
    trainer.save_model()


class OnlyIds(Plain):
    """Takes nothing but tokens."""

    def forward(self, input_ids: Tensor) -> Any:
        return self.give(self.logits_of(input_ids))


class WithLabels(Plain):
    """Wants to work out the loss itself."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return self.give(self.logits_of(input_ids))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (OnlyIds(), "attention_mask"),
        (WithLabels(), "never with labels"),
        (Plain(lambda logits: logits[:, -1:]), "some tokens have no prediction"),
        (Plain(lambda logits: {"scores": logits}), "Return the logits"),
        (Plain(lambda logits: (logits.sum(), logits)), "Return the logits"),
        (Plain(lambda logits: ()), "Return the logits"),
    ],
)
def test_a_module_without_usable_logits_is_refused_with_the_reason(
    model: Plain, reason: str, make_trainer: Callable[..., OwnTrainer]
) -> None:
    with pytest.raises(ValueError, match=reason):
        make_trainer(model).train()
    with pytest.raises(ValueError, match=reason):
        make_trainer(model).evaluate()


def test_a_head_that_has_to_be_fused_must_be_known(make_trainer: Callable[..., OwnTrainer]) -> None:
    trainer = make_trainer(Plain())
    trainer.fused_head = "on"
    with pytest.raises(ValueError, match="get_output_embeddings"):
        trainer.train()


def test_a_router_loss_of_unknown_weight_is_refused(
    make_trainer: Callable[..., OwnTrainer],
) -> None:
    model = Plain(lambda logits: {"logits": logits, "aux_loss": logits.sum()})
    with pytest.raises(ValueError, match="Plain gives a router's loss"):
        make_trainer(model).train()
