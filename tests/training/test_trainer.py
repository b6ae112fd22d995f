"""The trainer end to end: raw rows in; a model, an adapter, exact logs and a card out."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, TrainingArguments

from hf_sft_plugin import (
    MaskedSFTConfig,
    MaskedSFTTrainer,
    RowError,
    ShardDataset,
    prepare_dataset,
    write_shards,
)

Make = Callable[..., MaskedSFTConfig]


@pytest.fixture
def dataset(chat_rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(chat_rows)


@pytest.mark.curves
def test_training_lowers_the_loss_and_leaves_everything_in_the_output_folder(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    args = make_config(max_steps=30, logging_steps=5, learning_rate=1e-2, eval_on_start=True)
    trainer = MaskedSFTTrainer(
        model, args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[-1] < 0.7 * losses[0]
    folder = Path(args.output_dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records == trainer.state.log_history
    for name in ("loss.png", "token_entropy.png"):
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    ledger = json.loads((folder / "data_ledger_train.json").read_text())
    assert ledger["num_rows"] == ledger["num_rows_trained"] == len(dataset)
    card = ModelCard.load(folder / "README.md")
    assert f"{losses[-1]:.4f}" in card.text
    assert f"{losses[0]:.4f}" in card.text
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(reloaded(ids).logits, trainer.model.eval()(ids).logits)
    assert (
        AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
        == tokenizer("hello")["input_ids"]
    )
    assert reloaded.generation_config.eos_token_id in (2, [2])


def test_an_adapter_reloads_onto_its_base_and_reproduces_the_logits(
    dataset: Dataset, model_factory: Any, tokenizer: Any, make_config: Make
) -> None:
    base = model_factory()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    args = make_config(max_steps=5, learning_rate=1e-2)
    trainer = MaskedSFTTrainer(
        base,
        args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    assert (Path(args.output_dir) / "adapter_model.safetensors").is_file()
    assert not (Path(args.output_dir) / "model.safetensors").exists()
    fresh = model_factory()
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in before.items())
    reloaded = PeftModel.from_pretrained(fresh, args.output_dir).eval()
    ids = torch.tensor([[5, 6, 7]])
    trained = trainer.model.eval()(ids).logits
    torch.testing.assert_close(reloaded(ids).logits, trained)
    assert not torch.allclose(model_factory().eval()(ids).logits, trained)
    assert AutoTokenizer.from_pretrained(args.output_dir).chat_template == tokenizer.chat_template


def test_prepared_rows_train_like_raw_rows(
    dataset: Dataset, model_factory: Any, tokenizer: Any, make_config: Make
) -> None:
    prepared, _ = prepare_dataset(dataset, tokenizer)
    logs = []
    for rows in (dataset, prepared):
        trainer = MaskedSFTTrainer(
            model_factory(), make_config(), train_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == logs[1]


def test_a_streaming_dataset_is_tokenized_as_its_rows_come(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(max_steps=4),
        train_dataset=dataset.to_iterable_dataset(),
        processing_class=tokenizer,
    )
    trainer.train()
    _, ledger = prepare_dataset(dataset, tokenizer)
    counts = trainer.state.log_history[-2]
    assert counts["num_response_tokens"] == ledger.num_response_tokens
    assert counts["num_tokens"] == ledger.num_tokens


def test_several_evaluation_sets_are_told_apart(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        eval_dataset={"short": dataset.select([0]), "long": dataset},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_short_num_tokens"] < metrics["eval_long_num_tokens"]
    assert set(trainer.ledgers) == {"eval_short", "eval_long"}


def test_generated_responses_are_judged_in_evaluation(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(predict_with_generate=True, generation_max_new_tokens=4, generation_num_rows=3),
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    hits = sum(r.response.strip() == r.reference.strip() for r in trainer.responses)
    assert metrics["eval_exact_match"] == hits / 3
    assert len(trainer.responses) == 3
    lengths = [response.num_tokens for response in trainer.responses]
    assert metrics["eval_mean_generated_tokens"] == sum(lengths) / 3
    assert metrics["eval_stop_rate"] == sum(r.is_stopped for r in trainer.responses) / 3


def test_raw_rows_are_answered_like_prepared_rows(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(predict_with_generate=True, generation_max_new_tokens=2),
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    expected = trainer.generate_responses()
    assert trainer.generate_responses(dataset) == expected
    assert "eval_exact_match" in trainer.evaluate(dataset)
    assert trainer.responses == expected
    assert "test_exact_match" in trainer.predict(dataset).metrics
    assert trainer.responses == expected


def test_responses_are_asked_for_one_set_that_is_there(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    trainer = MaskedSFTTrainer(model, make_config(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="There are no rows to answer"):
        trainer.generate_responses()
    trainer.eval_dataset = {"short": dataset, "long": dataset}
    with pytest.raises(ValueError, match="several datasets, short, long"):
        trainer.generate_responses()
    with pytest.raises(ValueError, match="cannot be generated for a streaming dataset"):
        trainer.generate_responses(dataset.to_iterable_dataset())


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"a": rows}], ids=["one", "dict"])
def test_a_stream_to_generate_for_is_refused_before_training(
    wrap: Any, dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    stream = wrap(dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match="cannot be generated for a streaming dataset"):
        MaskedSFTTrainer(
            model,
            make_config(predict_with_generate=True),
            eval_dataset=stream,
            processing_class=tokenizer,
        )
    MaskedSFTTrainer(model, make_config(), eval_dataset=stream, processing_class=tokenizer)


def test_no_response_is_judged_by_a_reference_that_was_cut(
    model: Any, tokenizer: Any, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "hello", "response": "0"}, {"prompt": "hello", "response": "0 1 2 3 4 5"}]
    trainer = MaskedSFTTrainer(
        model,
        make_config(predict_with_generate=True, generation_max_new_tokens=2, max_length=6),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    judged: list[str] = []

    class Remember:
        def compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
            judged.extend(references)
            return {"remembered": len(references)}

    trainer.generation_metrics = [Remember()]
    assert trainer.evaluate()["eval_remembered"] == 1
    assert judged == ["0"]
    assert len(trainer.responses) == 2
    assert "1 of 2 expected responses do not end with a stop token" in caplog.text


@pytest.mark.parametrize(
    ("wrap", "name"), [(lambda rows: rows, "eval"), (lambda rows: {"web": rows}, "eval_web")]
)
def test_messages_about_evaluation_rows_name_their_set(
    wrap: Any, name: str, dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    def make(rows: Any, **settings: Any) -> Any:
        return MaskedSFTTrainer(
            model,
            make_config(**settings),
            train_dataset=dataset,
            eval_dataset=wrap(rows),
            processing_class=tokenizer,
        )

    bad = {"prompt": "hello", "response": ""}
    with pytest.raises(ValueError, match=f"^{name} data: 1 of 1 row cannot be trained"):
        make(Dataset.from_list([bad]))
    long = Dataset.from_list([{"prompt": "hello", "response": "0 " * 200}])
    with pytest.raises(RowError, match=f"^{name} data: Row 0: the row has"):
        make(long, max_length=200, overflow="error")
    with pytest.raises(ValueError, match=f"^{name} data: Responses cannot be generated for a str"):
        make(long.to_iterable_dataset(), predict_with_generate=True)
    trainer = make(Dataset.from_list([bad]).to_iterable_dataset())
    stream = trainer.eval_dataset["web"] if name == "eval_web" else trainer.eval_dataset
    assert list(stream) == []


def test_a_bad_row_of_a_batch_is_named_with_its_set(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    # Rows of another kind of dataset come to the collator as they are.
    rows = Dataset.from_list([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    bad = Subset(rows, [0, 1])  # type: ignore[arg-type]
    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        train_dataset=bad,  # type: ignore[arg-type]
        eval_dataset={"web": bad},  # type: ignore[dict-item]
        processing_class=tokenizer,
    )
    with pytest.raises(RowError, match=r"^eval_web data: Row 1 of the batch: the resp"):
        trainer.evaluate()
    with pytest.raises(RowError, match=r"^Row 1 of the batch: the response is empty"):
        trainer.train()


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_the_name_of_a_dataset_is_refused_with_the_line_that_loads_it(
    name: str, dataset: Dataset, tokenizer: Any, make_config: Make
) -> None:
    given: Any = {"train_dataset": dataset, name: "gsm8k"}
    # The model is not looked at before.
    with pytest.raises(ValueError, match=rf"^{name} is 'gsm8k', .* datasets.load_dataset\('gsm8k'"):
        MaskedSFTTrainer("no/model", make_config(), processing_class=tokenizer, **given)


@pytest.mark.parametrize("make", [DatasetDict, dict], ids=["DatasetDict", "dict"])
def test_several_sets_to_train_on_are_refused_with_the_cure(
    make: Any, dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    sets = make({"small": dataset, "test": dataset})
    with pytest.raises(ValueError, match=r"small, test, but.*dataset\['small'\]"):
        MaskedSFTTrainer(model, make_config(), train_dataset=sets, processing_class=tokenizer)
    with pytest.raises(ValueError, match="train_dataset holds no dataset"):
        MaskedSFTTrainer(model, make_config(), train_dataset=make(), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("names", "has_warning"), [(("train", "test"), True), (("train",), False), (("all",), False)]
)
def test_of_several_splits_the_one_called_train_is_trained_on(
    names: tuple[str, ...],
    has_warning: bool,
    dataset: Dataset,
    model: Any,
    tokenizer: Any,
    make_config: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    splits = DatasetDict({name: dataset.select(range(n + 1)) for n, name in enumerate(names)})
    for sets in (
        splits,
        IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}),
    ):
        caplog.clear()
        trainer = MaskedSFTTrainer(
            model, make_config(), train_dataset=sets, processing_class=tokenizer
        )
        assert len(list(trainer.train_dataset)) == 1
        assert ("holds train, test. Only 'train' is trained on" in caplog.text) == has_warning


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("granite", {"logits_scaling": 8.0, "tie_word_embeddings": False}),
        ("gemma2", {"final_logit_softcapping": 5.0, "initializer_range": 0.002}),
    ],
)
def test_the_fused_loss_stays_the_models_own_while_its_logits_grow(
    model_type: str,
    fields: dict[str, Any],
    dataset: Dataset,
    model_factory: Any,
    tokenizer: Any,
    make_config: Make,
) -> None:
    """At first the logits are so small that no transformation of them can be seen."""
    model = model_factory(model_type, **fields)
    if model_type == "granite":
        torch.nn.init.zeros_(model.lm_head.weight)
    trainer = MaskedSFTTrainer(
        model,
        make_config(max_steps=15, learning_rate=1e-2, fused_head="on"),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    fused = trainer.evaluate()["eval_loss"]
    trainer.fused_head = "off"
    assert fused == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "per-document SDPA, no padding, shared prompts once"),
        ({"shared_prompts": "off"}, "per-document SDPA, no padding"),
        ({"padding_free": "off"}, "padded, because padding_free is 'off'"),
    ],
)
def test_the_summary_of_a_run_says_how_rows_are_attended_to(
    settings: dict[str, Any],
    expected: str,
    dataset: Dataset,
    model: Any,
    tokenizer: Any,
    make_config: Make,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = MaskedSFTTrainer(
        model, make_config(**settings), train_dataset=dataset, processing_class=tokenizer
    )
    assert trainer.attention_summary is None
    trainer.train()
    assert f"attention {expected} head" in " ".join(capsys.readouterr().out.split())
    assert trainer.attention_summary == expected


def test_a_metric_of_ones_own_judges_along(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    class Count:
        def compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
            return {"count": len(predictions)}

    trainer = MaskedSFTTrainer(
        model,
        make_config(predict_with_generate=True, generation_max_new_tokens=2),
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.generation_metrics.append(Count())
    metrics = trainer.evaluate()
    assert metrics["eval_count"] == len(dataset)
    assert "eval_exact_match" in metrics


def test_a_metric_that_does_not_exist_is_refused_before_training(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    args = make_config(predict_with_generate=True, generation_metrics=["no_such_metric"])
    with pytest.raises(FileNotFoundError, match="no_such_metric"):
        MaskedSFTTrainer(model, args, eval_dataset=dataset, processing_class=tokenizer)


def test_compute_metrics_gets_the_most_probable_tokens(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    seen = {}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        seen["dtype"] = predictions.dtype.kind
        kept = labels != -100
        return {"accuracy": float((predictions == labels)[kept].mean())}

    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        eval_dataset=dataset,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_token_accuracy"])
    assert seen["dtype"] == "i"


def test_preprocess_logits_for_metrics_gets_the_logits(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    shapes = []

    def preprocess(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shapes.append((logits.shape, labels.shape))
        return logits.amax(-1)

    trainer = MaskedSFTTrainer(
        model,
        make_config(per_device_eval_batch_size=8),
        eval_dataset=dataset,
        processing_class=tokenizer,
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
        preprocess_logits_for_metrics=preprocess,
    )
    assert trainer.evaluate()["eval_rows"] == 8
    (logits, labels) = shapes[0]
    assert logits == (*labels, 300)


class FakeHub:
    """Stands in for the Hub: remembers what was created and uploaded."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.uploads: list[dict[str, bytes]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        self.created.append(name)
        return type("RepoUrl", (), {"repo_id": f"somebody/{name}"})()

    def upload_folder(self, folder_path: str, **_: Any) -> Future[str]:
        folder = Path(folder_path)
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.uploads.append({str(p.relative_to(folder)): p.read_bytes() for p in files})
        upload: Future[str] = Future()
        upload.set_result("https://example.org/commit")
        return upload


