"""Packed training is training on the same rows: loss, figures and gradient, in float64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
    PackedDataset,
    ShardDataset,
    pack_dataset,
    prepare_dataset,
    write_shards,
)

Make = Callable[..., Any]
MAX_LENGTH = 48
FIGURES = ("loss", "token_entropy", "token_accuracy", "num_response_tokens", "num_tokens")
LAYERS = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}


def make_rows(with_weights: bool = False) -> list[dict[str, Any]]:
    """Fifteen rows of 3 to 43 tokens; of some the first token is marked, which nothing predicts."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for number in range(15):
        num_prompt, num_response = 2 + number % 5, 1 + (number * 17) % 39
        length = num_prompt + num_response
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        row: dict[str, Any] = {
            "input_ids": ids,
            "response_mask": [int(number % 3 == 0)] * num_prompt + [1] * num_response,
        }
        if with_weights:
            row["loss_weights"] = [0.25 * (1 + (number + t) % 4) for t in range(length)]
        rows.append(row)
    return rows


def truth(model: Any, rows: list[dict[str, Any]], normalization: str) -> dict[str, Any]:
    """One row at a time, with nothing of the package."""
    model = model.double()
    loss: Any = 0.0
    divisor, entropy, hits, count = 0.0, 0.0, 0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        log_p = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
        mask = torch.tensor(row["response_mask"][1:], dtype=torch.float64)
        weights = mask * torch.tensor(row.get("loss_weights", [1.0] * len(ids))[1:]).double()
        total = float(weights.sum())
        share = 1 / total if normalization == "example" else 1.0
        loss = loss - share * (weights * log_p.gather(-1, ids[1:, None])[:, 0]).sum()
        divisor += total * share
        entropy -= float((mask[:, None] * log_p.exp() * log_p).detach().sum())
        hits += int((mask * (log_p.argmax(-1) == ids[1:])).sum())
        count += int(mask.sum())
    (loss / divisor).backward()
    return {
        "loss": float(loss) / divisor,
        "token_entropy": entropy / count,
        "token_accuracy": hits / count,
        "num_response_tokens": count,
        "num_tokens": sum(len(row["input_ids"]) for row in rows),
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters()]),
    }


class Keeper(TrainerCallback):
    """Keeps the gradient of the last optimizer step."""

    gradient: Tensor

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten().double() for p in kwargs["model"].parameters()]
        self.gradient = torch.cat(grads)


def relative(found: Any, expected: Any) -> float:
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


def assert_equal(trainer: Any, keeper: Keeper, expected: dict[str, Any]) -> None:
    log = trainer.state.log_history[0]
    for key in FIGURES:
        assert relative(log[key], expected[key]) < 1e-12, key
    assert relative(keeper.gradient, expected["gradient"]) < 1e-12


