"""Shows what `auto` decides for a trained model in each precision, and what a step takes."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from measuring import device_name, peak_memory, versions
from peft import LoraConfig
from results import Result
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from turns import ContestantEnded, Stopwatch, take_turns
from workload import Setup, invent_rows

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer

# By name: the dtype of the weights, and whether products run in bf16.
PRECISIONS = {
    "float32": ("float32", False),
    "bf16 autocast": ("float32", True),
    "bf16 weights": ("bfloat16", False),
    "float16 weights": ("float16", False),
}
_LORA_RANK = 16
_DECIDED = ("attention", "head", "last layer", "layers")


@dataclass
class Decision:
    """What one process found of one case.

    Attributes:
        lines: What was decided, by name, as the summary of a run has it.
        estimate: Bytes that the step was said to need; None where nothing was estimated.
        peak: Bytes that the process had at its highest point.
        wall: Seconds of each step after the first; all have the same rows.
    """

    lines: Mapping[str, str]
    estimate: float | None
    peak: int
    wall: list[float]


# By precision and what is trained; None where it ended before its end.
Measured = dict[tuple[str, str], Decision | None]


def measure_decisions(setup: Setup, model: str, precisions: Sequence[str]) -> Measured:
    """Trains a few steps of every case, full and LoRA, each in a process of its own.

    Args:
        setup: Rows, threads and memory.
        model: Folder or Hub name.
        precisions: Names of `PRECISIONS`.
    """
    measured: Measured = {}
    for precision in precisions:
        for trained in ("full", "LoRA"):
            case = replace(setup, precision=precision, lora=trained == "LoRA")
            try:
                name = f"{precision}, {trained}"
                (found,) = take_turns([name], 1, take_part, case, model)[name]
            except ContestantEnded as end:
                print(f"{precision}, {trained}: {end}")
                found = None
            measured[precision, trained] = found
    return measured


def take_part(name: str, setup: Setup, folder: str, stopwatch: Stopwatch) -> None:
    """The process of one case: trains the same rows a few times, and says what was decided."""
    dtype, is_autocast = PRECISIONS[setup.precision]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    adapter = LoraConfig(task_type="CAUSAL_LM", r=_LORA_RANK, target_modules="all-linear")
    watch = _Watch()
    with tempfile.TemporaryDirectory() as output_dir:
        args = MaskedSFTConfig(
            output_dir=output_dir,
            max_steps=setup.repetitions + 1,
            per_device_train_batch_size=setup.batch_size,
            train_sampling_strategy="sequential",
            bf16=is_autocast,
            use_cpu=not torch.cuda.is_available(),
            learning_rate=1e-5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = MaskedSFTTrainer(
            model,
            args,
            train_dataset=make_rows(setup, tokenizer.chat_template is not None),
            processing_class=tokenizer,
            peft_config=adapter if setup.lora else None,
            callbacks=[watch],
        )
        watch.trainer = trainer
        stopwatch.begin()
        trainer.train()
        found = watch.lines, trainer.memory_estimate, peak_memory(), watch.seconds[1:]
        stopwatch.end(Decision(*found))


def make_rows(setup: Setup, has_template: bool) -> Dataset:
    """The rows of one batch, as chats for a tokenizer with a template."""
    if setup.rows is None:
        found = invent_rows(setup.batch_size, setup.prompt_to_response)
    else:
        rows = load_dataset("json", data_files=setup.rows, split="train")
        found = rows.select(range(setup.batch_size)).to_list()
    if not has_template:
        pairs = [{"prompt": row["question"], "response": row["answer"]} for row in found]
        return Dataset.from_list(pairs)
    chats = [
        [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in found
    ]
    return Dataset.from_dict({"messages": chats})


class _Watch(TrainerCallback):
    """Keeps what was decided, which is known while training lasts, and the seconds of each step."""

    trainer: MaskedSFTTrainer

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.lines: dict[str, str] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the watch."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Reads it."""
        self.seconds.append(time.perf_counter() - self._start)
        self.lines = self.trainer.describe_speed()


def decisions_result(setup: Setup, model: str, measured: Measured) -> Result:
    """A row for each case; the ratio is that of the estimate to the peak."""
    source = "rows made up" if setup.rows is None else f"rows of {Path(setup.rows).name}"
    table = Table(
        title=f"What auto decides for {Path(model).name}, {setup.batch_size} {source}, "
        f"{device_name(setup.threads)}",
        caption=f"GB and ratio: a step's estimate, and the peak of its process; LoRA has "
        f"r={_LORA_RANK} on all linear layers; {versions()}",
        title_justify="left",
        caption_justify="left",
        show_lines=True,
    )
    for name in ("weights", "trained", *_DECIDED):
        table.add_column(name)
    for name in ("said", "GB", "ratio", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    bars: dict[str, list[float]] = {}
    for (precision, trained), found in measured.items():
        if found is None:
            table.add_row(precision, trained, "ended before its end")
            continue
        decided = [_in_short(found.lines.get(name, "")) for name in _DECIDED]
        said = ratio = "-"
        if found.estimate is not None:
            bars[f"{precision}, {trained}"] = [found.estimate / found.peak]
            said, ratio = f"{found.estimate / 1e9:.2f}", f"{found.estimate / found.peak:.2f}"
        figures = said, f"{found.peak / 1e9:.2f}", ratio, f"{statistics.median(found.wall):.1f}"
        table.add_row(precision, trained, *decided, *figures)
    records = {", ".join(case): found for case, found in measured.items()}
    return Result(table, bars, "estimated memory over the peak", setup, records)


def _in_short(line: str) -> str:
    """What was decided, without the words that are the same in every row.

    Examples:
        >>> _in_short("61 norms, 30 gated MLPs, rotary embeddings, each as one function")
        '61 norms, 30 gated MLPs, rotary'
    """
    for words, shorter in {
        " embeddings, each as one function": "",
        ", each as one function": "",
        " over response rows": "",
        ", response rows only": "",
        "at trained positions": "trained only",
        "per-document SDPA, ": "",
    }.items():
        line = line.replace(words, shorter)
    return line