@pytest.mark.curves
def test_an_adapter_reaches_the_hub_with_its_card_and_without_the_token(
    dataset: Dataset,
    model: Any,
    tokenizer: Any,
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    token = "hf_" + "s" * 34
    trainer = MaskedSFTTrainer(
        model,
        make_config(push_to_hub=True, hub_model_id="my-adapter", hub_token=token),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(license="apache-2.0", tags="demo")
    assert hub.created == ["my-adapter"]
    files = hub.uploads[-1]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(files)
    assert {"README.md", "metrics.jsonl", "report/loss.png"} <= set(files)
    assert not [name for name, content in files.items() if token.encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "peft"
    assert {"demo", "hf_sft_plugin"} <= set(card.data.tags)
    assert "after training" in card.text


def test_a_checkpoint_in_training_pushes_without_the_token_too(
    dataset: Dataset,
    model: Any,
    tokenizer: Any,
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    token = "hf_" + "s" * 34
    trainer = MaskedSFTTrainer(
        model,
        make_config(
            push_to_hub=True,
            hub_model_id="my-model",
            hub_token=token,
            save_strategy="steps",
            save_steps=1,
            hub_always_push=True,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    assert hub.uploads
    for files in hub.uploads:
        assert not [name for name, content in files.items() if token.encode() in content]


def one_row(**row: Any) -> Dataset:
    return Dataset.from_list([row])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (one_row(question="q", answer="a"), "No known format.*columns are answer, question"),
        (one_row(prompt="p", messages=[]), "both a prompt and a messages column"),
        (one_row(prompt="p", response="r").select([]), "The dataset is empty"),
        (one_row(prompt="p", response=""), "Row 0: the response is empty"),
        (one_row(prompt="p", response=3), "Row 0: column 'response' holds int"),
        (one_row(input_ids=[5, 6], response_mask=[0, 0]), "Row 0: no token of the row is trained"),
        (one_row(input_ids=[5, 6], labels=[-100, -100]), "Row 0: no token of the row is trained"),
        (one_row(input_ids=[5, 300], labels=[-100, 300]), "Row 0: input_ids holds 300"),
        (one_row(input_ids=[5, 6], labels=[6, -100]), "Row 0: labels holds 6 where"),
    ],
)
def test_data_that_cannot_be_trained_is_refused_before_any_step(
    dataset: Dataset, message: str, model: Any, tokenizer: Any, make_config: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedSFTTrainer(model, make_config(), train_dataset=dataset, processing_class=tokenizer)


def test_a_row_too_long_is_an_error_when_asked(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    with pytest.raises(RowError, match=r"Row 0: the row has \d+ tokens, but max_length is 5"):
        MaskedSFTTrainer(
            model,
            make_config(max_length=5, overflow="error"),
            train_dataset=dataset,
            processing_class=tokenizer,
        )


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    model_factory: Any, tokenizer: Any, make_config: Make
) -> None:
    with pytest.raises(ValueError, match=r"300 tokens but the model embeds only\s+200"):
        MaskedSFTTrainer(model_factory(vocab_size=200), make_config(), processing_class=tokenizer)


def test_conversations_need_a_chat_template(
    dataset: Dataset, model: Any, tokenizer_factory: Any, make_config: Make
) -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        MaskedSFTTrainer(
            model,
            make_config(),
            train_dataset=dataset,
            processing_class=tokenizer_factory(chat_template=None),
        )


def test_the_settings_of_another_trainer_are_refused(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="MaskedSFTTrainer needs a MaskedSFTConfig"):
        MaskedSFTTrainer(
            model,
            TrainingArguments(output_dir=str(tmp_path)),  # type: ignore[arg-type]
            processing_class=tokenizer,
        )


def test_a_model_is_loaded_by_its_name_with_its_own_tokenizer(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = MaskedSFTTrainer(
        str(tmp_path / "base"),
        make_config(model_init_kwargs='{"dtype": "bfloat16"}'),
        train_dataset=dataset,
    )
    assert trainer.model.dtype == torch.bfloat16
    trainer.train()
    assert trainer.state.global_step == 2


LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_template_from_a_file_writes_the_rows_and_is_saved(
    dataset: Dataset, model: Any, tokenizer_factory: Any, make_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "lines.jinja").write_text(LINES)
    trainer = MaskedSFTTrainer(
        model,
        make_config(chat_template_path=str(tmp_path / "lines.jinja")),
        train_dataset=dataset,
        processing_class=tokenizer_factory(chat_template=None),
    )
    expected, _ = prepare_dataset(dataset, tokenizer_factory(chat_template=LINES))
    assert trainer.train_dataset.to_list() == expected.to_list()
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(trainer.args.output_dir).chat_template == LINES


def test_a_chat_template_that_is_not_there_is_refused_before_the_model_is_loaded(
    dataset: Dataset, make_config: Make
) -> None:
    with pytest.raises(ValueError, match=r"chat_template_path is 'no\.jinja', but there"):
        MaskedSFTTrainer("nowhere", make_config(chat_template_path="no.jinja"), dataset)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(task_type="CAUSAL_LM", r=4)])
def test_the_tags_of_settings_and_model_are_in_every_card_that_is_pushed(
    peft_config: Any,
    dataset: Dataset,
    model: Any,
    tokenizer: Any,
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    model.add_model_tags("chess")
    trainer = MaskedSFTTrainer(
        model,
        make_config(push_to_hub=True, hub_model_id="mine", model_tags=["go", "chess"]),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    card = ModelCard.load(Path(trainer.args.output_dir, "README.md"))
    assert card.data.tags == ["chess", "go", "hf_sft_plugin", "sft"]
    trainer.push_to_hub(tags="demo")
    card = ModelCard(hub.uploads[-1]["README.md"].decode())
    assert card.data.tags == ["chess", "demo", "go", "hf_sft_plugin", "sft"]


def test_the_summary_of_a_run_says_what_to_set_for_a_chat_template(
    model: Any, tokenizer: Any, make_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Dataset.from_list([{"prompt": "hello", "response": "world"}] * 4)
    MaskedSFTTrainer(model, make_config(), train_dataset=rows, processing_class=tokenizer).train()
    printed = " ".join(capsys.readouterr().out.split())
    assert "plain text without the chat template; prompt_format='chat' uses it" in printed


def test_a_transform_is_refused_in_every_set_of_rows(
    dataset: Dataset, model: Any, tokenizer: Any, make_config: Make
) -> None:
    changed = dataset.with_transform(dict)

    def make(train: Any, evaluation: Any) -> MaskedSFTTrainer:
        return MaskedSFTTrainer(
            model,
            make_config(),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
        )

    cases = {
        "": (changed, None),
        "eval data: ": (dataset, changed),
        "eval_web data: ": (dataset, {"web": changed}),
    }
    for name, (train, evaluation) in cases.items():
        with pytest.raises(ValueError, match=f"^{name}The dataset has a transform"):
            make(train, evaluation)
    with pytest.raises(ValueError, match=r"^The dataset has a transform"):
        make(DatasetDict({"train": changed}), None)
    with pytest.raises(ValueError, match=r"^evaluate data: The dataset has a transform"):
        make(dataset, dataset).evaluate(changed)


def test_the_stop_token_is_the_one_named_and_is_saved(
    dataset: Dataset, model: Any, tokenizer_factory: Any, make_config: Make
) -> None:
    tokenizer = tokenizer_factory(eos_token="<|endoftext|>")
    trainer = MaskedSFTTrainer(
        model,
        make_config(stop_token="<|im_end|>"),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    for row in trainer.train_dataset:
        trained = [i for i, m in zip(row["input_ids"], row["response_mask"], strict=True) if m]
        assert trained[-1] == 2
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(trainer.args.output_dir)
    assert saved.eos_token == "<|im_end|>"


def test_a_list_of_rows_is_checked_and_counted_as_a_dataset_is(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    rows = [{"prompt": "hello", "response": "world"}] * 3
    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        train_dataset=rows,
        processing_class=tokenizer,  # type: ignore[arg-type]
    )
    assert trainer.ledgers["train"].num_rows_trained == 3


def test_rows_given_to_evaluate_are_checked_and_counted_like_those_of_the_constructor(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    raw = Dataset.from_list([{"prompt": "hello", "response": "world"}] * 3)
    config = make_config(predict_with_generate=True, generation_max_new_tokens=2)
    trainer = MaskedSFTTrainer(model, config, eval_dataset=raw, processing_class=tokenizer)
    figures = trainer.evaluate()
    again = trainer.evaluate(raw)
    assert {k: v for k, v in again.items() if k.endswith(("loss", "match"))} == {
        k: v for k, v in figures.items() if k.endswith(("loss", "match"))
    }
    assert trainer.ledgers["evaluate"].num_rows_trained == 3
    assert trainer.predict(raw).metrics["test_loss"] == figures["eval_loss"]
    several = trainer.evaluate({"a": raw, "b": raw})
    assert several["eval_a_loss"] == several["eval_b_loss"] == figures["eval_loss"]
    bad = Dataset.from_list([{"prompt": "hello", "response": ""}] * 3)
    with pytest.raises(ValueError, match="3 of 3 rows cannot be trained"):
        trainer.evaluate(bad)


def test_a_stream_leaves_out_what_cannot_be_trained_and_trains_the_rest(
    tokenizer: Any,
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"prompt": "hello", "response": "world"}] * 5 + [{"prompt": "hello", "response": " "}]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = MaskedSFTTrainer(
        model, make_config(max_steps=2), train_dataset=stream, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert "Row 5: the response is empty" in caplog.text


def test_shards_are_trained_with_the_tokenizer_that_made_them_and_no_other(
    tokenizer: Any,
    tokenizer_factory: Callable[..., Any],
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
    tmp_path: Path,
) -> None:
    rows = [{"prompt": "hello", "response": "world"}, {"prompt": "what", "response": "the answer"}]
    prepared, _ = prepare_dataset(Dataset.from_list(rows), tokenizer)
    write_shards(tmp_path / "shards", {"train": prepared}, tokenizer)
    losses = []
    for dataset in (prepared, ShardDataset(tmp_path / "shards")):
        trainer = MaskedSFTTrainer(
            model, make_config(), eval_dataset=dataset, processing_class=tokenizer
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    other = tokenizer_factory()
    other.add_tokens(["more"])
    model.resize_token_embeddings(len(other))
    with pytest.raises(ValueError, match="tokenizer"):
        MaskedSFTTrainer(
            model,
            make_config(),
            train_dataset=ShardDataset(tmp_path / "shards"),
            processing_class=other,
        )


def test_shards_bring_the_account_of_their_documents(
    tokenizer: Any, model: Any, make_config: Callable[..., MaskedSFTConfig], tmp_path: Path
) -> None:
    rows = [{"prompt": "hello", "response": "world"}, {"prompt": "what", "response": "the answer"}]
    prepared, ledger = prepare_dataset(Dataset.from_list(rows), tokenizer)
    write_shards(tmp_path / "set", {"train": prepared}, tokenizer, ledgers={"train": ledger})

    def train(shards: dict[str, Any], **settings: Any) -> MaskedSFTTrainer:
        dataset = ShardDataset(tmp_path / "set", **shards)
        config = make_config(max_steps=1, **settings)
        trainer = MaskedSFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        return trainer

    trainer = train({})
    assert trainer.ledgers == {"train": ledger}
    proof = json.loads(Path(trainer.args.output_dir, "mask_certificate_train.json").read_text())
    assert proof["masks_sha256"] == ledger.certificate["masks_sha256"]
    # Blocks, and documents without their masks, are not what was accounted.
    assert train({"block_size": 5}).ledgers == {}
    assert train({"use_loss_mask": False}, use_loss_mask=False).ledgers == {}
    with pytest.raises(ValueError, match="use_loss_mask is False, but the train data"):
        train({}, use_loss_mask=False)


def test_a_run_leaves_the_certificate_of_its_masks(
    tokenizer: Any,
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
    chat_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = make_config()
    trainer = MaskedSFTTrainer(
        model, config, train_dataset=Dataset.from_list(chat_rows), processing_class=tokenizer
    )
    trainer.train()
    folder = Path(str(config.output_dir))
    certificate = json.loads((folder / "mask_certificate_train.json").read_text())
    assert certificate["spans"] == {"exact": 12}
    assert certificate["num_rows"] == certificate["num_rows_trained"] == 8
    assert certificate["dropped"] == certificate["remarks"] == {}
    digest = trainer.ledgers["train"].certificate["masks_sha256"]
    assert certificate["masks_sha256"] == digest
    assert digest[:16] in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": 5}],
            "train data, row 1: column 'respo",
        ),
        (["a", "b"], "Row 0 of the train data is str, but a row is a dict"),
    ],
)
def test_a_list_that_is_no_table_of_rows_is_refused(
    rows: Any, message: str, tokenizer: Any, model: Any, make_config: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedSFTTrainer(model, make_config(), train_dataset=rows, processing_class=tokenizer)


def test_a_stream_of_which_nothing_can_be_trained_is_an_error(
    tokenizer: Any, model: Any, make_config: Make
) -> None:
    stream = Dataset.from_list([{"prompt": "a", "response": " "}] * 4).to_iterable_dataset()
    trainer = MaskedSFTTrainer(
        model, make_config(), train_dataset=stream, processing_class=tokenizer
    )
    with pytest.raises(ValueError, match="Nothing was trained"):
        trainer.train()


def test_a_frozen_model_can_be_evaluated_but_not_trained(
    dataset: Dataset, tokenizer: Any, model: Any, make_config: Make
) -> None:
    model.requires_grad_(False)
    trainer = MaskedSFTTrainer(
        model, make_config(), eval_dataset=dataset, processing_class=tokenizer
    )
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        MaskedSFTTrainer(model, make_config(), train_dataset=dataset, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("generation_stops", "stop_token", "stop"),
    [
        (["<|endoftext|>", "<|user|>"], None, "<|user|>"),
        (["<|endoftext|>"], None, "<|endoftext|>"),
        (["<|endoftext|>"], "<|user|>", "<|user|>"),
    ],
)
def test_a_stop_token_that_no_template_writes_is_one_at_which_generation_stops(
    generation_stops: list[str],
    stop_token: str | None,
    stop: str,
    tokenizer_factory: Callable[..., Any],
    model_factory: Callable[..., Any],
    make_config: Make,
) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template, eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    model = model_factory(vocab_size=304, eos_token_id=0)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(generation_stops)
    chat = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    trainer = MaskedSFTTrainer(
        model,
        make_config(stop_token=stop_token),
        train_dataset=Dataset.from_list([{"messages": chat}] * 4),
        processing_class=tokenizer,
    )
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    assert stop_id in trainer.stop_token_ids
    for row in trainer.train_dataset:
        assert row["response_mask"][-1] == 1
        assert row["input_ids"][-1] == stop_id
    assert repr(stop) in str(trainer.ledgers["train"])
