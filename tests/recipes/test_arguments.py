"""Settings come from a file and from flags, and a wrong name is never ignored."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arguments
import pytest


@dataclass
class Shape:
    """A stand-in for the settings of a recipe."""

    train_file: str | None = field(default=None, metadata={"help": "Where the rows are."})
    dataset_name: str | None = field(default=None, metadata={"help": "Whose rows."})
    learning_rate: float = field(default=1.0, metadata={"help": "How fast."})
    num_rows: int = field(default=1, metadata={"help": "How many."})
    lora: bool = field(default=False, metadata={"help": "Whether to."})
    lora_r: int = field(default=1, metadata={"help": "Its rank."})
    local_rank: int = field(default=1, metadata={"help": "Of the process."})
    eval_strategy: str = field(default="no", metadata={"help": "When."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Which."})
    model_config: dict[str, Any] | str | None = field(default=None, metadata={"help": "Of what."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Which."})


@pytest.fixture
def default_config(tmp_path: Path) -> Path:
    path = tmp_path / "default.yaml"
    path.write_text("num_rows: 7\n")
    return path


def parse(default_config: Path, *argv: str) -> Shape:
    (shape,) = arguments.parse_arguments((Shape,), argv, default_config, description="It runs.")
    assert isinstance(shape, Shape)
    return shape


def write(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_without_arguments_the_default_file_is_used(default_config: Path) -> None:
    assert parse(default_config).num_rows == 7


def test_flags_that_name_no_model_and_no_data_change_the_default(default_config: Path) -> None:
    assert parse(default_config, "--lora", "true") == Shape(num_rows=7, lora=True)


@pytest.mark.parametrize("flag", ["--train_file=x", "--train-file=x"])
def test_flags_that_name_data_leave_the_default_file_out(default_config: Path, flag: str) -> None:
    assert parse(default_config, flag) == Shape(train_file="x")


def test_a_flag_overrules_the_file(default_config: Path, tmp_path: Path) -> None:
    config = write(tmp_path, "num_rows: 3\nlora: true\n")
    assert parse(default_config, config, "--num_rows", "4") == Shape(num_rows=4, lora=True)


def test_values_of_every_kind_come_from_a_file(default_config: Path, tmp_path: Path) -> None:
    config = write(
        tmp_path,
        "learning_rate: 3e-4\ntrain_file: null\nmodel_config: {model_type: qwen3}\n"
        "names: [b, c]\nlora: yes\n",
    )
    assert parse(default_config, config) == Shape(
        learning_rate=3e-4, model_config={"model_type": "qwen3"}, names=["b", "c"], lora=True
    )


def test_a_file_may_ask_for_the_last_checkpoint(default_config: Path, tmp_path: Path) -> None:
    shape = parse(default_config, write(tmp_path, "resume_from_checkpoint: true\n"))
    assert str(shape.resume_from_checkpoint) == "True"


def test_the_settings_named_on_the_command_line_are_found_however_they_are_written() -> None:
    argv = ["a.yaml", "--lora-r=8", "--num_rows", "-1", "--lora"]
    assert arguments.named_flags(argv) == {"lora_r", "num_rows", "lora"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_row", "3"], "unknown argument '--num_row'. Did you mean '--num_rows'?"),
        (["--learning_rat=3"], "Did you mean '--learning_rate'?"),
        (["--lora_rank", "3"], "unknown argument '--lora_rank'. Did you mean '--lora_r'?"),
        (["--rows", "3"], "Did you mean '--num_rows'?"),
        (["--zzz"], "unknown argument '--zzz'. See --help for all of them."),
        (["--num_rows", "many"], "argument --num_rows"),
        (["nowhere.yaml"], "there is no settings file 'nowhere.yaml'"),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_the_nearest(
    argv: list[str], message: str, default_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(default_config, *argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_row: 3", "unknown key 'num_row'. Did you mean 'num_rows'?"),
        ("- 3", "holds a list; settings are 'name: value' lines"),
        ("a: [", "is not valid YAML"),
        ("num_rows: many", "num_rows"),
        ("eval_strategy: no", 'put quotes around them, such as eval_strategy: "no"'),
        ("num_rows: true", "num_rows is True, but it is not a yes-or-no setting"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_key(
    text: str,
    message: str,
    default_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(default_config, write(tmp_path, text))
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_shows_every_setting(
    default_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(default_config, "--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "It runs." in text
    for help_text in ("Where the rows are.", "How fast.", "--num_rows", "[config.yaml]"):
        assert help_text in text


def test_rows_named_by_flag_take_the_place_of_those_in_the_file(
    default_config: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, "dataset_name: theirs\nnum_rows: 3\n")
    found = parse(default_config, path, "--train_file", "mine.jsonl")
    assert (found.train_file, found.dataset_name, found.num_rows) == ("mine.jsonl", None, 3)
    assert parse(default_config, path).dataset_name == "theirs"
