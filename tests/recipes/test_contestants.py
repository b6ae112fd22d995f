"""Everyone in a benchmark trains the same model on the same tokens."""

import importlib.util
from pathlib import Path
from typing import Any

import contestants
import pytest
import torch
from contestants import CONTESTANTS, Setup, make_model, make_rows, with_labels

SETUP = Setup("tiny", None, 4, 1, 2, "float32", 2)


def test_rows_made_up_are_as_long_as_real_ones_vary() -> None:
    rows, _ = make_rows(SETUP)
    assert len(rows) == 12
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) > 6
    trained = sum(sum(row["response_mask"]) for row in rows)
    assert 0.15 < trained / sum(lengths) < 0.4


def test_rows_may_have_a_question_in_common() -> None:
    rows, _ = make_rows(Setup("tiny", None, 4, 1, 1, "float32", 2, responses_per_prompt=2))
    prompts = [
        tuple(
            token for token, m in zip(row["input_ids"], row["response_mask"], strict=True) if not m
        )
        for row in rows
    ]
    assert prompts[::2] == prompts[1::2]
    assert len(set(prompts)) == 4
    assert len({tuple(row["input_ids"]) for row in rows}) == 8


def test_rows_of_a_file_are_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one and one", "answer": "two"}\n' * 20)
    rows, tokenizer = make_rows(Setup("tiny", str(path), 4, 1, 2, "float32", 2))
    assert len(rows) == 12
    trained = [
        token
        for token, mask in zip(rows[0]["input_ids"], rows[0]["response_mask"], strict=True)
        if mask
    ]
    assert tokenizer.decode(trained) == "two<|im_end|>"


def test_labels_say_what_the_mask_says() -> None:
    rows, _ = make_rows(SETUP)
    for row, other in zip(rows, with_labels(rows), strict=True):
        assert other["input_ids"] == row["input_ids"]
        assert [int(label != -100) for label in other["labels"]] == row["response_mask"]


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_takes_the_same_first_step(name: str, tmp_path: Path) -> None:
    if name.startswith("trl") and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL, the extra `bench`, is not installed")
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    rows, tokenizer = make_rows(SETUP)
    trainer = CONTESTANTS[name](make_model(SETUP, tokenizer), rows, tokenizer, settings)
    trainer.train()
    model = make_model(SETUP, tokenizer)
    total, count = 0.0, 0
    for row in with_labels(rows.select(range(4))):
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != contestants.IGNORE_INDEX).sum())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-5)
