"""Every contestant trains the same tokens, from the same weights to the same weights."""

import importlib.util
from pathlib import Path
from typing import Any

import contestants
import pytest
import torch
from contestants import (
    CONTESTANTS,
    default_contestants,
    import_ahead,
    trainer_settings,
    why_impossible,
    with_labels,
)
from workload import Setup, make_model, make_rows

SETUP = Setup("tiny", None, 4, 1, 2, "float32", 2)


def skip_where_it_cannot_run(name: str) -> None:
    reason = why_impossible([name])
    if reason:
        pytest.skip(reason)


def losses(name: str, setup: Setup, folder: Path, num_steps: int) -> list[float]:
    rows = make_rows(setup, 4 * num_steps)
    settings = trainer_settings(setup, str(folder), num_steps, logging_steps=1)
    model = make_model(setup, rows.tokenizer)
    trainer = CONTESTANTS[name](model, rows.tokenized, rows.tokenizer, settings)
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_labels_say_what_the_mask_says() -> None:
    rows = make_rows(SETUP, 4)
    labelled = with_labels(rows.tokenized)
    for row, other in zip(rows.tokenized, labelled, strict=True):
        assert other["input_ids"] == row["input_ids"]
        assert [int(label != -100) for label in other["labels"]] == row["response_mask"]
    assert with_labels(labelled) is labelled
    assert with_labels(rows.raw) is rows.raw


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_takes_the_same_first_step(name: str, tmp_path: Path) -> None:
    skip_where_it_cannot_run(name)
    import_ahead(name)
    (loss,) = losses(name, SETUP, tmp_path, num_steps=1)
    rows = make_rows(SETUP, 4)
    model = make_model(SETUP, rows.tokenizer)
    total, count = 0.0, 0
    for row in with_labels(rows.tokenized):
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != contestants.IGNORE_INDEX).sum())
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "trl-default", "trl-best"])
def test_an_adapter_is_trained_alike_by_everyone(name: str, tmp_path: Path) -> None:
    skip_where_it_cannot_run(name)
    setup = Setup("tiny", None, 4, 1, 2, "float32", 2, lora=True)
    ours = losses("ours", setup, tmp_path, num_steps=3)
    assert len(set(ours)) == 3
    assert losses(name, setup, tmp_path, num_steps=3) == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ours-padded", "padding_free", "off"),
        ("ours-full-logits", "fused_head", "off"),
        ("ours-layers-off", "fused_layers", "off"),
        ("ours-stock-allocator", "keep_freed_memory", False),
    ],
)
def test_ours_without_a_lever_differs_in_that_lever_alone(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    rows = make_rows(SETUP, 4)
    settings = trainer_settings(SETUP, str(tmp_path), 1, logging_steps=1)
    ours, other = (
        CONTESTANTS[each](
            make_model(SETUP, rows.tokenizer), rows.tokenized, rows.tokenizer, settings
        ).args.to_dict()
        for each in ("ours", name)
    )
    assert {key for key in ours if ours[key] != other[key]} == {field}
    assert other[field] == value


def test_liger_is_refused_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_impossible(["ours", "liger"]) == (
        "'liger' runs on CUDA alone, and there is no such device here: leave it out of "
        "--contestants."
    )
    assert default_contestants("logits", "trl") == ["ours", "logits", "trl"]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "'trl-best' needs trl, which is not installed" in str(why_impossible(["trl-best"]))
    assert "pip install liger-kernel" in str(why_impossible(["liger"]))
    assert why_impossible(["ours", "plain", "ours-padded"]) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert why_impossible(list(CONTESTANTS)) is None
    assert default_contestants()[-1] == "liger"
