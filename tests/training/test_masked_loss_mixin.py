"""The numbers of the trainer, against float64 arithmetic that knows nothing of batches."""

import math
from collections import UserList
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    LossNormalization,
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
)
from hf_sft_plugin.models.lm_head import forward_full

NUM_ROWS = 16


class Unchecked(UserList[Any]):
    """Rows of a kind that the trainer leaves to the collator."""


def make_rows(with_weights: bool = False) -> list[dict[str, Any]]:
    """Rows with prompts of 2 to 9 tokens and responses of 1 to 40."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(NUM_ROWS):
        num_prompt = 2 + number % 8
        num_response = 1 + (number * 39) // (NUM_ROWS - 1)
        ids = torch.randint(3, 300, (num_prompt + num_response,), generator=generator).tolist()
        row: dict[str, Any] = {
            "input_ids": ids,
            "response_mask": [0] * num_prompt + [1] * num_response,
        }
        if with_weights:
            row["loss_weights"] = [0.25 * (1 + (number + t) % 4) for t in range(len(ids))]
        rows.append(row)
    return rows


def truth(
    model: Any, rows: Sequence[dict[str, Any]], normalization: str, constant: float = 1.0
) -> dict[str, Any]:
    """Loss, entropy, accuracy and gradient in float64, one row at a time, without padding."""
    model = model.double()
    model.zero_grad()
    loss_sum, divisor, nll_sum, entropy_sum, hits, count = 0.0, 0.0, 0.0, 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_p = torch.log_softmax(model(ids).logits[0], dim=-1)
        weights = row.get("loss_weights", [1.0] * len(row["input_ids"]))
        trained = [t for t in range(1, len(weights)) if row["response_mask"][t]]
        row_weight = math.fsum(weights[t] for t in trained)
        for t in trained:
            weight = weights[t] / row_weight if normalization == "example" else weights[t]
            loss_sum = loss_sum - weight * log_p[t - 1, ids[0, t]]
            nll_sum -= log_p[t - 1, ids[0, t]].item()
            entropy_sum -= (log_p[t - 1].exp() * log_p[t - 1]).sum().item()
            hits += int(log_p[t - 1].argmax() == ids[0, t])
            count += 1
        divisor += {"token": row_weight, "example": 1.0, "constant": 0.0}[normalization]
    loss = loss_sum / (constant if normalization == "constant" else divisor)
    assert isinstance(loss, Tensor)
    loss.backward()
    return {
        "loss": loss.item(),
        "token_entropy": entropy_sum / count,
        "token_accuracy": hits / count,
        "perplexity": math.exp(nll_sum / count),
        "num_response_tokens": count,
        "num_tokens": sum(len(row["input_ids"]) for row in rows),
        "gradient": flat_gradient(model),
    }


def flat_gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


class GradientKeeper(TrainerCallback):
    """Keeps the gradient of the last optimizer step."""

    gradient: Tensor

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gradient = flat_gradient(kwargs["model"])


def relative(found: Any, expected: Any) -> float:
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "fused_head"),
    [
        *((size, steps, "on") for size, steps in [(16, 1), (4, 4), (2, 8), (1, 16)]),
        # The last micro-batch has one row, one row, two rows.
        *((size, steps, "on") for size, steps in [(5, 4), (3, 6), (7, 3)]),
        *((size, steps, "off") for size, steps in [(16, 1), (3, 6)]),
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_metrics_and_gradient_do_not_depend_on_how_a_step_is_split(
    batch_size: int,
    accumulation: int,
    fused_head: str,
    dtype: torch.dtype,
    bound: float,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    rows = make_rows()
    expected = truth(model_factory(), rows, "token")
    keeper = GradientKeeper()
    trainer = MaskedSFTTrainer(
        model_factory().to(dtype),
        make_config(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            fused_head=fused_head,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[keeper],
    )
    trainer.train()
    log = trainer.state.log_history[0]
    for key in ("loss", "token_entropy", "token_accuracy"):
        assert relative(log[key], expected[key]) < bound, key
    assert log["num_response_tokens"] == expected["num_response_tokens"]
    assert log["num_tokens"] == expected["num_tokens"]
    assert relative(keeper.gradient, expected["gradient"]) < bound


class ChangesLabels(MaskedSFTTrainer):
    """Leaves out the first ten trained tokens of each row, after the step was counted."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, leave_out(inputs), *args, **kwargs)


def leave_out(batch: dict[str, Any]) -> dict[str, Any]:
    labels = batch["labels"]
    rank = (labels != -100).cumsum(-1)
    return {**batch, "labels": labels.masked_fill(rank <= 10, -100)}


