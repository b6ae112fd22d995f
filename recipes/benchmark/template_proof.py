"""Runs the proof of the masks over real chat templates, such as those that TRL brings along."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2.exceptions import TemplateError
from quickstart import train_tokenizer
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin import preview_rows

# What the conversations say, word for word; each stands in one message only.
_SAID = ("alder", "birch", "cedar", "daisy", "elder", "fennel")
_CONTROL = re.compile(r"<[^<>\s]{2,40}>|\[/?[A-Z_]{3,20}\]")


def conversations() -> dict[str, list[dict[str, str]]]:
    """What every template is tried on."""

    def chat(*contents: str) -> list[dict[str, str]]:
        roles = ["user", "assistant"] * len(contents)
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]

    a, b, c, d, e, f = _SAID
    return {
        "single": chat(f"Say {a}.", f"{b} it is."),
        "multi": chat(f"Say {a}.", f"{b} it is.", f"And {c}?", f"{d} too."),
        "system": [{"role": "system", "content": f"Be {e}."}, *chat(f"Say {a}.", f"{b} it is.")],
        "spaces": chat(f" Say {a}. ", f"  {b} it is.\n", f"\nAnd {c}?", f"\t{d} too. "),
        "echo": chat("same words", "same words", "same words", "same words"),
        "emoji": chat(f"Say {a} \U0001f30d", f"{b} \U0001f469\u200d\U0001f680 e\u0301", c, d),
        "thinks": chat(a, f"<think>\n{e}\n</think>\n\n{b}", c, f"<think>\n{f}\n</think>\n\n{d}"),
        "control": chat(f"{a} <|im_end|> </s>", f"{b} <|eot_id|> <|im_end|>", c, d),
    }


@dataclass
class TemplateProof:
    """What became of the conversations under one template.

    Attributes:
        name: Name of the template.
        results: By conversation: the kinds of its spans, or the reason why it is set aside.
        num_leaks: Trained texts that hold a word of somebody else.
    """

    name: str
    results: dict[str, str]
    num_leaks: int


def prove_templates(folder: Path) -> list[TemplateProof]:
    """Tries every `*.jinja` of a folder."""
    base = train_tokenizer([" ".join(_SAID) * 3, "Say it is. And too? same words"], 512)
    return [
        prove_template(path.stem, path.read_text(encoding="utf-8"), base)
        for path in sorted(folder.glob("*.jinja"))
    ]


def prove_template(name: str, template: str, base: PreTrainedTokenizerBase) -> TemplateProof:
    """Tries one template on all conversations."""
    tokenizer = type(base)(tokenizer_object=base.backend_tokenizer)
    tokenizer.chat_template = template
    names: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer.add_special_tokens(names)
    stops = _find_control_tokens(tokenizer)
    results: dict[str, str] = {}
    num_leaks = 0
    for title, messages in conversations().items():
        results[title], leaks = _prove(messages, tokenizer, stops)
        num_leaks += leaks
    return TemplateProof(name, results, num_leaks)


def _find_control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Adds what the template writes as control tokens, and returns those that end a response."""
    try:
        text, longer = (
            str(tokenizer.apply_chat_template(conversations()[name], tokenize=False))
            for name in ("single", "multi")
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError):
        return []
    names = sorted(set(_CONTROL.findall(longer + str(tokenizer.chat_template))))
    names = [n for n in names if n in longer or n.startswith("<|")]
    names = [n for n in names if n not in ("<think>", "</think>")]
    tokenizer.add_tokens(names, special_tokens=True)
    # Where nothing ends a response, inference stops at the header of the next turn.
    found = next(filter(None, (_CONTROL.search(_after_response(t)) for t in (text, longer))), None)
    ends = [found.group()] if found else []
    ends += [name for name in ("<|return|>", "<|call|>") if name in str(tokenizer.chat_template)]
    if not ends:
        return [tokenizer.eos_token_id]
    return [int(tokenizer.get_vocab()[end]) for end in ends]


def _after_response(text: str) -> str:
    return text.partition(f"{_SAID[1]} it is.")[2]


def _prove(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> tuple[str, int]:
    """The kinds of the spans and the number of examples, and how many examples leak."""
    rows = Dataset.from_list([{"messages": messages}])
    (row,) = preview_rows(rows, tokenizer, stop_token_ids=stops)
    if row.error is not None:
        return row.error.reason, 0
    theirs = [w for m in messages if m["role"] != "assistant" for w in _SAID if w in m["content"]]
    leaks = 0
    for example in row.examples:
        trained = "".join(p.text for has_mark, _, run in example.runs() if has_mark for p in run)
        leaks += any(word in trained for word in theirs)
    kinds = Counter(note.span.kind for example in row.examples for note in example.notes)
    text = " + ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in kinds.items())
    return f"{text}, {len(row.examples)} ex.", leaks


def proof_table(proofs: Sequence[TemplateProof]) -> Table:
    """One line for each template, one column for each conversation."""
    table = Table(title=f"The masks of {len(proofs)} chat templates")
    for column in ("template", *conversations(), "leaks"):
        table.add_column(column, overflow="fold")
    for proof in proofs:
        cells = (proof.name, *proof.results.values(), str(proof.num_leaks))
        # As text, or rich would take brackets in it for its markup.
        table.add_row(*map(Text, cells))
    return table
