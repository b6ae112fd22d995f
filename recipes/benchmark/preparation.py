"""Measures how fast rows are prepared, against TRL, side by side in one process."""

import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_caching
from measuring import device_name, versions
from quickstart import build_model, train_tokenizer
from results import Result, make_table, median_and_range, ratios
from transformers import PreTrainedTokenizerBase
from workload import SHAPES, invent_rows

from hf_sft_plugin import IGNORE_INDEX, prepare_dataset

# TRL finds responses by these marks; without them it could not train them alone.
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Preparation:
    """How long the same rows took both, again and again.

    Attributes:
        name: What the rows are like.
        num_rows: How many there are.
        ours: Seconds of each repetition.
        theirs: Seconds of each repetition.
        num_trained: Trained tokens: ours, theirs.
    """

    name: str
    num_rows: int
    ours: list[float]
    theirs: list[float]
    num_trained: tuple[int, int]


def measure_preparation(
    rows: str | None, repetitions: int, num_proc: int | None = None
) -> list[Preparation]:
    """Prepares single- and multi-turn chats in turn with this plugin and with TRL.

    Args:
        rows: File of rows with `question` and `answer` as JSON lines; None makes rows up.
        repetitions: How often.
        num_proc: Processes of each; None: one.

    Returns:
        One measurement for single questions, one for conversations of three.
    """
    disable_caching()
    pairs = invent_rows(2000) if rows is None else _read(rows)
    texts = [text for pair in pairs for text in (pair["question"], pair["answer"])]
    tokenizer = train_tokenizer(texts, vocab_size=8192)
    tokenizer.chat_template = _TEMPLATE
    chats = [_chat([pair]) for pair in pairs]
    single = [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats]
    triples = [pairs[i : i + 3] for i in range(0, len(pairs) - 2, 3)]
    multi = [{"messages": _chat(each)} for each in triples]
    return [
        _measure("single turn", Dataset.from_list(single), tokenizer, {}, repetitions, num_proc),
        _measure(
            "three turns",
            Dataset.from_list(multi),
            tokenizer,
            {"assistant_only_loss": True},
            repetitions,
            num_proc,
        ),
    ]


def preparation_result(setup: dict[str, Any], measured: list[Preparation]) -> Result:
    """Rows per second of both, and the ratio."""
    table = make_table(
        "Preparing rows: tokens and masks, in rows per second, medians of "
        f"{len(measured[0].ours)}, {setup['num_proc'] or 1} processes of each, "
        f"{device_name(len(os.sched_getaffinity(0)))}",
        versions(),
        ("", "rows", "ours", "TRL", "ratio", "(range)", "trained tokens", "of TRL"),
    )
    slower: dict[str, list[float]] = {}
    for each in measured:
        slower[each.name] = ratios(each.theirs, each.ours)
        table.add_row(
            each.name,
            f"{each.num_rows:,}",
            f"{each.num_rows / statistics.median(each.ours):,.0f}",
            f"{each.num_rows / statistics.median(each.theirs):,.0f}",
            *median_and_range(slower[each.name]),
            *(f"{number:,}" for number in each.num_trained),
        )
    return Result(table, slower, "wall time of TRL over that of ours", setup, measured)


def _read(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _chat(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": row[column]}
        for row in rows
        for role, column in (("user", "question"), ("assistant", "answer"))
    ]


def _measure(
    name: str,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    repetitions: int,
    num_proc: int | None,
) -> Preparation:
    trl = importlib.import_module("trl")
    model = build_model({"model_type": "qwen3", **SHAPES["tiny"]}, tokenizer)

    def theirs(dataset: Dataset) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            args = trl.SFTConfig(
                output_dir=folder,
                max_length=None,
                report_to="none",
                bf16=False,
                dataset_num_proc=num_proc,
                **settings,
            )
            return trl.SFTTrainer(
                model, args, train_dataset=dataset, processing_class=tokenizer
            ).train_dataset

    # What its constructor takes whatever the number of rows is not counted.
    overhead = min(_seconds(lambda: theirs(rows.select(range(2))))[0] for _ in range(3))
    measured = Preparation(name, len(rows), [], [], (0, 0))
    for _ in range(repetitions):
        mine, (_, ledger) = _seconds(lambda: prepare_dataset(rows, tokenizer, num_proc=num_proc))
        other, dataset = _seconds(lambda: theirs(rows))
        measured.ours.append(mine)
        measured.theirs.append(other - overhead)
    measured.num_trained = (ledger.num_response_tokens, _count_trained(dataset))
    return measured


def _count_trained(dataset: Dataset) -> int:
    for column in ("completion_mask", "assistant_masks"):
        if column in dataset.column_names:
            return sum(sum(mask) for mask in dataset[column])
    return sum(label != IGNORE_INDEX for labels in dataset["labels"] for label in labels)


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
