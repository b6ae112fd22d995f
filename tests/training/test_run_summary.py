"""The summary before a run: what will be trained, on what, where and how."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from run_examples import LEDGER, with_lora
from transformers import TrainerState

from hf_sft_plugin import Ledger, MaskedSFTConfig
from hf_sft_plugin.training.run_summary import print_summary, summarize_run

Make = Callable[..., MaskedSFTConfig]
STATE = TrainerState(max_steps=1234, num_train_epochs=3)
# Embedding; per layer attention with the norms of queries and keys, MLP, norms; last norm.
NUM_PARAMETERS = 300 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 8 + 3 * 32 * 48 + 2 * 32) + 32


def render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_has_the_figures_of_the_run(model: Any, make_config: Make) -> None:
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
    args = make_config(**settings, max_steps=-1, num_train_epochs=3)
    lines = [
        line.strip() for line in render(summarize_run(args, STATE, model, LEDGER)).splitlines()
    ]
    assert lines == [
        "About to train",
        f"model   Qwen3ForCausalLM: {NUM_PARAMETERS:,} parameters, all trained",
        *[
            f"{'data    ' if n == 0 else ''}{line.strip()}"
            for n, line in enumerate(str(LEDGER).splitlines())
        ],
        "steps   1,234 of 15 rows (3 per batch x 5 accumulated x 1 processes), 3 epochs",
        f"device  cpu with {torch.get_num_threads()} threads, weights float32, mixed precision no",
        f"output  {args.output_dir}",
    ]


def test_the_summary_tells_how_much_an_adapter_trains(model: Any, make_config: Make) -> None:
    text = render(summarize_run(make_config(), STATE, with_lora(model), None))
    num_trained = 2 * 4 * (32 + 32 + 48 + 32)
    assert (
        f"Qwen3ForCausalLM with an adapter: {NUM_PARAMETERS + num_trained:,} parameters, "
        f"{num_trained:,} of them trained" in text
    )


def test_names_from_data_cannot_act_on_the_terminal(model: Any, make_config: Make) -> None:
    ledger = Ledger(num_rows=1, columns="text: [/x]\x1b[2J", unused_columns=["\u202e"])
    args = make_config(output_dir="[/b]\x07")
    text = render(summarize_run(args, STATE, model, ledger, {"head": "\x9b[/c]"}))
    for shown in ("text: [/x]\u241b[2J", "not used: <U+202E>", "[/b]\u2407", "<U+009B>[/c]"):
        assert shown in text
    assert not set(text) & set("\x1b\x07\x9b\u202e")


def test_the_summary_says_what_spares_time(model: Any, make_config: Make) -> None:
    speed = {"attention": "padded, because of [this]"}
    text = render(summarize_run(make_config(), STATE, model, None, speed))
    assert "attention  padded, because of [this]" in text


def test_the_summary_tells_the_precision(model: Any, make_config: Make) -> None:
    text = render(summarize_run(make_config(bf16=True), STATE, model.bfloat16(), None))
    assert "weights bfloat16, mixed precision bf16" in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_train_epochs": 0.5, "max_steps": -1}, "1 processes), 0.5 epochs"),
        ({"max_steps": 1234}, "1 processes)"),
    ],
)
def test_epochs_are_those_asked_for_and_none_where_steps_are(
    settings: dict[str, Any], expected: str, model: Any, make_config: Make
) -> None:
    # The Trainer rounds up, and for a stream puts in the largest integer.
    state = TrainerState(max_steps=1234, num_train_epochs=1)
    (line,) = [
        line.strip()
        for line in render(summarize_run(make_config(**settings), state, model, None)).splitlines()
        if "steps" in line
    ]
    assert line.endswith(expected)


@pytest.mark.parametrize("name", ["x[/b]", "x[red]", "x[lr=1]", "x:smile:"])
def test_no_name_is_taken_for_markup(name: str, model: Any, make_config: Make) -> None:
    text = render(summarize_run(make_config(output_dir=name), STATE, model, None))
    assert f"output  {name}" in text


def test_it_is_printed_with_what_a_batch_is_made_of(
    model: Any, make_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(make_config(per_device_train_batch_size=2), STATE, model, None, {}, "packed rows")
    assert "1,234 of 2 packed rows" in capsys.readouterr().out
