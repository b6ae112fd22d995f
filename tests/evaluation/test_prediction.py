"""Predictions come from logits that are never there all at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import EvalPrediction, Trainer

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedLossMixin, MaskedSFTConfig
from hf_sft_plugin.evaluation import prediction
from hf_sft_plugin.evaluation.prediction import LogitReader
from hf_sft_plugin.loss import tile_choice


def make_rows(count: int = 8, longest: int = 40) -> list[dict[str, Any]]:
    """Rows of 6 to 40 tokens."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number in range(count):
        length = 6 + (number * 13) % (longest - 5)
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "response_mask": [0, 0] + [1] * (length - 2)})
    return rows


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that came into being."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0) if sizes else self.numel
        return result


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""


Make = Callable[..., OwnTrainer]


@pytest.fixture
def make_trainer(
    tokenizer: Any, model_factory: Callable[..., Any], make_config: Callable[..., MaskedSFTConfig]
) -> Make:
    """A trainer with a metric, and rows to evaluate on."""

    def make(
        rows: list[dict[str, Any]] | None = None,
        trainer_class: type[OwnTrainer] = OwnTrainer,
        model: Any = None,
        compute_metrics: Any = lambda _: {},
        preprocess: Any = None,
        **settings: Any,
    ) -> OwnTrainer:
        return trainer_class(
            model or model_factory(initializer_range=0.2).double(),
            make_config(**settings),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            eval_dataset=Dataset.from_list(rows or make_rows()),
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess,
        )

    return make


def full_logits(model: Any, row: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([row["input_ids"]])).logits[0]
    return logits


