"""One evaluation tells about several masks, each as if it were the only one."""

from collections import UserList
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
    prepare_dataset,
    write_shards,
)
from hf_sft_plugin.shards.dataset import ShardDataset

MASKS = ["response", "last_response", "all"]
KEYS = ("loss", "token_entropy", "token_accuracy", "perplexity", "num_tokens")


def make_rows() -> list[dict[str, Any]]:
    """Seven conversations of one to three exchanges, some of whose turns weigh more."""
    rows = []
    for number in range(7):
        messages: list[dict[str, Any]] = []
        for turn in range(1 + number % 3):
            messages.append({"role": "user", "content": f"what is {number} {turn}"})
            answer = "the answer " * (1 + (number + turn) % 3)
            messages.append({"role": "assistant", "content": answer + "!", "weight": 1.0 + turn})
        rows.append({"messages": messages, "source": f"s{number % 2}"})
    return rows


def reference(model: Any, tokenizer: Any, mask: str, normalization: str) -> dict[str, float]:
    """Figures in float64 from one row at a time, prepared to be trained on that mask."""
    rows = Dataset.from_list(make_rows())
    prepared, _ = prepare_dataset(rows, tokenizer, train_on=mask)
    weighted, _ = prepare_dataset(rows, tokenizer)
    sums = dict.fromkeys(("loss", "divisor", "nll", "entropy", "hits", "count"), 0.0)
    model = model.double().eval()
    for row, other in zip(prepared, weighted, strict=True):
        ids = torch.tensor([row["input_ids"]])
        trained = torch.tensor(row["response_mask"][1:]).bool()
        # What is not trained weighs 1.
        is_response = torch.tensor(other["response_mask"][1:]).bool()
        weights = torch.tensor(other["loss_weights"] or [1.0] * ids.shape[1]).double()[1:]
        weights = weights.where(is_response, 1)[trained]
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)[trained]
        targets = ids[0, 1:][trained]
        nll = -log_p.gather(-1, targets[:, None])[:, 0]
        is_example = normalization == "example"
        sums["loss"] += float((nll * weights).sum() / (weights.sum() if is_example else 1))
        sums["divisor"] += 1 if is_example else float(weights.sum())
        sums["nll"] += float(nll.sum())
        sums["entropy"] += float(-(log_p.exp() * log_p).sum())
        sums["hits"] += float((log_p.argmax(-1) == targets).sum())
        sums["count"] += len(targets)
    mean_nll = torch.tensor(sums["nll"] / sums["count"], dtype=torch.float64)
    return {
        "loss": sums["loss"] / sums["divisor"],
        "token_entropy": sums["entropy"] / sums["count"],
        "token_accuracy": sums["hits"] / sums["count"],
        "perplexity": float(mean_nll.exp()),
        "num_tokens": sums["count"],
    }


