"""In the terminal trained text stands out with and without colour, and data cannot act."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from hf_sft_plugin.preview.preview import TokenizationSetup
from hf_sft_plugin.preview.terminal import (
    PreviewArguments,
    make_tokenization_setup,
    show_preview,
)
from hf_sft_plugin.types import DataOptions


def chat(prompt: str, response: str, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"messages": messages, **columns}


def show(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    against: DataOptions | None = None,
    colour: bool = False,
    options: DataOptions | None = None,
    **arguments: Any,
) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=colour, color_system="standard" if colour else None
    )
    show_preview(
        rows,
        TokenizationSetup(tokenizer, options or DataOptions()),
        PreviewArguments(**arguments),
        against=None if against is None else TokenizationSetup(tokenizer, against),
        console=console,
    )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_colour_trained_text_stands_in_brackets(tokenizer: PreTrainedTokenizerFast) -> None:
    printed = show([chat("hello", "world", source="web")], tokenizer)
    assert "Row 0 (web): " in printed
    assert "hello<|im_end|>\u21b5\n" in printed
    assert "\u27e6world<|im_end|>\u27e7\u21b5\n" in printed
    assert "  message 1, exact: begins where inference begins to generate, ends with its" in printed


def test_remarks_stand_below_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    printed = show([chat("hello <|im_end|>", "world")], tokenizer)
    notes = [line for line in printed.splitlines() if line.startswith("  ")]
    assert notes[-1] == "  note: control tokens in the contents: <|im_end|> (1)"
    assert "note:" not in show([chat("hello", "world")], tokenizer)


def test_with_colour_trained_text_is_green_and_context_dim(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    printed = show([chat("hello", "world")], tokenizer, colour=True)
    assert "\x1b[4;32mworld<|im_end|>\x1b[0m" in printed
    assert "\x1b[2m<|im_start|>user" in printed
    assert "\u27e6" not in printed


def test_no_color_brings_the_brackets_back(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rich holds on to the environment of its import, which datasets replaces after num_proc.
    monkeypatch.setattr(Console, "_environ", {"NO_COLOR": "1"})
    assert "\u27e6" in show([chat("hello", "world")], tokenizer, colour=True)


def test_neither_escapes_nor_markup_of_the_data_reach_the_terminal(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "\x1b]0;owned\x07 [bold]x[/bold] [/] :smile: \x9b31m \u202e"
    printed = show([chat(text, text, source=text)], tokenizer)
    assert not set(printed) & set("\x1b\x07\x9b\u202e")
    assert (
        printed.count("\u241b]0;owned\u2407 [bold]x[/bold] [/] :smile: <U+009B>31m <U+202E>") == 3
    )


def test_ids_follow_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    printed = show([chat("hello", "\U0001f600")], tokenizer, ids=True)
    ids = " ".join(map(str, tokenizer("\U0001f600")["input_ids"]))
    assert f"\U0001f600[{ids}]<|im_end|>[2]" in printed


def test_lost_tokens_and_rows_set_aside_are_told(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [chat("hello", "the answer " * 9), chat("hello", "")]
    printed = show(rows, tokenizer, options=DataOptions(max_length=30))
    assert " lost to truncation" in printed
    assert "cut off before its stop token" in printed
    assert "Row 1: set aside, empty response" in printed
    assert '"content": ""' in printed


def test_nothing_found_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "No row of the dataset is like that." in show(
        [chat("hello", "world")], tokenizer, containing="nowhere"
    )


def test_the_difference_to_other_settings_is_printed(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [chat("hello", "hi"), chat("hello", "this is the answer to the question")]
    printed = show(rows, tokenizer, against=DataOptions(max_length=25))
    assert "1 of 2 rows differ" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("- \u2026")]
    assert line.endswith("<|im_end|>\u27e7\u21b5")


def test_the_page_gets_more_rows_than_the_terminal(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    page = tmp_path / "new" / "page.html"
    printed = show([chat("hello", str(n)) for n in range(9)], tokenizer, html=str(page))
    assert printed.count("Row ") == 5
    assert f"9 rows are in {page}" in printed
    assert page.read_text(encoding="utf-8").count("<article") == 9


def test_a_number_of_rows_that_shows_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows is 0; it counts from 1"):
        PreviewArguments(num_rows=0)


def test_the_model_gives_stop_tokens_and_the_longest_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = Qwen3Config(max_position_embeddings=64, eos_token_id=1)
    setup = make_tokenization_setup(tokenizer, DataOptions(), config)
    assert setup.options.max_length == 64
    assert setup.stops == {1, 2}
    config.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[0, 2]).save_pretrained(tmp_path)
    setup = make_tokenization_setup(tokenizer, DataOptions(max_length=100), str(tmp_path))
    assert setup.options.max_length == 100
    assert setup.stops == {0, 2}


@pytest.mark.parametrize("given", [True, False])
def test_without_a_model_the_tokenizer_decides(
    given: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    setup = make_tokenization_setup(tokenizer, DataOptions(), str(tmp_path) if given else None)
    assert setup.options.max_length is None
    assert setup.stops == {2}
