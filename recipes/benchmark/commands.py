"""Measures training with hf_sft_plugin against other trainers, side by side in one run.

    python recipes/benchmark step
    python recipes/benchmark step --shape qwen3-0.6b --rows train.jsonl --contestants ours plain
    python recipes/benchmark train --rows train.jsonl --output train.json --chart train.png
    python recipes/benchmark memory --batch_sizes 1 2 4 8
    python recipes/benchmark profile --contestants ours trl-best
    python recipes/benchmark head
    python recipes/benchmark prepare --rows train.jsonl
    python recipes/benchmark processes --counts 1 2 --rows train.jsonl
    python recipes/benchmark models --model FOLDER --rows train.jsonl
    python recipes/benchmark masks

Every contestant trains the same model on the same rows in the same order, each in a process of its
own. They take turns, one optimizer step (of `train`: some of them) at a time, so that whatever
disturbs the machine disturbs all of them; in `memory` and `models` one runs after the other. The
others need the extra `bench`: pip install "hf_sft_plugin[bench]". Charts need matplotlib, the extra
`report`.
"""

import argparse
import importlib
import importlib.resources
import importlib.util
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, OTHERS, default_contestants, why_impossible
from datasets import disable_progress_bars
from decisions import PRECISIONS as MODEL_PRECISIONS
from decisions import decisions_result, measure_decisions
from heads import HEADS, PRECISIONS, HeadSetup, head_result, measure_heads
from measuring import version
from preparation import measure_preparation, preparation_result
from profiles import measure_profiles, profile_result
from results import Result
from rich.console import Console
from scaling import run_scaling
from step_memory import measure_memory, memory_result
from steps import make_step_rows, measure_steps, step_result
from template_proof import proof_table, prove_templates
from trained_model import trained_model_folder
from training_runs import make_run_rows, measure_runs, run_result
from workload import SHAPES, WORDS, Setup