@pytest.fixture
def evaluate(
    tokenizer: Any, model_factory: Callable[..., Any], make_config: Callable[..., MaskedSFTConfig]
) -> Callable[..., dict[str, float]]:
    """Evaluates rows with settings of one's own."""

    def run(rows: Any, dtype: torch.dtype = torch.float64, **settings: Any) -> dict[str, float]:
        trainer = MaskedSFTTrainer(
            model_factory(initializer_range=0.2).to(dtype),
            make_config(**{"eval_masks": MASKS, **settings}),
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        return trainer.evaluate()

    return run


def stream() -> IterableDataset:
    return Dataset.from_list(make_rows()).to_iterable_dataset()


@pytest.mark.parametrize(
    ("rows", "dtype", "bound", "settings"),
    [
        ("raw", torch.float64, 1e-12, {"per_device_eval_batch_size": 3}),
        ("raw", torch.float64, 1e-12, {"loss_normalization": "example"}),
        ("raw", torch.float64, 1e-12, {"padding_free": "off", "fused_head": "off"}),
        ("raw", torch.float64, 1e-12, {"loss_normalization": "constant", "normalize_constant": 9}),
        ("raw", torch.float32, 1e-6, {"per_device_eval_batch_size": 7}),
        ("stream", torch.float64, 1e-12, {}),
        ("prepared", torch.float64, 1e-12, {"per_device_eval_batch_size": 1}),
    ],
)
def test_every_mask_has_the_figures_of_a_float64_reference(
    rows: str,
    dtype: torch.dtype,
    bound: float,
    settings: dict[str, Any],
    evaluate: Callable[..., dict[str, float]],
    tokenizer: Any,
    model_factory: Callable[..., Any],
) -> None:
    raw = Dataset.from_list(make_rows())
    given: Any = {"raw": raw, "stream": stream()}.get(rows)
    if given is None:
        given, _ = prepare_dataset(raw, tokenizer, eval_masks=MASKS)
    metrics = evaluate(given, dtype, **settings)
    model = model_factory(initializer_range=0.2)
    normalization = settings.get("loss_normalization", "token")
    counts = []
    for mask in MASKS:
        expected = reference(model, tokenizer, mask, normalization)
        found = {key: metrics[f"eval_{mask}_{key}"] for key in KEYS}
        assert found == pytest.approx(expected, rel=bound, abs=bound), mask
        counts.append(expected["num_tokens"])
    assert counts[1] < counts[0] < counts[2]
    # What is trained is the same with and without company.
    for key in KEYS[:4]:
        assert metrics[f"eval_{key}"] == pytest.approx(
            metrics[f"eval_response_{key}"], rel=1e-12, abs=1e-12
        )
    assert metrics["eval_num_response_tokens"] == counts[0]


@pytest.mark.parametrize("train_on", MASKS)
def test_the_figures_of_what_is_trained_do_not_depend_on_the_masks(
    train_on: str, evaluate: Callable[..., dict[str, float]]
) -> None:
    rows = Dataset.from_list(make_rows())
    metrics = evaluate(rows, train_on=train_on, per_device_eval_batch_size=3)
    alone = evaluate(rows, train_on=train_on, eval_masks=[], per_device_eval_batch_size=3)
    assert not any(mask in name for mask in MASKS for name in alone if mask != "response")
    kept = {name: value for name, value in alone.items() if "second" not in name}
    kept.pop("eval_runtime")
    kept.pop("eval_model_preparation_time")
    assert {name: metrics[name] for name in kept} == pytest.approx(kept, rel=1e-12)
    assert metrics[f"eval_{train_on}_perplexity"] == pytest.approx(
        alone["eval_perplexity"], rel=1e-12
    )


def test_one_forward_pass_serves_all_masks(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(eval_masks=MASKS, per_device_eval_batch_size=4),
        eval_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
    )
    trainer.evaluate()
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.evaluate()
    assert len(passes) == 2


def test_several_sets_have_their_masks_and_the_best_model_is_chosen_by_one(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    rows = Dataset.from_list(make_rows())
    trainer = MaskedSFTTrainer(
        model,
        make_config(
            eval_masks=["last_response"],
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            metric_for_best_model="eval_b_last_response_loss",
            load_best_model_at_end=True,
        ),
        train_dataset=rows,
        eval_dataset={"a": rows.select(range(3)), "b": rows.select(range(3, 7))},
        processing_class=tokenizer,
    )
    trainer.train()
    found = [
        log["eval_b_last_response_loss"]
        for log in trainer.state.log_history
        if "eval_b_last_response_loss" in log
    ]
    assert len(found) == 2
    assert trainer.state.best_metric == min(found)
    whole = trainer.evaluate()
    parts = [trainer.evaluate(dataset) for dataset in trainer.eval_dataset.values()]
    names = ("eval_loss", "eval_last_response_loss", "eval_last_response_num_tokens")
    for prefix, part in zip(("eval_a", "eval_b"), parts, strict=True):
        for name in names:
            assert whole[name.replace("eval", prefix, 1)] == part[name]
    # Only the rows to evaluate on carry more than one mask.
    assert "eval_masks" not in trainer.train_dataset.column_names


def test_a_source_that_is_called_like_a_mask_gives_way_to_it(
    evaluate: Callable[..., dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "source": ("all", "web")[n % 2]} for n, row in enumerate(make_rows())]
    plain = evaluate(Dataset.from_list(make_rows()))
    assert "A source of rows" not in caplog.text
    metrics = evaluate(Dataset.from_list(rows))
    assert metrics["eval_all_loss"] == plain["eval_all_loss"]
    assert "eval_web_loss" in metrics
    assert "A source of rows is called like one of the masks response, last" in caplog.text


def own_rows(marks: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": [5, 6, 7, 8, 2], "response_mask": [0, 1, 0, 1, 1], "eval_masks": marks}]


def test_rows_that_came_tokenized_may_bring_the_column(
    evaluate: Callable[..., dict[str, float]],
) -> None:
    metrics = evaluate(Dataset.from_list(own_rows([0, 1, 0, 3, 3])))
    counts = {mask: metrics[f"eval_{mask}_num_tokens"] for mask in MASKS}
    assert counts == {"response": 3, "last_response": 2, "all": 4}


@pytest.mark.parametrize("marks", [[0, 1, 0, 4, 3], [0, 1, 0, -1, 3], [0, 1, 0, 3]])
def test_a_column_that_is_no_sum_of_masks_is_refused(
    marks: list[int], evaluate: Callable[..., dict[str, float]]
) -> None:
    with pytest.raises(ValueError, match=r"eval_masks (holds|has 4 entries)"):
        evaluate(Dataset.from_list(own_rows(marks)))


def test_rows_without_what_is_asked_for_are_refused_with_the_cure(
    evaluate: Callable[..., dict[str, float]], tokenizer: Any, tmp_path: Any
) -> None:
    prepared, _ = prepare_dataset(Dataset.from_list(make_rows()), tokenizer)
    message = (
        r"without the column eval_masks.*masks .*last_response.*prepare_dataset\(\.\.\., eval_"
    )
    with pytest.raises(
        ValueError,
        match=f"eval data: Row 0 and maybe others {message}".replace(
            " without", " came tokenized without"
        ),
    ):
        evaluate(prepared)
    with pytest.raises(ValueError, match=message):
        evaluate(prepared.to_iterable_dataset())
    write_shards(tmp_path / "set", {"eval": prepared}, tokenizer)
    shards = ShardDataset(tmp_path / "set", split="eval")
    with pytest.raises(
        ValueError, match=f"The rows of the eval data, which are shards,.*{message}"
    ):
        evaluate(shards)
    # These two need no column.
    metrics = evaluate(shards, eval_masks=["response", "all"])
    assert metrics["eval_all_num_tokens"] == sum(len(row["input_ids"]) - 1 for row in prepared)
    with pytest.raises(ValueError, match="eval_masks names 'prompt'; choose some of response,"):
        evaluate(prepared, eval_masks=["prompt"])


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""

    eval_masks = ("all",)


class Unchecked(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


@pytest.mark.parametrize("is_left", [False, True])
def test_the_mixin_tells_of_all_tokens_wherever_padding_is(
    is_left: bool, tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    prepared, _ = prepare_dataset(Dataset.from_list(make_rows()), tokenizer)
    collate = DataCollatorForPromptResponse(tokenizer)

    def pad_left(rows: Any) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        num_padding = (batch["attention_mask"] == 0).sum(-1, keepdim=True)
        width = batch["attention_mask"].shape[1]
        columns = (torch.arange(width) - num_padding) % width
        return {name: value.take_along_dim(columns, dim=1) for name, value in batch.items()}

    def figures(collator: Any, batch_size: int) -> dict[str, float]:
        trainer = OwnTrainer(
            model.double(),
            make_config(per_device_eval_batch_size=batch_size),
            data_collator=collator,
            eval_dataset=Unchecked(prepared),
        )
        found = trainer.evaluate()
        return {key: found[f"eval_all_{key}"] for key in KEYS}

    expected = figures(collate, 1)
    assert expected["num_tokens"] == sum(len(row["input_ids"]) - 1 for row in prepared)
    found = figures(pad_left if is_left else collate, 4)
    assert found == pytest.approx(expected, rel=1e-12)