@pytest.fixture
def one_step(make_config: Make, tokenizer: Any) -> Make:
    """One optimizer step over all rows, packed."""

    def run(model: Any, rows: Any, num_packed: int, size: int = 2, **settings: Any) -> Any:
        keeper = Keeper()
        trainer = MaskedSFTTrainer(
            model,
            make_config(
                **{
                    "packing": True,
                    "max_length": MAX_LENGTH,
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": math.ceil(num_packed / size),
                    "max_steps": 1,
                    "learning_rate": 0.0,
                    "max_grad_norm": 0.0,
                    **settings,
                }
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[keeper],
        )
        trainer.train()
        return trainer, keeper

    return run


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 1},
        {"size": 20},
        {"fused_head": "off", "shared_prompts": "off"},
        {"loss_normalization": "example"},
        {"max_tokens_per_microbatch": 70},
        {"max_tokens_per_microbatch": 20, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_loss_figures_and_gradient_are_those_of_the_rows_one_by_one(
    model_type: str, settings: dict[str, Any], model_factory: Make, one_step: Make
) -> None:
    rows = make_rows(with_weights=settings.get("loss_normalization") == "example")
    num_packed = len(pack_dataset(rows, MAX_LENGTH))
    assert num_packed < len(rows) - 3
    model = model_factory(model_type).double()
    trainer, keeper = one_step(model, Dataset.from_list(rows), num_packed, **settings)
    assert isinstance(trainer.train_dataset, PackedDataset)
    assert len(trainer.train_dataset) == num_packed
    expected = truth(model_factory(model_type), rows, settings.get("loss_normalization", "token"))
    assert_equal(trainer, keeper, expected)


def test_documents_of_shards_and_rows_packed_beforehand_train_alike(
    model_factory: Make, one_step: Make, tokenizer: Any, tmp_path: Path
) -> None:
    prepared, _ = prepare_dataset(Dataset.from_list(make_rows()), tokenizer)
    write_shards(tmp_path / "set", {"train": prepared}, tokenizer)
    expected = truth(model_factory(), make_rows(), "token")
    packed = pack_dataset(prepared, MAX_LENGTH)
    for rows in (ShardDataset(tmp_path / "set"), packed):
        assert_equal(*one_step(model_factory().double(), rows, len(packed)), expected)
    packed_off = {"packing": False, "max_length": None}
    run = one_step(model_factory().double(), packed, len(packed), **packed_off)
    assert_equal(*run, expected)


def test_a_trainer_of_ones_own_and_the_plain_trainer_take_packed_rows(
    model_factory: Make, tokenizer: Any, tmp_path: Path
) -> None:
    """Of the plain one the loss is a mean as well: the batch is the whole step."""

    class OwnTrainer(MaskedLossMixin, Trainer):
        pass

    packed = pack_dataset(make_rows(), MAX_LENGTH)
    expected = truth(model_factory(), make_rows(), "token")
    for cls in (OwnTrainer, Trainer):
        keeper = Keeper()
        trainer = cls(
            model_factory().double(),
            TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                max_steps=1,
                logging_steps=1,
                learning_rate=0.0,
                max_grad_norm=0.0,
                # The one of ours keeps what a collator of ours needs.
                remove_unused_columns=cls is OwnTrainer,
                per_device_train_batch_size=len(packed),
            ),
            data_collator=DataCollatorForPromptResponse(
                tokenizer, return_response_mask=cls is OwnTrainer
            ),
            train_dataset=packed,
            callbacks=[keeper],
        )
        trainer.train()
        # The model's own loss is rounded to float32.
        bound = 1e-12 if cls is OwnTrainer else 1e-6
        assert relative(trainer.state.log_history[0]["loss"], expected["loss"]) < bound
        assert relative(keeper.gradient, expected["gradient"]) < bound


