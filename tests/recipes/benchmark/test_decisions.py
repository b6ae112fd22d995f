"""What auto decides is shown for each precision, beside the memory that was said and measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import decisions
import pytest
from decisions import Decision, decisions_result, make_rows, measure_decisions
from turns import ContestantEnded, take_turns
from workload import Setup

SETUP = Setup("", None, 4, 1, 1, "", 1)
SAID = {
    "attention": "per-document SDPA, no padding, shared prompts once",
    "head": "3 products over response rows",
    "layers": "61 norms, 30 gated MLPs, rotary embeddings, each as one function",
    "last layer": "at trained positions",
    "memory": "a lot",
}


def test_every_case_is_a_row(cells_of: Any) -> None:
    measured: decisions.Measured = {
        ("float32", "full"): Decision(SAID, 3e9, 4 * 10**9, [3.0, 1.0, 2.0]),
        ("float32", "LoRA"): Decision({"attention": "padded, because"}, None, 2 * 10**9, [1.0]),
        ("float16 weights", "full"): None,
    }
    result = decisions_result(SETUP, "models/known", measured)
    shared = ["no padding, shared prompts once", "3 products", "trained only"]
    assert [cells for cells in cells_of(result.table) if "weights" not in cells] == [
        [
            "float32",
            "full",
            *shared,
            "61 norms, 30 gated MLPs, rotary",
            "3.00",
            "4.00",
            "0.75",
            "2.0",
        ],
        ["float32", "LoRA", "padded, because", "", "", "", "-", "2.00", "-", "1.0"],
        ["float16 weights", "full", "ended before its end", *[""] * 7],
    ]
    assert result.ratios == {"float32, full": [0.75]}
    assert "known, 4 rows made up" in str(result.table.title)


def test_a_case_that_ends_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_turns(names: list[str], count: int, task: Any, setup: Setup, model: str) -> Any:
        if setup.lora:
            raise ContestantEnded(names[0], 1)
        return {names[0]: [(names[0], setup.precision, model)]}

    monkeypatch.setattr(decisions, "take_turns", take_turns)
    measured: Any = measure_decisions(SETUP, "folder", ["float32", "bf16 weights"])
    assert measured == {
        ("float32", "full"): ("float32, full", "float32", "folder"),
        ("float32", "LoRA"): None,
        ("bf16 weights", "full"): ("bf16 weights, full", "bf16 weights", "folder"),
        ("bf16 weights", "LoRA"): None,
    }


def test_rows_are_chats_where_there_is_a_template() -> None:
    assert make_rows(SETUP, has_template=True).column_names == ["messages"]
    plain = make_rows(SETUP, has_template=False)
    assert (plain.column_names, len(plain)) == (["prompt", "response"], 4)


def check(setup: Setup, folder: Path) -> Decision:
    """One case in a process of its own, whose memory is what was said within a quarter."""
    found: Decision = take_turns(["case"], 1, decisions.take_part, setup, str(folder))["case"][0]
    assert {"attention", "head", "layers", "memory"} <= found.lines.keys()
    assert len(found.wall) == 1
    assert found.estimate == pytest.approx(found.peak, rel=0.25)
    return found


@pytest.fixture
def short_rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    answer = "the answer to this question "
    rows = [{"question": f"{number} what is this", "answer": answer * 10} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("forked_contestants")
def test_a_small_model_is_shown(
    model_factory: Callable[..., Any], tokenizer: Any, short_rows: str, tmp_path: Path
) -> None:
    model_factory().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = check(replace(SETUP, rows=short_rows, precision="bf16 autocast"), tmp_path)
    assert found.lines["head"] == "3 products over response rows"


@pytest.mark.trained
@pytest.mark.usefixtures("forked_contestants")
def test_a_trained_model_is_shown(trained_model_path: str, short_rows: str) -> None:
    setup = replace(SETUP, rows=short_rows, precision="bf16 autocast", lora=True)
    found = check(setup, Path(trained_model_path))
    assert "61 norms, 30 gated MLPs" in found.lines["layers"]
