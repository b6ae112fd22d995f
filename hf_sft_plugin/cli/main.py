"""The command `hf-sft`: what of the recipes is wanted where only the wheel is installed."""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from hf_sft_plugin.cli.prepare_files import parse_prepare_arguments, prepare_files
from hf_sft_plugin.preview.preview import TokenizationSetup
from hf_sft_plugin.preview.terminal import (
    PreviewArguments,
    make_tokenization_setup,
    show_preview,
)
from hf_sft_plugin.reporting.report import REPORT_FOLDER, write_report
from hf_sft_plugin.reporting.run_log import METRICS_FILE
from hf_sft_plugin.rows.files import is_shard_set, read_chat_template, read_rows
from hf_sft_plugin.shards.dataset import ShardDataset, verify_shards
from hf_sft_plugin.types import DataOptions, visible, visible_lines


@dataclass
class RowArguments:
    """Which rows, and which tokenizer."""

    _argument_group_name = "rows and tokenizer"

    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Tokenizer or model: a name on the Hub, or a folder. Required."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows as .json, .jsonl, .csv or .parquet, or a folder of `datasets`. Required."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split of a folder."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "File with a chat template for the tokenizer."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one of the commands.

    Args:
        argv: What follows the program's name. None: the arguments of this process.

    Raises:
        SystemExit: With code 2 and one clear message, if an argument is wrong; with a message, if
            the data is.
    """
    parser = argparse.ArgumentParser(
        prog="hf-sft", description="Response-masked supervised fine-tuning, seen from outside."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (help_text, _) in _COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given[:1])
    try:
        _COMMANDS[arguments.command][1](given[1:])
    except (OSError, ValueError) as error:
        # Whatever is wrong with settings or data is said there; a traceback would only hide it.
        message = visible_lines(f"hf-sft {arguments.command}: {error}")
        raise SystemExit(message) from None


def preview(argv: Sequence[str]) -> None:
    """Shows which tokens of each row would be trained, and why.

    Raises:
        ValueError: If settings and data do not fit each other.
    """
    parser = HfArgumentParser(
        cast(Any, (RowArguments, DataOptions, PreviewArguments)),
        prog="hf-sft preview",
        description="Shows which tokens of each row would be trained, and why, before anything is "
        "paid for.",
        usage="%(prog)s --tokenizer NAME --train_file FILE [--flag value ...]",
        allow_abbrev=False,
    )
    try:
        row_args, options, arguments, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument '{unknown[0]}'.{_nearest(unknown[0], flags)}")
    if row_args.tokenizer is None or row_args.train_file is None:
        parser.error("name a tokenizer with --tokenizer and rows with --train_file.")
    setup = _load_setup(row_args, options)
    against = None
    if arguments.against is not None:
        against = _load_setup(*_read_settings(Path(arguments.against), row_args))
    path, split = row_args.train_file, row_args.train_split
    rows = ShardDataset(path, split) if is_shard_set(path) else read_rows(path, split)
    show_preview(rows, setup, arguments, against=against)


def prepare(argv: Sequence[str]) -> None:
    """Turns rows into token and mask files.

    Raises:
        ValueError: If files, rows, tokenizer and options do not fit each other.
    """
    prepare_files(*parse_prepare_arguments(argv, prog="hf-sft prepare"))


def verify(argv: Sequence[str]) -> None:
    """Checks a folder of shards: sizes, checksums, masks and token ids.

    Raises:
        ValueError: If anything in it is not as it was written.
    """
    parser = argparse.ArgumentParser(
        prog="hf-sft verify-shards",
        description="Checks every file of a folder of shards, and prints what they hold.",
    )
    parser.add_argument("folder", help="folder that hf-sft prepare wrote")
    print(visible_lines(str(verify_shards(parser.parse_args(list(argv)).folder))))


def report(argv: Sequence[str]) -> None:
    """Draws the report of a run anew from its log.

    Raises:
        ValueError: If the folder holds no log.
    """
    parser = argparse.ArgumentParser(
        prog="hf-sft report", description=f"Draws {REPORT_FOLDER}/ anew from {METRICS_FILE}."
    )
    parser.add_argument("folder", type=Path, help="Folder of the run, its output_dir.")
    folder = parser.parse_args(argv).folder
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(f"There is no {METRICS_FILE} in '{folder}', so it is no folder of a run.")
    for path in write_report(folder):
        print(visible(str(path)))


def _load_setup(row_args: RowArguments, options: DataOptions) -> TokenizationSetup:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(row_args.tokenizer)
    if row_args.chat_template_path is not None:
        tokenizer.chat_template = read_chat_template(row_args.chat_template_path)
    return make_tokenization_setup(tokenizer, options, row_args.tokenizer)


def _read_settings(path: Path, row_args: RowArguments) -> tuple[RowArguments, DataOptions]:
    """The settings of a YAML file; the tokenizer is the same where it names none."""
    if not path.is_file():
        raise ValueError(f"There is no settings file '{path}'.")
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; settings are 'name: value'.")
    names = {type_: [f.name for f in fields(type_)] for type_ in (RowArguments, DataOptions)}
    known = [*names[RowArguments], *names[DataOptions]]
    for key in settings:
        if key not in known:
            raise ValueError(f"{path}: unknown key '{key}'.{_nearest(str(key), known)}")
    defaults = {"tokenizer": row_args.tokenizer}
    chosen = {
        type_: {name: settings[name] for name in names[type_] if name in settings}
        for type_ in names
    }
    rows = RowArguments(**{**defaults, **chosen[RowArguments]})
    return rows, DataOptions(**chosen[DataOptions])


def _nearest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name.split("=")[0], names, n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else " See --help for all of them."


_COMMANDS: Mapping[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "preview": ("show which tokens of each row would be trained, and why", preview),
    "prepare": ("turn rows into token and mask files", prepare),
    "verify-shards": ("check every file of a folder of shards", verify),
    "report": ("draw the report of a run anew from its log", report),
}


if __name__ == "__main__":
    main()
