"""The flags of the commands that prepare files, and the rows that they name."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_sft_plugin.cli.prepare_files import (
    PrepareArguments,
    parse_prepare_arguments,
    prepare_files,
)
from hf_sft_plugin.shards.dataset import ShardDataset
from hf_sft_plugin.types import DataOptions

COMMON = ("--out_dir", "data/set", "--tokenizer_name_or_path", "tok")


def test_short_names_stand_for_options_of_the_package() -> None:
    argv = ["--input_files", "a", "--out_dir", "b", "--tokenizer_name_or_path", "c"]
    _, options = parse_prepare_arguments(
        [
            *(*argv, "--format", "chat", "--mask_role", "assistant", "tool", "--overflow", "drop"),
            *("--chat_template_kwargs", "{enable_thinking: false}"),
        ]
    )
    assert options.data_format == "messages"
    assert options.train_roles == ["assistant", "tool"]
    assert options.overflow == "drop"
    assert options.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--input_file", "a"), "unknown argument '--input_file'. Did you mean '--input_files'?"),
        (("--mask_rolle=a",), "unknown argument '--mask_rolle=a'. Did you mean '--mask_role'?"),
        (("--qqqqqq",), "unknown argument '--qqqqqq'. See --help for all of them."),
        (("--out_dir", "x"), "--input_files and --tokenizer_name_or_path must be given."),
        ((*COMMON, "--input_files", "a", "--format", "chta"), "invalid choice: 'chta'"),
        ((*COMMON, "--input_files", "a", "--max_length", "1"), "max_length is 1, but a row needs"),
        ((*COMMON, "--input_files", "a", "--val_share", "1"), "--val_share is 1.0, but a share"),
        (
            (*COMMON, "--input_files", "a", "--val_share", "0.1", "--val_files", "b"),
            "--val_files and --val_share both say what is held out",
        ),
        (
            (*COMMON, "--input_files", "a", "--chat_template_kwargs", "[1]"),
            "chat_template_kwargs must be a mapping",
        ),
    ],
)
def test_a_wrong_flag_ends_in_one_clear_message(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_prepare_arguments(argv)
    assert message in capsys.readouterr().err


def test_the_help_shows_an_example_and_each_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_prepare_arguments(["--help"])
    text = capsys.readouterr().out
    assert "--verify data/chat_sft" in text
    assert text.count("--max_tokens_per_shard") == 1
    assert "--max-tokens-per-shard" not in text


def test_files_are_prepared_from_python_as_well(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "response": str(number)} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save_pretrained(tmp_path / "tok")
    arguments = PrepareArguments(
        input_files=[str(tmp_path / "rows.jsonl")],
        out_dir=str(tmp_path / "set"),
        tokenizer_name_or_path=str(tmp_path / "tok"),
        val_share=0.25,
    )
    prepare_files(arguments, DataOptions())
    assert [len(ShardDataset(tmp_path / "set", split)) for split in ("train", "val")] == [3, 1]
    assert "--- val\nrows    1 in = 1 trained" in capsys.readouterr().out
