"""Previewed rows in a terminal, and what the commands that preview share."""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from hf_sft_plugin.preview.diff import Diff, RowChange, diff_rows
from hf_sft_plugin.preview.page import write_preview_page
from hf_sft_plugin.preview.preview import (
    Only,
    PreviewedExample,
    PreviewedRow,
    Rows,
    TokenizationSetup,
    preview_rows,
)
from hf_sft_plugin.tokens.truncation import max_row_length
from hf_sft_plugin.types import DataOptions, visible

_NUM_SHOWN = 5
_NUM_SHOWN_IN_PAGE = 500
_NUM_CHANGES_PER_ROW = 12


@dataclass
class PreviewArguments:
    """Which rows are shown, and how."""

    _argument_group_name = "preview"

    num_rows: int | None = field(
        default=None,
        metadata={"help": "Rows to show. None: 5 in the terminal, 500 in the page of --html."},
    )
    only: Literal["all", "longest", "truncated", "set_aside", "split"] = field(
        default="all",
        metadata={
            "help": "Only the longest rows, those that lose tokens, those that cannot be trained, "
            "or those that become several examples."
        },
    )
    containing: str | None = field(
        default=None, metadata={"help": "Only rows in which this text stands."}
    )
    source: str | None = field(
        default=None, metadata={"help": "Only rows whose column 'source' says this."}
    )
    ids: bool = field(default=False, metadata={"help": "Shows the ids of the tokens."})
    html: str | None = field(
        default=None,
        metadata={"help": "Also writes the rows to this file: a page to search and to pass on."},
    )
    against: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with other settings: also shows of which rows they train different "
            "text. What it does not set has its default; where it names no tokenizer it is "
            "the same."
        },
    )

    def __post_init__(self) -> None:
        """Refuses values that show nothing."""
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"num_rows is {self.num_rows}; it counts from 1.")


def make_tokenization_setup(
    tokenizer: PreTrainedTokenizerBase, options: DataOptions, model: str | PreTrainedConfig | None
) -> TokenizationSetup:
    """What a run would tokenize with: stop tokens and longest row also come from the model.

    Args:
        tokenizer: See `TokenizationSetup`.
        options: See `TokenizationSetup`.
        model: Name or folder of the model, or its config; None where it is not known. A folder
            that holds only a tokenizer is fine.
    """
    config = _read(AutoConfig, model) if isinstance(model, str) else model
    generation = _read(GenerationConfig, model) if isinstance(model, str) else None
    stops = {tokenizer.eos_token_id}
    # A model without a file for generation stops where its config says.
    own = getattr(generation or config, "eos_token_id", None)
    stops |= set(own) if isinstance(own, list) else {own}
    text_config = None if config is None else config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    if options.max_length is None and longest is not None:
        limit = max_row_length(tokenizer, None)
        options = replace(options, max_length=min(longest, limit or longest))
    return TokenizationSetup(
        tokenizer, options, frozenset(stop for stop in stops if stop is not None)
    )


def _read(kind: Any, name: str) -> Any:
    """A config by the name of its model; None where there is no such file."""
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError):
        return None