@pytest.mark.parametrize("fused_head", ["auto", "off"])
@pytest.mark.parametrize("tile", [1, 700, 2**24])
def test_predictions_are_the_most_probable_tokens_of_full_logits(
    tile: int, fused_head: str, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_TILE_SIZE", tile)
    trainer = make_trainer(per_device_eval_batch_size=3)
    trainer.fused_head = fused_head
    found = trainer.predict(trainer.eval_dataset)
    for row, ids, labels in zip(make_rows(), found.predictions, found.label_ids, strict=True):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == full_logits(trainer.model, row).argmax(-1).tolist()
        assert labels[2:length].tolist() == row["input_ids"][2:]
        assert set(labels[:2].tolist() + labels[length:].tolist()) == {-100}


@pytest.mark.parametrize("tile", [1, 24_000, 2**24])
def test_what_preprocess_makes_of_some_rows_at_a_time_is_what_it_makes_of_all(
    tile: int, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_TILE_SIZE", tile)
    widths = []

    def preprocess(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        widths.append(len(logits))
        best = logits.topk(2, dim=-1)
        return best.values.where(labels.unsqueeze(-1) != -100, 0.0), best.indices

    trainer = make_trainer(per_device_eval_batch_size=4, preprocess=preprocess)
    values, indices = trainer.predict(trainer.eval_dataset).predictions
    assert widths == {1: [1] * 8, 24_000: [2] * 4, 2**24: [4, 4]}[tile]
    assert trainer.preprocess_logits_for_metrics is preprocess
    for row, best, ids in zip(make_rows(), values, indices, strict=True):
        expected = full_logits(trainer.model, row).topk(2, dim=-1)
        length = len(row["input_ids"])
        assert torch.equal(torch.from_numpy(ids[:length]), expected.indices)
        error = torch.from_numpy(best[2:length]) - expected.values[2:]
        assert float(error.abs().max()) < 1e-12


def test_metrics_in_batches_are_those_of_all_rows_and_keep_no_row(make_trainer: Make) -> None:
    hits, kept = [0, 0], []

    def in_batches(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        ids, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        hits[0] += int(((ids == labels) & (labels != -100)).sum())
        hits[1] += int((labels != -100).sum())
        kept.append(len(ids))
        return {"accuracy": hits[0] / hits[1]} if compute_result else {}

    def at_once(prediction: EvalPrediction) -> dict[str, float]:
        ids, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((ids == labels)[labels != -100].mean())}

    # Rows that a random model gets right now and then.
    rows = [{"input_ids": [token] * 9, "response_mask": [0] + [1] * 8} for token in range(3, 43)]
    settings: dict[str, Any] = {"rows": rows, "per_device_eval_batch_size": 3}
    batched = make_trainer(compute_metrics=in_batches, batch_eval_metrics=True, **settings)
    whole = make_trainer(compute_metrics=at_once, **settings)
    found, expected = batched.evaluate(), whole.evaluate()
    assert 0 < expected["eval_accuracy"] < 1
    assert found["eval_accuracy"] == expected["eval_accuracy"]
    assert found["eval_accuracy"] == pytest.approx(found["eval_token_accuracy"])
    assert kept == [3] * 13 + [1]


@pytest.mark.parametrize("preprocess", [None, lambda logits, labels: logits.argmax(-1)])
def test_memory_does_not_grow_with_rows_times_vocabulary(
    preprocess: Any, make_trainer: Make, model_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, length, tile = 4000, 40, 2**18
    monkeypatch.setattr(prediction, "_TILE_SIZE", tile)
    monkeypatch.setattr(tile_choice, "_CPU_BYTES", tile * 4)
    largest = []
    for num_rows in (8, 32):
        rows = [
            {"input_ids": [3 + n, *range(4, 3 + length)], "response_mask": [0] + [1] * (length - 1)}
            for n in range(num_rows)
        ]
        trainer = make_trainer(
            rows,
            model=model_factory(vocab_size=vocabulary),
            preprocess=preprocess,
            compute_metrics=lambda prediction, compute_result: {},
            batch_eval_metrics=True,
            per_device_eval_batch_size=num_rows,
        )
        # The head is tried out once.
        trainer.evaluate()
        with LargestTensor() as seen:
            trainer.evaluate()
        largest.append(seen.numel)
    # All logits of the smaller batch alone would be five times as many.
    assert largest[0] == largest[1] <= tile
    assert 8 * length * vocabulary > 4 * tile


def test_virtual_tokens_are_not_predicted_from(
    make_trainer: Make, model_factory: Callable[..., Any]
) -> None:
    torch.manual_seed(2)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(model_factory(initializer_range=0.2), prompts).double()
    trainer = make_trainer(model=model, per_device_eval_batch_size=2)
    found = trainer.predict(trainer.eval_dataset)
    for row, ids in zip(make_rows(), found.predictions, strict=True):
        length = len(row["input_ids"])
        expected = full_logits(model, row)[-length:].argmax(-1)
        assert ids[:length].tolist() == expected.tolist()


def test_what_does_not_keep_the_rows_apart_is_refused(make_trainer: Make) -> None:
    trainer = make_trainer(
        preprocess=lambda logits, labels: logits.mean((0, 1)), per_device_eval_batch_size=2
    )
    with pytest.raises(ValueError, match="was given 2 rows, and what it returned does not begin"):
        trainer.evaluate()


class WithLogitsOfItsOwn(OwnTrainer):
    """Predicts by itself, and leaves the logits to `preprocess_logits_for_metrics`."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        super().prediction_step(model, inputs, True)
        with torch.no_grad():
            logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return None, logits, inputs["labels"]


def test_logits_that_nobody_has_read_yet_are_reduced_as_ever(make_trainer: Make) -> None:
    shapes = []

    def preprocess(logits: Tensor, labels: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape))
        return logits.argmax(-1)

    settings: dict[str, Any] = {"preprocess": preprocess, "per_device_eval_batch_size": 4}
    own = make_trainer(trainer_class=WithLogitsOfItsOwn, **settings)
    found = own.predict(own.eval_dataset).predictions
    assert [shape[0] for shape in shapes] == [4, 4]
    assert {shape[-1] for shape in shapes} == {300}
    assert (found == make_trainer(**settings).predict(own.eval_dataset).predictions).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("padding_free", ["auto", "off"])
@pytest.mark.parametrize("prediction_loss_only", [True, False])
def test_a_batch_that_a_subclass_changes_is_evaluated_as_it_is_then(
    prediction_loss_only: bool,
    padding_free: str,
    in_place: bool,
    make_trainer: Make,
) -> None:
    class Changing(OwnTrainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels, mask = inputs["labels"], inputs["attention_mask"]
            if not in_place:
                labels, mask = labels.clone(), mask.clone()
            # The first five tokens are no longer trained, and the last two are no longer there.
            labels[:, :5] = -100
            ends = mask.sum(-1, keepdim=True) - 2
            is_left = torch.arange(labels.shape[1]) < ends
            labels[~is_left], mask[~is_left] = -100, 0
            changed = {**inputs, "labels": labels, "attention_mask": mask}
            return super().prediction_step(model, changed, *args, **kwargs)

    rows = make_rows(longest=30)
    cut = [
        {
            "input_ids": row["input_ids"][:-2],
            "response_mask": [0] * min(5, len(row["input_ids"]) - 2) + row["response_mask"][5:-2],
        }
        for row in rows
    ]
    settings: dict[str, Any] = {
        "per_device_eval_batch_size": 3,
        "prediction_loss_only": prediction_loss_only,
    }
    expected = make_trainer(cut, **settings)
    found = make_trainer(rows, trainer_class=Changing, **settings)
    figures = []
    for trainer in (expected, found):
        trainer.padding_free = padding_free
        metrics = trainer.evaluate()
        figures.append({k: v for k, v in metrics.items() if "second" not in k and "time" not in k})
    assert figures[1] == pytest.approx(figures[0], rel=1e-12)
    assert "prediction_step" not in vars(found)


def test_a_batch_of_somebody_else_is_looked_at_anew(make_trainer: Make) -> None:
    trainer = make_trainer(per_device_eval_batch_size=8)
    (batch,) = trainer.get_eval_dataloader()
    labels = batch["labels"].clone()
    labels[:, :5] = -100
    trainer.prediction_step(trainer.model, {**batch, "labels": labels}, True)
    (totals,) = trainer._eval_rows
    assert totals[:, 5].tolist() == (labels[:, 1:] != -100).sum(-1).tolist()


def test_a_reader_reads_what_it_is_given() -> None:
    labels = torch.zeros(2, 3, dtype=torch.long)
    hidden = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    reader = LogitReader(labels, None)
    reader(hidden, lambda rows: 2 * rows)
    assert torch.equal(reader.predictions, hidden[:, 1:].argmax(-1))
