"""The recipe shows what sft.py would train with the same settings, without a model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import preview
import pytest
from transformers import PreTrainedTokenizerFast

ROWS = [
    {"prompt": "hello", "response": "world", "source": "a"},
    {"prompt": "what is the question", "response": "this is the answer", "source": "b"},
    {"prompt": "again", "response": "", "source": "b"},
]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., str]:
    """Runs the recipe in a folder with rows and a tokenizer, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run_recipe(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["preview.py", *argv])
        preview.main()
        return capsys.readouterr().out

    return run_recipe


FLAGS = ("--tokenizer_name_or_path", "tokenizer", "--train_file", "rows.jsonl")


def test_without_arguments_it_shows_rows_of_the_quickstart(run: Callable[..., str]) -> None:
    printed = run()
    assert printed.count("Row ") == 5
    assert "Row 0 (repeat): " in printed
    assert "message 1, exact: begins where inference begins to generate" in printed


def test_it_shows_rows_of_a_file_as_they_would_be_trained(run: Callable[..., str]) -> None:
    printed = run(*FLAGS, "--num_rows", "1")
    assert printed.startswith("Row 0 (a): ")
    assert "hello\u27e6world<|im_end|>\u27e7\n" in printed


def test_options_of_the_data_are_those_of_training(run: Callable[..., str]) -> None:
    printed = run(*FLAGS, "--num_rows", "1", "--prompt_format", "chat")
    assert "<|im_start|>assistant\u21b5\n\u27e6world<|im_end|>\u27e7\u21b5\n" in printed


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        (("--only", "longest", "--num_rows", "1"), ["1"]),
        (("--only", "set_aside"), ["2"]),
        (("--only", "truncated", "--max_length", "12"), ["1"]),
        (("--source", "b"), ["1", "2"]),
        (("--containing", "world"), ["0"]),
        (("--max_train_rows", "1"), ["0"]),
    ],
)
def test_the_rows_asked_for_are_shown(
    flags: tuple[str, ...], rows: list[str], run: Callable[..., str]
) -> None:
    lines = [line for line in run(*FLAGS, *flags).splitlines() if line.startswith("Row ")]
    assert [line.split()[1] for line in lines] == rows


def test_a_settings_file_for_training_works_as_it_is(
    run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nlearning_rate: 3e-4\nlora: true\nfused_head: 'off'\n"
        "tokenizer_name_or_path: tokenizer\ntrain_file: rows.jsonl\nprompt_format: chat\n"
        "lr_scheduler_kwargs: {a: 1}\neval_share: 0.0\n"
    )
    printed = run("run.yaml", "--num_rows", "1", "--ids", "--html", "page.html")
    assert "<|im_end|>[2]" in printed
    assert "1 rows are in page.html" in printed
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("tokenizer_line", ["", "tokenizer_name_or_path: tokenizer\n"])
def test_other_settings_are_compared(
    tokenizer_line: str, run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "other.yaml").write_text("max_length: 12\n" + tokenizer_line)
    printed = run(*FLAGS, "--against", "other.yaml")
    assert "1 of 3 rows differ" in printed
    assert "<|im_end|>\u27e7" in printed.split("rows differ")[1]


def test_another_chat_template_is_compared(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] != 'user' %}!"
        "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "other.yaml").write_text(
        "chat_template_path: template.jinja\nprompt_format: chat\n"
    )
    printed = run(*FLAGS, "--prompt_format", "chat", "--against", "other.yaml")
    assert "2 of 3 rows differ" in printed
    assert "\u27e6!\u27e7<|im_end|>" in printed


def test_the_help_explains_itself_and_leaves_out_what_only_training_needs(
    run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for part in (
        "before anything is",
        "--containing",
        "--max_length",
        "--train_file",
        "--against",
        "--chat_template_path",
    ):
        assert part in printed
    for part in ("--learning_rate", "--lora", "--eval_file", "SUPPRESS"):
        assert part not in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--containin", "x"), "Did you mean '--containing'?"),
        (("--num_rows", "0"), "num_rows is 0; it counts from 1."),
        (("--only", "short"), "invalid choice: 'short'"),
    ],
)
def test_a_wrong_flag_is_an_error_that_says_what_is_possible(
    argv: tuple[str, ...],
    message: str,
    run: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--train_file", "rows.jsonl"), "preview.py: Name the model"),
        (("--train_file", "nowhere.jsonl"), "preview.py: There is no 'nowhere.jsonl'"),
        ((*FLAGS, "--prompt_column", "q"), "preview.py: "),
        ((*FLAGS, "--chat_template_path", "no.jinja"), "'no.jinja', but there is no such file"),
    ],
)
def test_what_does_not_fit_is_said_in_one_message(
    argv: tuple[str, ...], message: str, run: Callable[..., str]
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(*argv)
