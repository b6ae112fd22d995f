"""The router's loss counts the same however the rows of a step are split."""

from collections import UserList
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedLossMixin
from hf_sft_plugin.models.model_interface import aux_loss_coefficient, has_router_loss

# So high that it is seen.
COEFFICIENT = 20.0
ROUTER = {
    "output_router_logits": True,
    "router_aux_loss_coef": COEFFICIENT,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8},
}


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""


class Rows(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


class Gradient(TrainerCallback):
    """Keeps the gradient of the last optimizer step."""

    value: Tensor

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.value = torch.cat([p.grad.flatten() for p in kwargs["model"].parameters()])


def make_row(seed: int, num_prompt: int, num_response: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (num_prompt + num_response,), generator=generator).tolist()
    return {"input_ids": ids, "response_mask": [0] * num_prompt + [1] * num_response}


@pytest.fixture
def gradient_of(
    model_factory: Callable[..., Any], tokenizer: Any, make_config: Callable[..., Any]
) -> Callable[..., Tensor]:
    """The gradient of one optimizer step."""

    def run(family: str, rows: list[dict[str, Any]], accumulation: int, **settings: Any) -> Tensor:
        keeper = Gradient()
        fields = {**ROUTER, "experts_implementation": "eager", **FAMILIES[family]}
        own = {n: settings.pop(n) for n in ("padding_free", "router") if n in settings}
        trainer = OwnTrainer(
            model_factory(family, **fields | own.pop("router", {})).double(),
            make_config(
                max_steps=1,
                max_grad_norm=0.0,
                per_device_train_batch_size=len(rows) // accumulation,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
                **settings,
            ),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Rows(rows),
            callbacks=[keeper],
        )
        for name, value in own.items():
            setattr(trainer, name, value)
        trainer.train()
        return keeper.value

    return run


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_its_scale_does_not_depend_on_accumulation(
    family: str, gradient_of: Callable[..., Tensor]
) -> None:
    """Of the same rows over and over, every micro-batch has the loss of the whole."""
    rows = [make_row(1, 4, 9)] * 4
    without = gradient_of(family, rows, 1, router={"router_aux_loss_coef": 0.0})
    expected = gradient_of(family, rows, 1)
    assert difference(without, expected) > 0.01
    for accumulation in (2, 4):
        assert difference(gradient_of(family, rows, accumulation), expected) < 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, gradient_of: Callable[..., Tensor]) -> None:
    rows = [make_row(seed, 2, 3 + 7 * seed) for seed in range(4)]
    flat, padded = (gradient_of(family, rows, 2, padding_free=how) for how in ("on", "off"))
    assert difference(flat, padded) < 1e-6


def test_a_micro_batch_counts_by_its_tokens(
    gradient_of: Callable[..., Tensor], model_factory: Callable[..., Any]
) -> None:
    """Also one without a trained token, and one of a single short row."""
    rows = [make_row(1, 3, 40), make_row(2, 30, 0), make_row(3, 2, 1), make_row(4, 5, 8)]
    model = model_factory(
        "mixtral", **ROUTER, **FAMILIES["mixtral"], experts_implementation="eager"
    ).double()
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    num_trained = sum(sum(row["response_mask"]) for row in rows)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        outputs = model(input_ids=ids)
        log_p = outputs.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        nll = -(log_p * torch.tensor(row["response_mask"][1:])).sum()
        share = ids.numel() / num_tokens
        (nll / num_trained + outputs.aux_loss * COEFFICIENT * share).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert difference(gradient_of("mixtral", rows, 4), expected) < 1e-6


@pytest.mark.parametrize("padding_free", ["on", "off"])
def test_its_mean_by_tokens_is_logged_in_training_and_evaluation(
    padding_free: str,
    model_factory: Callable[..., Any],
    tokenizer: Any,
    make_config: Callable[..., Any],
) -> None:
    """Over the micro-batches of a window, and as the model says it, without its coefficient."""
    rows = [make_row(1, 3, 40), make_row(2, 30, 1), make_row(3, 2, 1), make_row(4, 5, 8)]
    fields = {**ROUTER, **FAMILIES["mixtral"], "experts_implementation": "eager"}
    model = model_factory("mixtral", **fields).double()
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([row["input_ids"]])) for row in rows]
    sizes = [len(row["input_ids"]) for row in rows]
    of_rows = [float(each.aux_loss) * size for each, size in zip(outputs, sizes, strict=True)]
    settings = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    trainer = OwnTrainer(
        model,
        make_config(
            **settings,
            max_steps=4,
            logging_steps=2,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
        ),
        data_collator=DataCollatorForPromptResponse(tokenizer),
        train_dataset=Rows(rows),
        eval_dataset=Rows(rows),
    )
    trainer.padding_free = padding_free
    trainer.train()
    logs = trainer.state.log_history
    windows = [sum(of_rows[n : n + 2]) / sum(sizes[n : n + 2]) for n in (0, 2)]
    # Routers are worked out in float32.
    assert [log["aux_loss"] for log in logs[:2]] == pytest.approx(windows, rel=1e-6)
    whole = sum(of_rows) / sum(sizes)
    assert logs[2]["train_aux_loss"] == pytest.approx(whole, rel=1e-6)
    assert trainer.evaluate()["eval_aux_loss"] == pytest.approx(whole, rel=1e-6)


def test_models_without_it_log_none(
    model_factory: Callable[..., Any], tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    trainer = OwnTrainer(
        model_factory(),
        make_config(max_steps=1),
        data_collator=DataCollatorForPromptResponse(tokenizer),
        train_dataset=Rows([make_row(1, 3, 4)]),
        eval_dataset=Rows([make_row(1, 3, 4)]),
    )
    trainer.train()
    figures = [*trainer.state.log_history, trainer.evaluate()]
    assert not any("aux_loss" in name for log in figures for name in log)


def test_a_config_that_does_not_say_how_much_it_counts_is_an_error() -> None:
    with pytest.raises(ValueError, match="output_router_logits to false"):
        aux_loss_coefficient(torch.nn.Linear(1, 1))


def test_models_are_asked_for_it_by_their_config(model_factory: Callable[..., Any]) -> None:
    assert has_router_loss(model_factory("mixtral", **ROUTER, **FAMILIES["mixtral"]))
    assert not has_router_loss(model_factory("mixtral", **FAMILIES["mixtral"]))
    assert not has_router_loss(model_factory())
    assert not has_router_loss(torch.nn.Linear(1, 1))