def show_preview(
    dataset: Rows,
    setup: TokenizationSetup,
    arguments: PreviewArguments,
    *,
    against: TokenizationSetup | None = None,
    console: Console | None = None,
) -> None:
    """Shows rows in the terminal and, where it was asked for, in a page and against another setup.

    Args:
        dataset: See `preview_rows`.
        setup: What the rows would be trained with.
        arguments: Which rows, and how.
        against: What they are compared with; None without a comparison.
        console: Where to. None: standard output.

    Raises:
        ValueError: If columns, tokenizer or options do not fit each other.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character shows its escape instead of an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = console or Console(highlight=False)
    num_rows = arguments.num_rows or (_NUM_SHOWN_IN_PAGE if arguments.html else _NUM_SHOWN)
    only: Only | None = None if arguments.only == "all" else arguments.only
    rows = preview_rows(
        dataset,
        setup.tokenizer,
        num_rows=num_rows,
        only=only,
        containing=arguments.containing,
        source=arguments.source,
        stop_token_ids=setup.stop_token_ids,
        **{name: getattr(setup.options, name) for name in DataOptions.__dataclass_fields__},
    )
    diff = None
    if against is not None:
        diff = diff_rows(
            dataset,
            setup,
            against,
            num_rows=num_rows,
            containing=arguments.containing,
            source=arguments.source,
        )
    if not rows:
        console.print(Text("No row of the dataset is like that."))
    print_rows(rows[: arguments.num_rows or _NUM_SHOWN], console, show_ids=arguments.ids)
    if diff is not None:
        print_diff(diff, console, num_rows=arguments.num_rows or _NUM_SHOWN)
    if arguments.html:
        path = Path(arguments.html)
        write_preview_page(path, rows, diff=diff, show_ids=arguments.ids)
        where = f"{len(rows):,} rows are in {visible(str(path))}"
        console.print(Text(where, "bold"), soft_wrap=True)


def print_rows(rows: Sequence[PreviewedRow], console: Console, *, show_ids: bool = False) -> None:
    """Prints rows: trained text in colour (in brackets where there is none), context dim.

    Args:
        rows: The rows.
        console: Where to.
        show_ids: Whether the ids follow each piece of text.
    """
    for row in rows:
        source = f" ({visible(row.source)})" if row.source else ""
        heading = f"Row {row.row}{source}: "
        if row.error is not None:
            _print(console, Text(heading + "set aside, " + visible(row.error.reason), "bold red"))
            _print(console, Text(visible(row.error.problem)))
            _print(console, Text(visible(row.raw), "dim"))
        else:
            _print(console, Text(heading + describe_row(row), "bold"))
        for number, example in enumerate(row.examples, 1):
            if len(row.examples) > 1:
                _print(console, Text(f"Example {number} of {len(row.examples)}", "bold dim"))
            _print(console, _example_text(example, show_ids, _brackets(console)))
            for note in example.notes:
                tokens = f"({note.num_tokens:,} tokens)"
                _print(console, Text(f"  {note.reason} {tokens}", "cyan"))
        for remark in row.remarks:
            _print(console, Text(f"  note: {visible(remark)}", "yellow"))
        _print(console, Text())


def describe_row(row: PreviewedRow) -> str:
    """The tokens of a row in a few words."""
    split = f" in {len(row.examples)} examples" if len(row.examples) > 1 else ""
    lost = f", {row.num_lost:,} lost to truncation" if row.num_lost else ""
    return f"{row.num_tokens:,} tokens{split}, {row.num_trained:,} trained{lost}"


def print_diff(diff: Diff, console: Console, *, num_rows: int) -> None:
    """Prints what two setups train differently.

    Args:
        diff: See `diff_rows`.
        console: Where to.
        num_rows: How many of its rows.
    """
    _print(console, Text(f"{diff.num_changed:,} of {diff.num_rows:,} rows differ", "bold"))
    if diff.num_changed:
        _print(console, Text("- trained with these settings only", "red"))
        _print(console, Text("+ trained with the other settings only", "green"))
    for change in diff.rows[:num_rows]:
        _print_change(change, console)


def _print_change(change: RowChange, console: Console) -> None:
    _print(console, Text(f"\nRow {change.row}", "bold"))
    for error, sign in ((change.here, "-"), (change.there, "+")):
        if error is not None:
            problem = f"{sign} set aside: {visible(error.problem)}"
            _print(console, Text(problem, "red" if sign == "-" else "green"))
    opening, closing = _brackets(console)
    for part in change.changes[:_NUM_CHANGES_PER_ROW]:
        sign, style = ("- ", "red") if part.here else ("+ ", "green")
        line = Text(sign, style)
        line.append(_one_line(part.before), "dim")
        line.append(opening + _one_line(part.text) + closing, f"{style} underline")
        line.append(_one_line(part.after), "dim")
        _print(console, line)
    num_more = len(change.changes) - _NUM_CHANGES_PER_ROW
    if num_more > 0:
        _print(console, Text(f"  and {num_more:,} more", "dim"))


def _example_text(example: PreviewedExample, show_ids: bool, brackets: tuple[str, str]) -> Text:
    text = Text()
    for trained, _, pieces in example.runs():
        style = "green underline" if trained else "dim"
        text.append(brackets[0] if trained else "", style)
        if show_ids:
            for piece in pieces:
                shown = visible(piece.text)
                line_end = "\n" if shown.endswith("\n") else ""
                text.append(shown.removesuffix(line_end), style)
                text.append(f"[{' '.join(map(str, piece.ids))}]{line_end}", "dim cyan")
        else:
            text.append("".join(visible(piece.text) for piece in pieces), style)
        text.append(brackets[1] if trained else "", style)
    text.rstrip()
    return text


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "")


def _brackets(console: Console) -> tuple[str, str]:
    """What marks trained text where colour does not."""
    if console.color_system is not None and not console.no_color:
        return "", ""
    return ("\u27e6", "\u27e7") if console.encoding.startswith("utf") else ("[[", "]]")


def _print(console: Console, text: Text) -> None:
    """Prints text as it is; where a line is too long the terminal wraps it."""
    console.print(text, soft_wrap=True)