@pytest.mark.parametrize("where", ["collator", "compute_loss"])
def test_the_divisor_counts_the_labels_that_the_collator_made(
    where: str,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    rows = make_rows()
    fewer = [
        {
            "input_ids": row["input_ids"],
            "response_mask": [
                int(mark and sum(row["response_mask"][: t + 1]) > 10)
                for t, mark in enumerate(row["response_mask"])
            ],
        }
        for row in rows
    ]
    keeper, collate = GradientKeeper(), DataCollatorForPromptResponse(tokenizer)
    in_collator = where == "collator"
    trainer = (MaskedSFTTrainer if in_collator else ChangesLabels)(
        model_factory().double(),
        make_config(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_steps=1,
            max_grad_norm=0.0,
        ),
        data_collator=(lambda rows: leave_out(collate(rows))) if in_collator else collate,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[keeper],
    )
    trainer.train()
    num_tokens = [sum(sum(row["response_mask"]) for row in each) for each in (fewer, rows)]
    assert num_tokens[0] < 0.7 * num_tokens[1]
    divisor = float(num_tokens[0] if in_collator else num_tokens[1])
    expected = truth(model_factory(), fewer, "constant", divisor)
    assert relative(keeper.gradient, expected["gradient"]) < 1e-12


@pytest.mark.parametrize("normalization", ["token", "example", "constant"])
@pytest.mark.parametrize("with_weights", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("split", [(16, 1), (3, 6)])
def test_every_normalization_is_global(
    normalization: str,
    with_weights: bool,
    split: tuple[int, int],
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    rows = make_rows(with_weights)
    constant = 100.0 if normalization == "constant" else None
    expected = truth(model_factory(), rows, normalization, constant or 1.0)
    keeper = GradientKeeper()
    trainer = MaskedSFTTrainer(
        model_factory().double(),
        make_config(
            per_device_train_batch_size=split[0],
            gradient_accumulation_steps=split[1],
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            loss_normalization=normalization,
            normalize_constant=constant,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[keeper],
    )
    trainer.train()
    log = trainer.state.log_history[0]
    for key in ("loss", "token_entropy", "token_accuracy"):
        assert relative(log[key], expected[key]) < 1e-12, key
    assert relative(keeper.gradient, expected["gradient"]) < 1e-12


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("normalization", ["token", "example"])
def test_evaluation_does_not_depend_on_its_batch_size(
    batch_size: int,
    dtype: torch.dtype,
    bound: float,
    normalization: str,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    rows = make_rows(with_weights=normalization == "example")
    expected = truth(model_factory(), rows, normalization)
    trainer = MaskedSFTTrainer(
        model_factory().to(dtype),
        make_config(per_device_eval_batch_size=batch_size, loss_normalization=normalization),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    for key in ("loss", "token_entropy", "token_accuracy", "perplexity"):
        assert relative(metrics[f"eval_{key}"], expected[key]) < bound, key
    assert metrics["eval_num_response_tokens"] == expected["num_response_tokens"]
    assert metrics["eval_num_tokens"] == expected["num_tokens"]


def test_a_logging_window_is_one_mean_over_all_its_tokens_not_a_mean_of_steps(
    tokenizer: Any, model_factory: Callable[..., Any], make_config: Callable[..., MaskedSFTConfig]
) -> None:
    rows = make_rows()
    expected = truth(model_factory(), rows, "token")
    trainer = MaskedSFTTrainer(
        model_factory().double(),
        make_config(max_steps=8, logging_steps=8, learning_rate=0.0, save_strategy="no"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    output = trainer.train()
    log = trainer.state.log_history[0]
    assert relative(log["loss"], expected["loss"]) < 1e-12
    assert relative(log["token_accuracy"], expected["token_accuracy"]) < 1e-12
    assert output.training_loss == output.metrics["train_loss"]
    assert relative(output.training_loss, expected["loss"]) < 1e-12


def test_counts_go_on_over_windows_and_begin_anew_with_a_new_run(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    rows = make_rows()
    trainer = MaskedSFTTrainer(
        model,
        make_config(max_steps=8, logging_steps=2),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for _ in range(2):
        trainer.train()
        counts = [log["num_tokens"] for log in trainer.state.log_history if "loss" in log]
        assert counts == sorted(counts)
        assert counts[-1] == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_a_batch_without_response_tokens_adds_a_connected_zero(
    fused_head: str, tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(fused_head=fused_head),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
    )
    masked = {
        "input_ids": torch.randint(0, 300, (2, 5)),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "labels": torch.full((2, 5), -100),
    }
    for count in (None, torch.tensor(0.0), torch.tensor(7.0)):
        model.zero_grad()
        loss = trainer.compute_loss(model, masked, num_items_in_batch=count)
        assert loss.item() == 0.0
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_fused_head_can_be_switched_off_after_it_was_used(
    tokenizer: Any,
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Dataset.from_list(make_rows())
    trainer = MaskedSFTTrainer(model, make_config(), eval_dataset=rows, processing_class=tokenizer)
    fused = trainer.evaluate()["eval_loss"]
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return forward_full(*args)

    monkeypatch.setattr("hf_sft_plugin.training.masked_loss_mixin.forward_full", counted)
    trainer.fused_head = "off"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(fused, rel=1e-6)
    assert len(calls) == 8


@pytest.mark.parametrize("normalization", ["token", "example", "constant"])
def test_a_normalization_given_as_text_is_the_one_of_that_name(
    normalization: str,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    losses = []
    for value in (normalization, LossNormalization(normalization)):

        class OwnTrainer(MaskedLossMixin, Trainer):
            loss_normalization: Any = value
            normalize_constant = 50.0

        trainer = OwnTrainer(
            model_factory(),
            make_config(max_steps=2),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=make_rows(),
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_counts_begin_anew_where_the_trainer_looks_for_a_batch_size_that_fits(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    rows = make_rows()

    class RunsOutOfMemory(TrainerCallback):
        has_failed = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.has_failed:
                self.has_failed = True
                raise RuntimeError("CUDA out of memory.")

    trainer = MaskedSFTTrainer(
        model,
        make_config(max_steps=-1, num_train_epochs=1, auto_find_batch_size=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[RunsOutOfMemory()],
    )
    trainer.train()
    counts = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    assert counts[-1] == sum(len(row["input_ids"]) for row in rows)


def test_a_step_in_which_one_micro_batch_is_all_masked_equals_the_step_without_it(
    tokenizer: Any, model_factory: Callable[..., Any], make_config: Callable[..., MaskedSFTConfig]
) -> None:
    rows = make_rows()[:3]
    expected = truth(model_factory(), rows, "token")
    masked = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    all_rows = [
        *({"input_ids": r["input_ids"], "labels": _labels(r)} for r in rows),
        masked,
    ]
    keeper = GradientKeeper()
    trainer = MaskedSFTTrainer(
        model_factory().double(),
        make_config(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=Unchecked(all_rows),
        processing_class=tokenizer,
        callbacks=[keeper],
    )
    trainer.train()
    assert relative(trainer.state.log_history[0]["loss"], expected["loss"]) < 1e-12
    assert relative(keeper.gradient, expected["gradient"]) < 1e-12


def _labels(row: dict[str, Any]) -> list[int]:
    pairs = zip(row["input_ids"], row["response_mask"], strict=True)
    return [token if trained else -100 for token, trained in pairs]


class PlainTrainerWithMaskedLoss(MaskedLossMixin, Trainer):
    """What a user would write."""


def test_the_mixin_gives_any_trainer_the_same_numbers(
    tokenizer: Any, model_factory: Callable[..., Any], tmp_path: Any
) -> None:
    rows = make_rows(with_weights=True)
    expected = truth(model_factory(), rows, "token")
    keeper = GradientKeeper()
    trainer = PlainTrainerWithMaskedLoss(
        model=model_factory().double(),
        # The defaults of TrainingArguments remove columns that the model's forward does not take.
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=3,
            gradient_accumulation_steps=6,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            logging_steps=1,
        ),
        data_collator=DataCollatorForPromptResponse(tokenizer),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        callbacks=[keeper],
    )
    trainer.train()
    assert relative(trainer.state.log_history[0]["loss"], expected["loss"]) < 1e-12
    assert relative(keeper.gradient, expected["gradient"]) < 1e-12
    assert relative(trainer.evaluate()["eval_loss"], expected["loss"]) < 1e-12


def test_labels_alone_are_enough_and_position_0_is_never_a_target(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
    )
    ids = torch.tensor([[5, 6, 7]])
    model.eval()
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_outputs_with_logits_are_returned_when_asked(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
    )
    ids = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "labels": ids}
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape == (1, 3, 300)
    torch.testing.assert_close(loss, trainer.compute_loss(model, batch))


def test_a_batch_without_labels_is_refused(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    trainer = MaskedSFTTrainer(model, make_config(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="has no labels, only input_ids"):
        trainer.compute_loss(model, {"input_ids": torch.tensor([[5, 6, 7]])})


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("normalization", ["token", "example"])
@pytest.mark.parametrize(
    "objective",
    [
        {"loss_type": "dft"},
        {"loss_type": "focal", "focal_gamma": 1.5},
        {"label_smoothing": 0.1},
        {"z_loss_coef": 0.01},
        {"entropy_coef": -0.2},
        {"loss_type": "dft", "label_smoothing": 0.1, "z_loss_coef": 0.01, "entropy_coef": 0.1},
    ],
    ids=str,
)
def test_an_objective_is_optimized_and_logged_and_evaluation_stays_the_nll(
    objective: dict[str, Any],
    normalization: str,
    fused_head: str,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
    reference_losses: Callable[..., Tensor],
) -> None:
    rows = make_rows(with_weights=True)
    expected = truth(model_factory(), rows, normalization)
    model = model_factory().double()
    loss, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        ids, mask = (torch.tensor(row[name]) for name in ("input_ids", "response_mask"))
        weights = torch.tensor(row["loss_weights"], dtype=torch.float64)[1:] * mask[1:]
        divisor += 1 if normalization == "example" else weights.sum().item()
        weights = weights / weights.sum() if normalization == "example" else weights
        logits = model(ids[None]).logits[0, :-1]
        loss = loss + (reference_losses(logits, ids[1:], **objective) * weights).sum()
    (loss / divisor).backward()
    keeper = GradientKeeper()
    settings = {**objective, "label_smoothing_factor": objective.get("label_smoothing", 0.0)}
    settings.pop("label_smoothing", None)
    trainer = MaskedSFTTrainer(
        model_factory().double(),
        make_config(
            # The last micro-batch has one row.
            per_device_train_batch_size=3,
            gradient_accumulation_steps=6,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            loss_normalization=normalization,
            fused_head=fused_head,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[keeper],
    )
    trainer.train()
    log, summary = trainer.state.log_history
    assert relative(keeper.gradient, flat_gradient(model)) < 1e-12
    assert relative(log["loss"], loss.item() / divisor) < 1e-12
    assert relative(log["nll"], math.log(expected["perplexity"])) < 1e-12
    assert summary["train_loss"] == log["loss"]
    assert summary["train_nll"] == log["nll"]
    metrics = trainer.evaluate()
    assert relative(metrics["eval_loss"], expected["loss"]) < 1e-12
    assert relative(metrics["eval_perplexity"], expected["perplexity"]) < 1e-12
    assert "eval_nll" not in metrics


def test_label_smoothing_reaches_a_trainer_with_plain_arguments(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig], tmp_path: Any
) -> None:
    losses = []
    for factor in (0.0, 0.5):
        arguments = TrainingArguments(
            str(tmp_path),
            label_smoothing_factor=factor,
            per_device_train_batch_size=16,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = PlainTrainerWithMaskedLoss(
            model,
            arguments,
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Dataset.from_list(make_rows()),
        )
        trainer.train()
        losses.append(trainer.state.log_history[0])
    assert "nll" not in losses[0]
    assert losses[1]["nll"] == pytest.approx(losses[0]["loss"], rel=1e-6)
    assert losses[1]["loss"] != pytest.approx(losses[0]["loss"], rel=1e-4)


def test_the_normalization_can_be_set_on_a_class(
    tokenizer: Any, model_factory: Callable[..., Any], make_config: Callable[..., MaskedSFTConfig]
) -> None:
    class PerExample(MaskedLossMixin, Trainer):
        loss_normalization = LossNormalization.EXAMPLE

    rows = make_rows()
    trainer = PerExample(
        model=model_factory().double(),
        args=make_config(),
        data_collator=DataCollatorForPromptResponse(tokenizer),
        eval_dataset=Dataset.from_list(rows),
    )
    expected = truth(model_factory(), rows, "example")
    assert relative(trainer.evaluate()["eval_loss"], expected["loss"]) < 1e-12


def test_a_resumed_run_logs_what_an_uninterrupted_one_logs(
    tokenizer: Any, model_factory: Callable[..., Any], make_config: Callable[..., MaskedSFTConfig]
) -> None:
    """The checkpoint at step 3 falls into the middle of a logging window of 2 steps."""

    def make() -> MaskedSFTTrainer:
        return MaskedSFTTrainer(
            model_factory(),
            make_config(max_steps=6, logging_steps=2, save_strategy="steps", save_steps=3),
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
        )

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    keys = ("loss", "token_entropy", "token_accuracy", "num_response_tokens", "num_tokens")
    for a, b in zip(whole.state.log_history[:3], resumed.state.log_history[:3], strict=True):
        assert [a[key] for key in keys] == [b[key] for key in keys]
