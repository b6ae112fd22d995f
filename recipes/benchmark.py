"""Measures training with hf_sft_plugin against other trainers, side by side in one run.

    python recipes/benchmark.py step
    python recipes/benchmark.py step --shape qwen3-0.6b --rows train.jsonl --contestants ours plain
    python recipes/benchmark.py head
    python recipes/benchmark.py prepare --rows train.jsonl
    python recipes/benchmark.py masks

Every contestant trains the same model on the same rows in the same order, each in a process of its
own. They take turns, one optimizer step at a time, so that whatever disturbs the machine disturbs
all of them. The others need the extra `bench`: pip install "hf_sft_plugin[bench]".
"""

import argparse
import importlib.resources
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, SHAPES, Setup, make_model, make_rows
from datasets import disable_progress_bars
from heads import HEADS, PRECISIONS, HeadSetup, head_table, measure_heads
from measuring import device_name, peak_memory, reset_peak_memory, version
from preparation import measure_preparation, preparation_table
from rich.console import Console
from rich.progress import track
from rich.table import Table
from template_proof import proof_table, prove_templates
from transformers import TrainerCallback

# Where TRL keeps its chat templates.
_TEMPLATES = "chat_templates"


@dataclass
class StepRecord:
    """One optimizer step of one contestant.

    Attributes:
        wall: Seconds.
        cpu: Processor seconds of the whole process.
        peak: Bytes at the highest point: of the process, or of the GPU where there is one.
        loss: What the trainer logged.
    """

    wall: float
    cpu: float
    peak: int
    loss: float


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the arguments name."""
    options = vars(make_parser().parse_args(argv))
    command = options.pop("command")
    # A file or pipe has no width of its own, and the default would cut the columns.
    console = Console(width=max(Console().width, 100 if command == "step" else 180))
    disable_progress_bars()
    if command == "prepare":
        measured = measure_preparation(options["rows"], options["repetitions"])
        console.print(preparation_table(measured))
    elif command == "head":
        contestants, precisions = options.pop("contestants"), options.pop("precisions")
        torch.set_num_threads(options["threads"])
        for precision in precisions:
            setup = HeadSetup(precision=precision, **options)
            console.print(head_table(setup, measure_heads(setup, contestants)))
    elif command == "masks":
        folder = options["templates"] or Path(str(importlib.resources.files("trl"))) / _TEMPLATES
        console.print(proof_table(prove_templates(folder)))
    else:
        _run_step(options, console)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser(
        "step",
        help="time and peak memory of one optimizer step",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    step.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="size of the model")
    step.add_argument("--rows", help="rows with a question and an answer; none: rows made up")
    step.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch")
    step.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    step.add_argument("--repetitions", type=int, default=5, help="measured steps")
    step.add_argument(
        "--responses_per_prompt", type=int, default=1, help="rows in a row with one question"
    )
    step.add_argument(
        "--precision",
        choices=["bf16", "float32"],
        default="bf16" if torch.cuda.is_available() else "float32",
        help="bf16 is autocast, which few CPUs do well",
    )
    step.add_argument("--threads", type=int, default=_num_cpus(), help="CPU threads of each")
    step.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=[name for name in CONTESTANTS if "+" not in name],
        help="who takes part; ratios are over the first",
    )
    step.add_argument("--output", type=Path, help="JSON file for all measurements")
    _add_other_commands(commands)
    return parser


def _add_other_commands(commands: Any) -> None:
    head = commands.add_parser(
        "head",
        help="time and transient memory of the LM head with its loss and gradients",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    head.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="size of the head")
    head.add_argument("--num_rows", type=int, default=512, help="response tokens")
    head.add_argument("--repetitions", type=int, default=5, help="measured passes")
    head.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="dtype of all tensors; autocast: products in bf16, the rest in float32",
    )
    head.add_argument("--threads", type=int, default=_num_cpus(), help="CPU threads")
    head.add_argument(
        "--contestants",
        nargs="+",
        choices=HEADS,
        default=list(HEADS),
        help="who takes part; ratios are over the first",
    )
    prepare = commands.add_parser(
        "prepare",
        help="rows per second from raw rows to tokens and masks, against TRL",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    prepare.add_argument("--rows", help="rows with a question and an answer; none: rows made up")
    prepare.add_argument("--repetitions", type=int, default=5, help="measured preparations")
    masks = commands.add_parser(
        "masks",
        help="the proof of the masks over real chat templates",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    masks.add_argument(
        "--templates", type=Path, help="folder with *.jinja files; none: those of TRL"
    )


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _run_step(options: dict[str, Any], console: Console) -> None:
    contestants, output = options.pop("contestants"), options.pop("output")
    setup = Setup(**options)
    records = measure_steps(setup, contestants)
    console.print(result_table(setup, records))
    if output is not None:
        results = {name: [asdict(record) for record in each] for name, each in records.items()}
        output.write_text(json.dumps({"setup": asdict(setup), "records": results}, indent=1))


def measure_steps(setup: Setup, contestants: Sequence[str]) -> dict[str, list[StepRecord]]:
    """Lets the contestants take one optimizer step each, in turn, until all steps are done.

    Returns:
        The steps by contestant. The first builds optimizer states and caches and counts for
        nothing but its loss.
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes: dict[str, SpawnProcess] = {}
    for name in contestants:
        connections[name], theirs = context.Pipe()
        process = context.Process(target=take_part, args=(name, setup, theirs), daemon=True)
        process.start()
        theirs.close()
        processes[name] = process
    records: dict[str, list[StepRecord]] = {name: [] for name in contestants}
    for _ in track(range(setup.repetitions + 1), description="Measuring", transient=True):
        for name, connection in connections.items():
            try:
                connection.send("step")
                records[name].append(connection.recv())
            except (EOFError, OSError):
                processes[name].join()
                raise SystemExit(why_it_ended(name, processes[name].exitcode)) from None
    for connection in connections.values():
        connection.send("stop")
    for process in processes.values():
        process.join()
    return records


