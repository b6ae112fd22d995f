"""The command `hf-sft` previews rows and draws reports, and names what is wrong."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from hf_sft_plugin import write_shards
from hf_sft_plugin.cli.main import main

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": "hello", "response": "world"}, {"prompt": "what", "response": "the answer"}]


@pytest.fixture(autouse=True)
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with rows, a tokenizer and the log of a run, in which the command is started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return tmp_path


SHARDS = ("--tokenizer_name_or_path=tokenizer", "--out_dir=shards")
FLAGS = ("--tokenizer", "tokenizer", "--train_file", "rows.jsonl")


def test_the_module_can_be_started_by_its_name() -> None:
    command = [sys.executable, "-m", "hf_sft_plugin.cli.main", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: hf-sft" in done.stdout
    assert "preview" in done.stdout


def test_preview_shows_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    main(["preview", *FLAGS, "--num_rows", "1"])
    assert "hello\u27e6world<|im_end|>\u27e7\n" in capsys.readouterr().out


def test_preview_takes_options_of_the_data_and_a_template(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    main(["preview", *FLAGS, "--chat_template_path=template.jinja", "--prompt_format=chat"])
    assert "hello<|im_end|>\u27e6world<|im_end|>\u27e7\n" in capsys.readouterr().out


def test_preview_compares_with_a_settings_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other.yaml").write_text("overflow: drop\nmax_length: 7\n")
    main(["preview", *FLAGS, "--against", "other.yaml"])
    assert "1 of 2 rows differ" in capsys.readouterr().out


def test_preview_reads_a_saved_dataset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_file = (*FLAGS[:2], "--train_file", str(folder / "saved"))
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(folder / "saved")
    main(["preview", *from_file])
    assert "Row 1" in capsys.readouterr().out


def test_rows_are_prepared_as_the_recipe_does(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["prepare", "--input_files", "rows.jsonl", *SHARDS])
    printed = capsys.readouterr().out
    assert "--- train\nrows    2 in = 2 trained" in printed
    metadata = (folder / "shards" / "dataset_metadata.json").read_text()
    recipe = str(ROOT / "recipes" / "prepare_dataset.py")
    argv = [recipe, "--input_files", "rows.jsonl", *SHARDS, "--overwrite"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(recipe, run_name="__main__")
    assert capsys.readouterr().out == printed
    assert (folder / "shards" / "dataset_metadata.json").read_text() == metadata
    main(["prepare", "--verify", "shards"])
    assert "Every file is as it was written." in capsys.readouterr().out
    main(["preview", *FLAGS[:2], "--train_file", "shards"])
    assert "given: the row came tokenized, with this mask" in capsys.readouterr().out


def test_report_draws_the_curves_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "run"])
    assert "loss.png" in capsys.readouterr().out
    assert (folder / "run" / "report" / "loss.png").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: command"),
        (("previw",), "invalid choice: 'previw'"),
        (("preview",), "name a tokenizer with --tokenizer and rows with --train_file"),
        (("preview", *FLAGS, "--max_lenght=3"), "Did you mean '--max_length'?"),
        (("preview", *FLAGS, "--num_rows=0"), "num_rows is 0"),
        (("preview", *FLAGS, "--max_length=1"), "max_length is 1"),
        (("report",), "required: folder"),
        (("prepare", *SHARDS), "--input_files must be given"),
        (("prepare", "--input_file=a"), "hf-sft prepare: error: unknown argument '--input_file=a'"),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_what_is_possible(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "settings", "message"),
    [
        (("report", "nowhere"), "", "hf-sft report: There is no metrics.jsonl in 'nowhere'"),
        (("preview", *FLAGS[:3], "rows.txt"), "", "There is no 'rows.txt' to read rows from"),
        (("preview", *FLAGS, "--train_split=b"), "", "train_split is 'b', but 'rows.jsonl' is a"),
        (("prepare", *SHARDS, "--input_files=no.csv"), "", "hf-sft prepare: There is no 'no.csv'"),
        (("preview", "--tokenizer=nowhere", *FLAGS[2:]), "", "hf-sft preview: "),
        (("preview", *FLAGS, "--against=no.yaml"), "", "There is no settings file 'no.yaml'"),
        (("preview", *FLAGS, "--against=o.yaml"), "max_lengt: 3", "Did you mean 'max_length'?"),
        (("preview", *FLAGS, "--against=o.yaml"), "- 3", "o.yaml holds a list"),
        (("preview", *FLAGS, "--prompt_column=q"), "", "hf-sft preview: "),
    ],
)
def test_what_does_not_fit_is_said_in_one_message(
    argv: tuple[str, ...], settings: str, message: str, folder: Path
) -> None:
    (folder / "o.yaml").write_text(settings)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert message in str(stop.value.code)


def test_shards_are_verified(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 2], "response_mask": [0, 0, 1, 1]}] * 3)
    write_shards(tmp_path / "shards", {"train": rows}, tokenizer)
    main(["verify-shards", str(tmp_path / "shards")])
    assert "12" in capsys.readouterr().out
    (tmp_path / "shards" / "train" / "shard_000.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"(?s)hf-sft verify-shards: .*shard_000\.bin"):
        main(["verify-shards", str(tmp_path / "shards")])


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "'broken.jsonl' holds no rows"), ('{"prompt": "a", "re\n', "line 1 is not JSON")],
)
def test_rows_that_cannot_be_read_are_said_in_one_message(content: str, reason: str) -> None:
    Path("broken.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=f"hf-sft preview: .*{reason}"):
        main(["preview", "--tokenizer", "tokenizer", "--train_file", "broken.jsonl"])
