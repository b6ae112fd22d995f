"""Rows in files become shards in a folder: what the commands that prepare files share."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import yaml
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, HfArgumentParser

from hf_sft_plugin.preparation.prepare import name_in_errors, prepare_dataset
from hf_sft_plugin.rows.files import read_chat_template, read_splits
from hf_sft_plugin.shards.dataset import verify_shards
from hf_sft_plugin.shards.writer import check_shard_destination, write_shards
from hf_sft_plugin.types import DataOptions, visible, visible_lines

_DESCRIPTION = """Turns rows into token and mask files that are mapped into memory when they are
trained on, however large they are: ShardDataset(out_dir) is the dataset to give to a trainer.
Every row is tokenized, what is trained of it is marked and checked, and every row and token is
accounted for.
"""
_EXAMPLES = """examples:
  %(prog)s --input_files chat.jsonl --out_dir data/chat_sft \\
      --format chat --mask_role assistant --tokenizer_name_or_path Qwen/Qwen3-0.6B \\
      --val_share 0.05 --max_length 4096
  %(prog)s --verify data/chat_sft
"""


@dataclass
class PrepareArguments:
    """Where rows come from and where shards go."""

    _argument_group_name = "files"

    input_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rows as .json, .jsonl, .csv or .parquet, or folders of `datasets`, whose "
            "splits keep their names; several are joined."
        },
    )
    out_dir: str | None = field(default=None, metadata={"help": "Folder to write."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer of the model that will be trained."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "File with a chat template for the tokenizer."}
    )
    val_files: list[str] | None = field(
        default=None, metadata={"help": "Held-out rows, in any of the same forms."}
    )
    val_share: float = field(
        default=0.0,
        metadata={"help": "Share of the rows, 0 to 1, held out where there are no val_files."},
    )
    seed: int = field(default=0, metadata={"help": "Decides which rows are held out."})
    num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize. None: one."}
    )
    max_dropped_share: float = field(
        default=0.05,
        metadata={"help": "Largest share of rows, 0 to 1, that may be dropped before it stops."},
    )
    max_tokens_per_shard: int = field(
        default=2**28, metadata={"help": "Tokens of one file; 2^28 of them take 1 GiB."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replaces the shards that are in out_dir, in one step."}
    )
    verify: str | None = field(
        default=None,
        metadata={"help": "Checks every byte of a folder of shards instead, and writes nothing."},
    )


@dataclass
class RowOptions(DataOptions):
    """How rows become tokens: `DataOptions`, with shorter names for two of them."""

    _argument_group_name = "rows"

    data_format: Literal[
        "auto",
        "chat",
        "prompt_response",
        "messages",
        "sharegpt",
        "alpaca",
        "text",
        "segments",
        "tokenized",
    ] = field(  # type: ignore[assignment]  # "chat" becomes "messages"
        default="auto",
        metadata={
            "aliases": ["--format"],
            "help": "How rows are written; 'chat' is another name of 'messages'. auto: found from "
            "the column names.",
        },
    )
    train_roles: list[str] = field(
        default_factory=lambda: ["assistant"],
        metadata={
            "aliases": ["--mask_role", "--mask_roles"],
            "help": "Roles whose turns are trained.",
        },
    )

    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "metavar": "MAPPING",
            "help": "Variables for the chat template, e.g. '{enable_thinking: false}'.",
        },
    )

    def __post_init__(self) -> None:
        """Gives the values the form that the package knows."""
        if self.data_format == "chat":
            self.data_format = "messages"
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = yaml.safe_load(self.chat_template_kwargs)
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError("chat_template_kwargs must be a mapping like '{name: value}'.")
        super().__post_init__()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names each flag once, its short name first; a flag with hyphens is understood as well."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = sorted((n for n in action.option_strings if "-" not in n.lstrip("-")), key=len)
        values = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        return f"{', '.join(names)} {values}".rstrip()


def parse_prepare_arguments(
    argv: Sequence[str], prog: str | None = None
) -> tuple[PrepareArguments, RowOptions]:
    """Reads the flags of a command that prepares files.

    Args:
        argv: What follows the program's name.
        prog: How the command is started, for help and errors. None: the name of the program.

    Raises:
        SystemExit: With code 2 and one clear message, if a flag or a value is wrong.
    """
    parser = HfArgumentParser(
        cast(Any, (PrepareArguments, RowOptions)),
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s --input_files FILE ... --out_dir DIR --tokenizer_name_or_path NAME "
        "[--flag value ...]\n       %(prog)s --verify DIR",
    )
    try:
        files, options, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "See --help for all of them."
        parser.error(f"unknown argument '{unknown[0]}'. {hint}")
    needed = ("input_files", "out_dir", "tokenizer_name_or_path")
    missing = [f"--{name}" for name in needed if getattr(files, name) is None]
    if missing and files.verify is None:
        parser.error(f"{' and '.join(missing)} must be given.")
    if files.val_files and files.val_share:
        parser.error("--val_files and --val_share both say what is held out; give one of them.")
    if not 0 <= files.val_share < 1:
        parser.error(f"--val_share is {files.val_share}, but a share is from 0 to below 1.")
    return files, options


def prepare_files(files: PrepareArguments, options: DataOptions) -> None:
    """Turns the rows of files into shards and prints what became of them, or checks shards.

    Args:
        files: Which files, and where to.
        options: How their rows become tokens.

    Raises:
        ValueError: If files, rows, tokenizer and options do not fit each other, or shards that are
            to be checked are damaged.
    """
    if files.verify is not None:
        print(visible_lines(f"{verify_shards(files.verify)}\nEvery file is as it was written."))
        return
    assert files.out_dir is not None, "the arguments were parsed"
    check_shard_destination(files.out_dir, overwrite=files.overwrite)
    rows = _read_all(files)
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer_name_or_path)
    if files.chat_template_path is not None:
        tokenizer.chat_template = read_chat_template(files.chat_template_path)
    splits, ledgers = {}, {}
    for name, part in rows.items():
        with name_in_errors(name):
            splits[name], ledgers[name] = prepare_dataset(
                part,
                tokenizer,
                max_dropped_share=files.max_dropped_share,
                num_proc=files.num_proc,
                **dataclasses.asdict(options),
            )
        print(f"--- {visible(name)}\n{ledgers[name]}")
    written = write_shards(
        files.out_dir,
        splits,
        tokenizer,
        ledgers=ledgers,
        max_tokens_per_shard=files.max_tokens_per_shard,
        overwrite=files.overwrite,
    )
    print(f"--- written\n{visible_lines(str(written))}")


def _read_all(files: PrepareArguments) -> dict[str, Dataset]:
    """The raw rows by split: those of the folders, `train`, and `val` where any are held out."""
    assert files.input_files is not None, "the arguments were parsed"
    splits = _read_joined(files.input_files)
    if not files.val_files and not files.val_share:
        return splits
    if "val" in splits or "train" not in splits:
        raise ValueError(
            f"The input files have the splits {', '.join(splits)}, to which val_files and "
            "val_share cannot add a split 'val' beside 'train'. Leave them out: every split that "
            "there is gets shards of its own."
        )
    if files.val_share:
        parts = splits["train"].train_test_split(test_size=files.val_share, seed=files.seed)
        return {**splits, "train": parts["train"], "val": parts["test"]}
    held_out = _read_joined(files.val_files or ())
    if len(held_out) > 1:
        raise ValueError(
            f"The val_files have the splits {', '.join(held_out)}, but they are one set of "
            "held-out rows. Save the split that you mean alone, or name the folder in input_files, "
            "where every split keeps its name."
        )
    return {**splits, "val": held_out["train"]}


def _read_joined(paths: Sequence[str]) -> dict[str, Dataset]:
    """The rows of several files or folders, one after the other, by split."""
    found: dict[str, list[tuple[str, Dataset]]] = {}
    for path in paths:
        for name, part in read_splits(path).items():
            path_of_first, first = found.setdefault(name, [(path, part)])[0]
            if set(part.column_names) != set(first.column_names):
                raise ValueError(
                    f"'{path}' has the columns {', '.join(sorted(part.column_names))}, but "
                    f"'{path_of_first}' has {', '.join(sorted(first.column_names))}. Files that "
                    "are joined have the same columns."
                )
            if part is not first:
                found[name].append((path, part))
    return {name: concatenate_datasets([p for _, p in parts]) for name, parts in found.items()}
