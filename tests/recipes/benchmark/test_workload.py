"""Everyone in a benchmark trains the same model on the same tokens."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
import workload
from workload import (
    SHAPES,
    WORDS,
    Setup,
    describe,
    invent_rows,
    make_model,
    make_rows,
    padding_share,
    row_lengths,
)

SETUP = Setup("tiny", None, 4, 1, 2, "float32", 2)


def trained_tokens(row: dict[str, Any], trained: int = 1) -> list[int]:
    pairs = zip(row["input_ids"], row["response_mask"], strict=True)
    return [token for token, mask in pairs if mask == trained]


def test_rows_made_up_are_as_long_as_real_ones_vary() -> None:
    rows = make_rows(SETUP, 12)
    lengths = row_lengths(rows)
    assert len(lengths) == len(rows.raw) == 12
    assert len(set(lengths)) > 6
    trained = sum(sum(row["response_mask"]) for row in rows.tokenized)
    assert 0.15 < trained / sum(lengths) < 0.4


def test_prompts_and_responses_made_up_have_the_ratio_that_was_asked_for() -> None:
    totals = {}
    for name, expected in (("3:1", 3.0), ("1:1", 1.0), ("1:4", 0.25)):
        rows = invent_rows(400, name)
        questions, answers = (
            [len(row[column].split()) for row in rows] for column in ("question", "answer")
        )
        assert sum(questions) / sum(answers) == pytest.approx(expected, rel=0.1)
        # Lengths vary alike, whatever the ratio.
        for lengths in (questions, answers):
            spread = torch.tensor(lengths).log().std().item()
            assert spread == pytest.approx(0.5, abs=0.05)
        totals[name] = sum(questions) + sum(answers)
    assert list(totals) == list(WORDS)
    assert max(totals.values()) / min(totals.values()) < 1.1


def test_rows_may_have_a_question_in_common() -> None:
    rows = make_rows(Setup("tiny", None, 4, 1, 1, "float32", 2, responses_per_prompt=2), 8)
    prompts = [tuple(trained_tokens(row, 0)) for row in rows.tokenized]
    assert prompts[::2] == prompts[1::2]
    assert len(set(prompts)) == 4
    assert len({tuple(row["input_ids"]) for row in rows.tokenized}) == 8


def test_rows_of_a_file_are_taken_again_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one and one", "answer": "two"}\n' * 5)
    setup = Setup("tiny", str(path), 4, 1, 2, "float32", 2)
    rows = make_rows(setup, 12)
    assert len(rows.tokenized) == len(rows.raw) == 12
    assert rows.tokenizer.decode(trained_tokens(rows.tokenized[0])) == "two<|im_end|>"
    assert len(make_rows(setup, 3).raw) == 3
    assert len(make_rows(setup, 3, keeps_all=True).raw) == 5
    assert "rows.jsonl" in describe(setup, row_lengths(rows))


def test_raw_and_tokenized_rows_are_the_same() -> None:
    rows = make_rows(SETUP, 3)
    for raw, tokenized in zip(rows.raw, rows.tokenized, strict=True):
        text = rows.tokenizer.decode(trained_tokens(tokenized))
        assert text == raw["completion"][0]["content"] + "<|im_end|>"
        # Nothing follows the stop token, which others would train too.
        assert tokenized["response_mask"][-1] == 1


def test_everyone_gets_the_same_weights_with_and_without_an_adapter() -> None:
    rows = make_rows(SETUP, 2)
    for lora in (False, True):
        setup = Setup("tiny", None, 4, 1, 1, "float32", 2, lora=lora)
        one, other = (make_model(setup, rows.tokenizer).state_dict() for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_is_on_every_linear_layer_but_the_head() -> None:
    rows = make_rows(SETUP, 2)
    model = make_model(Setup("tiny", None, 4, 1, 1, "float32", 2, lora=True), rows.tokenizer)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted == {*attention, "gate_proj", "up_proj", "down_proj"}
    assert {weight.shape[0] for name, weight in model.named_parameters() if "lora_A" in name} == {
        16
    }


def test_llama_has_the_published_number_of_weights() -> None:
    rows = make_rows(SETUP, 2)
    with torch.device("meta"):
        model = make_model(Setup("llama-3.2-1b", None, 1, 1, 1, "bf16", 2), rows.tokenizer)
    assert model.config.model_type == "llama"
    assert sum(weight.numel() for weight in model.parameters()) == 1_235_814_400
    names = {"tiny", "small", "smollm2-135m", "qwen3-0.6b", "qwen3-8b", "llama-3.2-1b"}
    assert set(SHAPES) == names


def test_padding_is_what_the_longest_row_of_each_batch_adds() -> None:
    assert padding_share([5, 5, 2, 2], batch_size=2) == 0
    assert padding_share([4, 1, 3], batch_size=2) == 3 / 11
    assert doctest.testmod(workload).failed == 0
    title = describe(SETUP, [4, 2, 1, 1, 2, 2, 2, 2])
    assert title.startswith("1 x 4 rows (made up at 3:1, 1 per prompt, 33% padding), tiny, ")