def why_it_ended(name: str, exit_code: int | None) -> str:
    """One sentence about a contestant that is gone."""
    if exit_code == -signal.SIGKILL:
        return (
            f"'{name}' was killed, most likely because all contestants together need more memory "
            "than there is. Choose a smaller --batch_size or --shape, or fewer --contestants."
        )
    return f"'{name}' could not take part; its error is above."


def take_part(name: str, setup: Setup, connection: Connection) -> None:
    """The process of one contestant: trains, and stops before every step until it is told to go."""
    torch.set_num_threads(setup.threads)
    disable_progress_bars()
    # The log lines of four trainers at once would hide the result.
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    rows, tokenizer = make_rows(setup)
    model = make_model(setup, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": setup.repetitions + 1,
            "per_device_train_batch_size": setup.batch_size,
            "gradient_accumulation_steps": setup.accumulation,
            "train_sampling_strategy": "sequential",
            "bf16": setup.precision == "bf16",
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = CONTESTANTS[name](model, rows, tokenizer, settings)
        trainer.add_callback(TakingTurns(connection))
        trainer.train()


class TakingTurns(TrainerCallback):
    """Waits for its turn before a step, and reports the step when the next one would begin."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Waits for the first turn."""
        self._wait()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Ends the turn: logging is the last thing that belongs to a step."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.connection.send(StepRecord(wall, cpu, peak_memory(), float(logs["loss"])))
        self._wait()

    def _wait(self) -> None:
        try:
            self.connection.recv()
        except EOFError:
            # Another contestant ended the benchmark, and says why.
            raise SystemExit(0) from None
        reset_peak_memory()
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def result_table(setup: Setup, records: dict[str, list[StepRecord]]) -> Table:
    """Medians, and the ratio of each contestant over the first, step by step."""
    title = (
        f"One optimizer step of {setup.accumulation} x {setup.batch_size} rows, "
        f"{setup.responses_per_prompt} per prompt, "
        f"{setup.shape}, {setup.precision}, {device_name(setup.threads)}, medians of "
        f"{setup.repetitions}"
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    table = Table(title=title, caption=versions, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("wall s", "ratio", "(range)", "cpu s", "peak GiB", "ratio", "first loss"):
        table.add_column(column, justify="right", no_wrap=True)
    first = next(iter(records.values()))[1:]
    for name, (unmeasured, *steps) in records.items():
        slower = [step.wall / reference.wall for step, reference in zip(steps, first, strict=True)]
        larger = [step.peak / reference.peak for step, reference in zip(steps, first, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(step.wall for step in steps):.3f}",
            f"{statistics.median(slower):.2f}",
            f"{min(slower):.2f}-{max(slower):.2f}",
            f"{statistics.median(step.cpu for step in steps):.2f}",
            f"{statistics.median(step.peak for step in steps) / 2**30:.2f}",
            f"{statistics.median(larger):.2f}",
            f"{unmeasured.loss:.4f}",
        )
    return table


if __name__ == "__main__":
    main()
