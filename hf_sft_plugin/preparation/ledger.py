"""The account of a dataset: what became of every row and every token of it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_sft_plugin.tokens.row_tokenizer import RowOutcome
from hf_sft_plugin.types import visible_lines

_NUM_NAMED_ROWS = 5


@dataclass
class Drop:
    """Rows dropped for one reason.

    Attributes:
        num_rows: How many.
        num_tokens: Tokens they had; 0 for rows that were never tokenized.
        first_rows: Positions of the first few in the dataset.
        example: What is wrong with the first, and the cure. May quote the data, so it is not saved.
    """

    num_rows: int
    num_tokens: int
    first_rows: list[int]
    example: str


@dataclass
class Ledger:
    """What became of every row and every token of a dataset.

    Attributes:
        num_rows: Rows in.
        num_rows_trained: Rows with at least one trained token.
        num_examples: Examples made of them; more than rows where conversations were split.
        num_rows_truncated: Trained rows that were cut to `max_length`.
        num_tokens: Tokens in, before truncation.
        num_response_tokens: Tokens trained.
        num_context_tokens: Tokens read but not trained.
        num_truncated_tokens: Tokens cut off trained rows.
        longest: Tokens of the longest example.
        max_length: The limit that was applied, in tokens; None without one.
        drops: Dropped rows by reason.
        columns: Which columns were taken for what.
        unused_columns: Columns that play no part.
        num_stopped: Examples whose last trained token is a stop token.
        num_cut_before_stop: Examples that would be, had they not been truncated before it.
        is_pad_eos: Whether rows are padded with the eos token.
        spans: Trained spans by kind; see `TrainedSpan`.
        control_tokens: How often each control token stood in the contents.
        num_straddled_tokens: Edges of responses at which the whole text has other tokens than its
            parts: one token reaches across, or what follows changes the tokens before.
        remarks: First rows with something to know of, by what it is.
        num_remarks: How many rows there are of each.
        certificate: See `certify_masks`.
    """

    num_rows: int
    num_rows_trained: int = 0
    num_examples: int = 0
    num_rows_truncated: int = 0
    num_tokens: int = 0
    num_response_tokens: int = 0
    num_context_tokens: int = 0
    num_truncated_tokens: int = 0
    longest: int = 0
    max_length: int | None = None
    drops: dict[str, Drop] = field(default_factory=dict)
    columns: str = ""
    unused_columns: list[str] = field(default_factory=list)
    num_stopped: int = 0
    num_cut_before_stop: int = 0
    is_pad_eos: bool = False
    spans: dict[str, int] = field(default_factory=dict)
    control_tokens: dict[str, int] = field(default_factory=dict)
    num_straddled_tokens: int = 0
    remarks: dict[str, list[int]] = field(default_factory=dict)
    num_remarks: dict[str, int] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows_dropped(self) -> int:
        """Rows that are not trained."""
        return sum(drop.num_rows for drop in self.drops.values())

    @property
    def trained_share(self) -> float:
        """Trained tokens over tokens read, 0 to 1."""
        return self.num_response_tokens / max(self.num_response_tokens + self.num_context_tokens, 1)

    def add_row(self, account: Mapping[str, Any]) -> None:
        """Enters one row, as `account_of` wrote it."""
        row, reason = account["row"], account.get("reason")
        lost = account.get("num_lost", 0)
        self.num_tokens += account.get("num_tokens", 0)
        if reason is not None:
            drop = self.drops.setdefault(reason, Drop(0, 0, [], account["problem"]))
            drop.num_rows += 1
            drop.num_tokens += account.get("num_tokens", 0)
            drop.first_rows += [row] * (len(drop.first_rows) < _NUM_NAMED_ROWS)
            return
        self.num_rows_trained += 1
        self.num_rows_truncated += lost > 0
        self.num_truncated_tokens += lost
        self.num_examples += account["num_examples"]
        self.num_stopped += account["num_stopped"]
        self.num_cut_before_stop += account.get("num_cut_before_stop", 0)
        self.num_straddled_tokens += account.get("num_straddled", 0)
        for counts, found in (
            (self.spans, account["spans"]),
            (self.control_tokens, account.get("control_tokens", {})),
        ):
            for name, number in found.items():
                counts[name] = counts.get(name, 0) + number
        for remark in account.get("remarks", ()):
            self.num_remarks[remark] = self.num_remarks.get(remark, 0) + 1
            rows = self.remarks.setdefault(remark, [])
            rows += [row] * (len(rows) < _NUM_NAMED_ROWS)

    def check(self, max_dropped_share: float) -> None:
        """Stops a run whose data does not add up, or of which too much would be missing.

        Args:
            max_dropped_share: Largest share of rows, 0 to 1, that may be dropped.

        Raises:
            ValueError: If more rows are dropped, or none is left.
        """
        lost = sum(drop.num_tokens for drop in self.drops.values()) + self.num_truncated_tokens
        kept = self.num_response_tokens + self.num_context_tokens
        assert self.num_rows == self.num_rows_trained + self.num_rows_dropped, self
        assert self.num_tokens == kept + lost, self
        self.check_share(max_dropped_share)

    def check_share(self, max_dropped_share: float) -> None:
        """Stops a run of whose rows too many are missing; see `check`."""
        # A quotient, because 0.29 * 100 is less than 29.
        if self.num_rows_trained and self.num_rows_dropped / self.num_rows <= max_dropped_share:
            return
        problems = "\n".join(
            f"- {_rows(drop.num_rows)}, {reason}: {drop.example}"
            for reason, drop in self.drops.items()
        )
        raise ValueError(
            f"{self.num_rows_dropped:,} of {_rows(self.num_rows)} cannot be trained"
            + ("" if self.num_rows_trained else ", so nothing is left")
            + f":\n{problems}\nRepair or remove these rows"
            + (
                f", or allow more than {100 * max_dropped_share:g}% of them to be dropped with "
                "max_dropped_share."
                if self.num_rows_trained
                else "."
            )
        )

    def __str__(self) -> str:
        """The account as lines of text that add up."""
        lines = [
            f"rows    {self.num_rows:,} in = {self.num_rows_trained:,} trained "
            f"({self.num_rows_truncated:,} truncated) + {self.num_rows_dropped:,} dropped",
        ]
        for reason, drop in self.drops.items():
            named = _named_rows(drop.first_rows, drop.num_rows)
            lines.append(f"        dropped {drop.num_rows:,}: {reason} ({named})")
        if self.num_examples != self.num_rows_trained:
            # By the response, or by the length: `multi_turn` and `overflow` both split rows.
            lines.append(f"        the trained rows are split into {self.num_examples:,} examples")
        dropped_tokens = sum(drop.num_tokens for drop in self.drops.values())
        lines.append(
            f"tokens  {self.num_tokens:,} in = {self.num_response_tokens:,} trained + "
            f"{self.num_context_tokens:,} context\n"
            f"        + {self.num_truncated_tokens:,} truncated + {dropped_tokens:,} dropped"
        )
        limit = "no limit" if self.max_length is None else f"limit {self.max_length:,}"
        lines.append(
            f"        {self.trained_share:.1%} of the tokens read are trained; longest row "
            f"{self.longest:,}, {limit}"
        )
        # Names of columns and control tokens come from the data.
        return visible_lines("\n".join([*lines, *self._mask_lines(), *self._column_lines()]))

    def _mask_lines(self) -> list[str]:
        if not self.num_examples:
            return []
        kinds = " + ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in self.spans.items())
        stopped = self.num_stopped / self.num_examples
        lines = [f"masks   {kinds} spans; {stopped:.1%} of the examples end with a stop token"]
        if self.num_stopped < self.num_examples:
            cut = self.num_cut_before_stop / self.num_examples
            lines.append(f"        {cut:.1%} lost theirs to truncation")
        if self.is_pad_eos:
            lines.append(
                "        pad is the eos token too, which is harmless: masks go by position"
            )
        counted = _in_words(self.control_tokens, self.num_straddled_tokens)
        lines += [f"        {words}" for words in counted]
        for remark, number in self.num_remarks.items():
            named = _named_rows(self.remarks[remark], number)
            lines.append(f"        {_rows(number)}: {remark} ({named})")
        return lines

    def _column_lines(self) -> list[str]:
        lines = [f"columns {self.columns}"] if self.columns else []
        if self.unused_columns:
            lines.append(f"        not used: {', '.join(self.unused_columns)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The account as plain values, without anything that the rows say.

        It goes to the Hub with the model, and the data may not.
        """
        account = asdict(self)
        for drop in account["drops"].values():
            del drop["example"]
        return account

    @classmethod
    def from_record(cls, record: Any, certificate: Any) -> "Ledger | None":
        """The account that a set of shards holds; None where what it holds is no such account."""
        if not isinstance(record, Mapping):
            return None
        names = {each.name for each in fields(cls)} - {"certificate"}
        if record.keys() != names:
            return None
        drops = {reason: Drop(**drop) for reason, drop in record["drops"].items()}
        return cls(**{**record, "drops": drops, "certificate": certificate or {}})

    def save(self, path: Path) -> None:
        """Writes the account as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _in_words(control_tokens: Mapping[str, int], num_straddled: int) -> list[str]:
    """What was counted besides rows and tokens, where there is any of it."""
    words = []
    if control_tokens:
        found = ", ".join(f"{token} ({n:,})" for token, n in control_tokens.items())
        words.append(f"control tokens in the contents: {found}")
    if num_straddled:
        edges = "edge of a response has" if num_straddled == 1 else "edges of responses have"
        words.append(f"{num_straddled:,} {edges} other tokens in the whole text than in its parts")
    return words


def _named_rows(first: Sequence[int], number: int) -> str:
    """The first of some rows, and whether there are more."""
    noun = "row" if number == 1 else "rows"
    return f"{noun} {', '.join(map(str, first))}{', ...' if number > len(first) else ''}"


def remarks_of(outcome: RowOutcome) -> list[str]:
    """What is to be known of a row besides its tokens and spans, as the printed account says it."""
    counted = _in_words(Counter(outcome.control_tokens), outcome.num_straddled)
    return [*counted, *_remarks(outcome)]


def _remarks(outcome: RowOutcome) -> list[str]:
    remarks: tuple[tuple[str, bool], ...] = (
        ("the tokenizer cannot give the response back exactly", outcome.is_lossy),
        ("the chat template changes the text of a response", outcome.is_altered),
        ("a content could not be found a second time", outcome.is_unseen),
    )
    stops = " and ".join(repr(stop) for stop in sorted({*outcome.added_stops}))
    if stops:
        remarks += (
            (f"the chat template does not end the last response, so {stops} was added", True),
        )
    return [*outcome.remarks, *(remark for remark, is_true in remarks if is_true)]


def account_of(outcome: RowOutcome) -> dict[str, Any]:
    """What a ledger needs to know of one row, as plain values without zeros."""
    account: dict[str, Any] = {
        "row": outcome.row,
        "num_tokens": outcome.num_tokens,
        "num_lost": outcome.num_lost,
        "num_straddled": outcome.num_straddled,
        "num_cut_before_stop": outcome.num_cut_before_stop,
        "control_tokens": Counter(outcome.control_tokens),
        "remarks": _remarks(outcome),
    }
    account = {name: value for name, value in account.items() if value or name == "row"}
    if outcome.error is not None:
        return {**account, "reason": outcome.error.reason, "problem": str(outcome.error)}
    return {
        **account,
        "num_examples": len(outcome.examples),
        "num_stopped": outcome.num_stopped,
        "spans": Counter(span.kind for spans in outcome.spans for span in spans),
    }