# Where TRL keeps its chat templates.
_TEMPLATES = "chat_templates"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the arguments name."""
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    # A file or pipe has no width of its own, and the default would cut the columns.
    console = Console(width=max(Console().width, 100 if command in ("step", "models") else 180))
    disable_progress_bars()
    if command == "masks":
        folder = options["templates"] or Path(str(importlib.resources.files("trl"))) / _TEMPLATES
        console.print(proof_table(prove_templates(folder)))
        return
    output, chart = options.pop("output"), options.pop("chart")
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            '--chart needs matplotlib, which is not installed: pip install "hf_sft_plugin[report]"'
        )
    impossible = why_impossible(options.get("contestants", ()))
    if impossible:
        parser.error(impossible)
    if command == "processes" and any(options["batch_size"] % n for n in options["counts"]):
        parser.error(
            f"--batch_size {options['batch_size']} cannot be shared out evenly over each of "
            f"--counts {' '.join(map(str, options['counts']))}: choose a multiple of them."
        )
    if command in _TRAINING:
        if options["rows"] is not None and options["prompt_to_response"] is not None:
            parser.error(
                "--prompt_to_response is for rows made up, and --rows names rows that are as they "
                "are: leave one of the two out."
            )
        options["prompt_to_response"] = options["prompt_to_response"] or next(iter(WORDS))
    publish(_COMMANDS[command](options), console, output, chart)


def publish(
    results: Sequence[Result], console: Console, output: Path | None, chart: Path | None
) -> None:
    """Prints the tables, and writes the files that were asked for."""
    for result in results:
        console.print(result.table)
    if output is not None:
        libraries = ("hf_sft_plugin", "torch", "transformers", "trl", "peft", "liger-kernel")
        found = [
            {
                "title": str(result.table.title),
                "setup": _as_json(result.setup),
                "records": _as_json(result.records),
            }
            for result in results
        ]
        contents = {"versions": {name: version(name) for name in libraries}, "results": found}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    if chart is not None:
        # Loaded here, because nothing else needs matplotlib.
        importlib.import_module("charts").draw_ratios(chart, results)


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = _add_command(commands, "step", "time and peak memory of one optimizer step")
    step.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch")
    train = _add_command(commands, "train", "whole runs: wall and CPU time, time to start, losses")
    train.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch")
    train.add_argument("--steps_per_turn", type=int, default=10, help="optimizer steps of a turn")
    memory = _add_command(commands, "memory", "memory of a step for growing micro-batches")
    memory.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="rows of a micro-batch"
    )
    memory.add_argument(
        "--memory_limit", type=float, help="GiB at which a contestant ends; none: all there are"
    )
    profile = _add_command(commands, "profile", "what the time of a step is spent on")
    profile.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch")
    for each in (step, train, memory, profile):
        _add_training_options(each)
    _add_other_commands(commands)
    return parser


def _add_command(commands: Any, name: str, purpose: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=purpose, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("--repetitions", type=int, default=5, help="measured turns of each")
    command.add_argument("--output", type=Path, help="JSON file for all measurements")
    command.add_argument("--chart", type=Path, help="PNG file for the ratios as bars")
    return command


def _add_training_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shape", choices=SHAPES, default="smollm2-135m", help="size of an untrained model"
    )
    command.add_argument(
        "--model", help="folder or Hub name of a trained model, with its tokenizer"
    )
    command.add_argument("--rows", help="rows with a question and an answer; none: rows made up")
    command.add_argument(
        "--prompt_to_response",
        choices=WORDS,
        help=f"how long prompts are in rows made up; none: {next(iter(WORDS))}",
    )
    command.add_argument(
        "--responses_per_prompt", type=int, default=1, help="rows in a row with one question"
    )
    command.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    command.add_argument(
        "--lora", action="store_true", help="train an adapter on all linear layers but the head"
    )
    command.add_argument(
        "--precision",
        choices=["bf16", "float32"],
        default="bf16" if torch.cuda.is_available() else "float32",
        help="bf16 is autocast, which few CPUs do well",
    )
    names = default_contestants(*OTHERS)
    _add_contestants(command, CONTESTANTS, names)


def _add_contestants(command: Any, known: Collection[str], default: Sequence[str]) -> None:
    command.add_argument("--threads", type=int, default=_num_cpus(), help="CPU threads of each")
    command.add_argument(
        "--contestants",
        nargs="+",
        choices=known,
        default=default,
        help="who takes part; ratios are over the first",
    )


def _add_other_commands(commands: Any) -> None:
    head = _add_command(commands, "head", "time and transient memory of the LM head with its loss")
    head.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="size of the head")
    head.add_argument("--num_rows", type=int, default=512, help="response tokens")
    head.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="dtype of all tensors; autocast: products in bf16, the rest in float32",
    )
    _add_contestants(head, HEADS, default_contestants("logits", "trl"))
    purpose = "rows per second from raw rows to tokens and masks, against TRL"
    prepare = _add_command(commands, "prepare", purpose)
    prepare.add_argument("--rows", help="rows with a question and an answer; none: rows made up")
    prepare.add_argument("--num_proc", type=int, help="processes of each; none: one")
    _add_processes(commands)
    _add_models(commands)
    masks = commands.add_parser(
        "masks",
        help="the proof of the masks over real chat templates",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    masks.add_argument(
        "--templates", type=Path, help="folder with *.jinja files; none: those of TRL"
    )


def _add_processes(commands: Any) -> None:
    purpose = "tokens per second of several processes over those of one, at the same steps"
    processes = _add_command(commands, "processes", purpose)
    processes.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="processes")
    processes.add_argument("--shape", choices=SHAPES, default="small", help="size of the model")
    processes.add_argument("--rows", help="rows with a question and an answer; none: rows made up")
    processes.add_argument(
        "--batch_size", type=int, default=32, help="rows of a step, over all processes"
    )
    processes.add_argument("--steps_per_turn", type=int, default=4, help="steps of a turn")
    processes.add_argument("--threads", type=int, default=1, help="CPU threads of each process")


def _add_models(commands: Any) -> None:
    purpose = "what auto decides for a trained model in each precision; memory said and measured"
    models = _add_command(commands, "models", purpose)
    # Every case is a process of its own that loads the model.
    models.set_defaults(repetitions=1)
    models.add_argument("--model", default=str(trained_model_folder()), help="folder or Hub name")
    models.add_argument("--rows", help="rows with a question and an answer; none: rows made up")
    models.add_argument("--batch_size", type=int, default=8, help="rows of a step")
    models.add_argument(
        "--precisions",
        nargs="+",
        choices=MODEL_PRECISIONS,
        default=list(MODEL_PRECISIONS),
        help="dtype of the weights; autocast: float32, with products in bf16",
    )
    models.add_argument("--threads", type=int, default=_num_cpus(), help="CPU threads of each")


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _run_step(options: dict[str, Any]) -> list[Result]:
    contestants = options.pop("contestants")
    setup = Setup(**options)
    rows = make_step_rows(setup)
    return [step_result(setup, rows, measure_steps(setup, contestants, rows))]


def _run_profile(options: dict[str, Any]) -> list[Result]:
    contestants = options.pop("contestants")
    setup = Setup(**options)
    rows = make_step_rows(setup)
    return [profile_result(setup, rows, measure_profiles(setup, contestants, rows))]


def _run_train(options: dict[str, Any]) -> list[Result]:
    contestants = options.pop("contestants")
    setup = Setup(**options)
    rows = make_run_rows(setup)
    return [run_result(setup, rows, measure_runs(setup, contestants, rows))]


def _run_memory(options: dict[str, Any]) -> list[Result]:
    contestants, sizes = options.pop("contestants"), options.pop("batch_sizes")
    setup = Setup(batch_size=max(sizes), **options)
    return [memory_result(setup, *measure_memory(setup, contestants, sizes))]


def _run_head(options: dict[str, Any]) -> list[Result]:
    contestants, precisions = options.pop("contestants"), options.pop("precisions")
    torch.set_num_threads(options["threads"])
    setups = [HeadSetup(precision=precision, **options) for precision in precisions]
    return [head_result(setup, measure_heads(setup, contestants)) for setup in setups]


def _run_prepare(options: dict[str, Any]) -> list[Result]:
    measured = measure_preparation(**options)
    return [preparation_result(options, measured)]


def _run_processes(options: dict[str, Any]) -> list[Result]:
    counts = options.pop("counts")
    return [run_scaling(Setup(accumulation=1, precision="float32", **options), counts)]


def _run_models(options: dict[str, Any]) -> list[Result]:
    model, precisions = options.pop("model"), options.pop("precisions")
    setup = Setup(shape="", model=model, accumulation=1, precision="", **options)
    return [decisions_result(setup, model, measure_decisions(setup, model, precisions))]


_TRAINING = ("step", "train", "memory", "profile")
_COMMANDS = {
    "step": _run_step,
    "train": _run_train,
    "memory": _run_memory,
    "profile": _run_profile,
    "head": _run_head,
    "prepare": _run_prepare,
    "processes": _run_processes,
    "models": _run_models,
}