@pytest.mark.parametrize("packing", [True, False])
def test_the_summary_says_how_full_the_packed_rows_are(
    packing: bool, model: Any, one_step: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the trainer packed them, or was given them so."""
    rows = make_rows()
    packed = pack_dataset(rows, MAX_LENGTH)
    given = Dataset.from_list(rows) if packing else packed
    trainer, _ = one_step(model, given, len(packed), packing=packing)
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "packed rows per optimizer step" in card
    text = " ".join(capsys.readouterr().out.split())
    assert f"packing {packed}" in text
    assert f"15 rows in {len(packed)} packed rows of up to 48 tokens, " in text
    assert "packed rows (2 per batch" in text
    assert ("rows 15 in = 15 trained" in text) == packing


def virtual_tokens(model: Any) -> Any:
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_model_that_would_mix_the_rows_refuses_them_with_the_reason(
    model: Any, model_factory: Make, one_step: Make
) -> None:
    with pytest.raises(ValueError, match=r"packed, but .* padded, because tokens of one row reach"):
        one_step(model_factory("lfm2", **LAYERS), Dataset.from_list(make_rows()), 8)
    with pytest.raises(
        ValueError, match=r"packed, but .* padded, because the adapter puts virtual"
    ):
        one_step(virtual_tokens(model), Dataset.from_list(make_rows()), 8)


def test_evaluation_is_by_rows_and_so_are_its_sources(
    model_factory: Make, tokenizer: Any, make_config: Make
) -> None:
    rows = [{**row, "source": f"s{number % 2}"} for number, row in enumerate(make_rows())]
    figures = []
    for packing in (True, False):
        trainer = MaskedSFTTrainer(
            model_factory(),
            make_config(packing=packing, max_length=MAX_LENGTH, max_steps=1, learning_rate=0.0),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        found = trainer.evaluate()
        figures.append({key: value for key, value in found.items() if "_s1_" in key})
    assert figures[0] == figures[1]
    assert "eval_s1_loss" in figures[0]
    packed = pack_dataset(rows, MAX_LENGTH)
    with pytest.raises(ValueError, match="The evaluate data is packed"):
        trainer.evaluate(packed)


def make_trainer(model: Any, tokenizer: Any, config: MaskedSFTConfig, **more: Any) -> Any:
    rows = more.pop("train_dataset", Dataset.from_list(make_rows()))
    return MaskedSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, **more)


def test_what_could_not_be_packed_is_refused_before_any_step(
    model: Any, tokenizer: Any, make_config: Make
) -> None:
    config = make_config(packing=True, max_length=MAX_LENGTH)
    with pytest.raises(ValueError, match="data_collator is a DataCollatorForSeq2Seq"):
        make_trainer(model, tokenizer, config, data_collator=DataCollatorForSeq2Seq(tokenizer))
    stream = Dataset.from_list(make_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match="A stream cannot be packed"):
        make_trainer(model, tokenizer, config, train_dataset=stream)
    longer = pack_dataset(make_rows(), 100)
    with pytest.raises(ValueError, match="a row of 43 tokens, longer than max_length 20"):
        make_trainer(model, tokenizer, make_config(max_length=20), train_dataset=longer)


def test_rows_longer_than_a_packed_row_go_the_way_that_overflow_says(
    model: Any, tokenizer: Any, make_config: Make
) -> None:
    config = make_config(packing=True, max_length=20, overflow="split")
    trainer = make_trainer(model, tokenizer, config)
    packed, ledger = trainer.train_dataset, trainer.ledgers["train"]
    assert packed.lengths.sum() == ledger.num_response_tokens + ledger.num_context_tokens
    # The last token of a row of 41 has nothing before it.
    assert packed.lengths.sum() == sum(len(row["input_ids"]) for row in make_rows()) - 1
    assert len(packed.lengths) > 15
    assert packed.lengths.max() == 20


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    model_factory: Make, tokenizer: Any, make_config: Make
) -> None:
    settings = {"packing": True, "max_length": MAX_LENGTH, "max_steps": 6, "learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(model_factory(), tokenizer, make_config(**settings))
    whole.train()
    resumed = make_trainer(model_factory(), tokenizer, make_config(**settings))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    logs = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert logs[0] == logs[1]
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_too_few_packed_rows_for_a_batch_are_named_as_a_cause(
    model: Any, tokenizer: Any, make_config: Make
) -> None:
    config = make_config(
        packing=True,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=64,
        dataloader_drop_last=True,
    )
    with pytest.raises(ValueError, match=r"fewer \(packed\) rows .* dataloader_drop_last"):
        make_trainer(model, tokenizer, config).train()


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own, whose collator may put rows together."""


def flattened(rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    features = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    batch: dict[str, Any] = DataCollatorWithFlattening(**settings)(features)
    return batch


OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}


@pytest.mark.parametrize(
    ("model_type", "fields", "change", "padding_free", "reason"),
    [
        ("lfm2", LAYERS, None, "auto", "rows are padded, because tokens of one row reach another"),
        ("qwen3", {}, virtual_tokens, "auto", "rows are padded, because the adapter puts virtual"),
        # By itself it does not look at positions to tell documents apart.
        ("opt", OPT, None, "off", "rows are padded, because padding_free is 'off'"),
    ],
    ids=["convolution", "virtual tokens", "switched off"],
)
def test_documents_that_another_collator_put_together_are_kept_apart_or_refused(
    model_type: str,
    fields: dict[str, Any],
    change: Any,
    padding_free: str,
    reason: str,
    model_factory: Make,
    make_config: Make,
) -> None:
    model = model_factory(model_type, **fields)
    model = model if change is None else change(model)
    trainer = OwnTrainer(model, make_config(), train_dataset=make_rows())
    trainer.padding_free = padding_free
    with pytest.raises(ValueError, match=rf"several documents in a row, .* each other: {reason}"):
        trainer.compute_loss(model, flattened(make_rows()))
    # A single document may come without a mask.
    assert trainer.compute_loss(model, flattened(make_rows()[:1])).isfinite()


def test_documents_beside_something_unknown_or_with_outputs_are_refused(
    model: Any, make_config: Make
) -> None:
    trainer = OwnTrainer(model, make_config(), train_dataset=make_rows())
    assert trainer.compute_loss(model, flattened(make_rows())).isfinite()
    strange = {**flattened(make_rows()), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"it does not hold tokens alone, but input_ids, .*, bias"):
        trainer.compute_loss(model, strange)
    with pytest.raises(ValueError, match="the outputs of the model are asked for"):
        trainer.compute_loss(model, flattened(make_rows()), return_outputs=True)


def test_a_budget_of_tokens_does_not_join_documents(
    model_factory: Make, make_config: Make, tokenizer: Any
) -> None:
    """Rows that meet get a mask, and with a mask positions no longer tell documents apart."""
    trainer = MaskedSFTTrainer(
        model_factory("opt", **OPT),
        make_config(padding_free="off", max_tokens_per_microbatch=100),
        data_collator=lambda rows: flattened(list(rows)),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="several documents in a row"):
        trainer.train()
