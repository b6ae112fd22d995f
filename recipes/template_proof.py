"""Runs the proof of the masks over real chat templates, such as those that TRL brings along."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart import train_tokenizer
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin import DataOptions, RowError, TokenizationSetup, preview_rows

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
    tokenizer.bos_token, tokenizer.pad_token = "<bos>", "<pad>"  # noqa: S105  # no secrets
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
        text = str(tokenizer.apply_chat_template(conversations()["single"], tokenize=False))
    except Exception:  # noqa: BLE001  # a template may fail in any way of its own
        return []
    names = sorted(set(_CONTROL.findall(text + str(tokenizer.chat_template))))
    names = [n for n in names if n in text or n.startswith("<|")]
    names = [n for n in names if n not in ("<think>", "</think>")]
    tokenizer.add_tokens(names, special_tokens=True)
    after = text[text.index(f"{_SAID[1]} it is.") :]
    found = _CONTROL.search(after)
    ends = [found.group()] if found else []
    ends += [name for name in ("<|return|>", "<|call|>") if name in str(tokenizer.chat_template)]
    if not ends:
        tokenizer.eos_token = "<eos>"  # noqa: S105  # no secret
        return [tokenizer.eos_token_id]
    return [int(i) for i in tokenizer.convert_tokens_to_ids(ends)]


def _prove(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> tuple[str, int]:
    from hf_sft_plugin.data.tokenization import tokenize_rows

    try:
        (outcome,) = tokenize_rows([{"messages": messages}], [0], tokenizer, DataOptions(), stops)
    except ValueError as error:
        return str(error)[:60], 0
    if outcome.error is not None:
        return outcome.error.reason, 0
    leaks = 0
    theirs = [w for m in messages if m["role"] != "assistant" for w in _SAID if w in m["content"]]
    for example in outcome.examples:
        pairs = zip(example["input_ids"], example["response_mask"], strict=True)
        trained = tokenizer.decode([token for token, mark in pairs if mark])
        leaks += any(word in trained for word in theirs)
    kinds = Counter(span.kind for spans in outcome.spans for span in spans)
    text = "+".join(f"{n} {kind}" for kind, n in kinds.items())
    return f"{text} / {len(outcome.examples)}", leaks
