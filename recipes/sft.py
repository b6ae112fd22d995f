"""Fine-tunes a language model on responses: `accelerate launch recipes/sft.py [config.yaml]`.

Without arguments it trains a small model on small tasks, offline, in about two minutes on a
laptop, and shows what it learned. With a YAML file or flags it trains any model on any data.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from arguments import parse_arguments
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import LoraConfig
from quickstart import build_model, make_tasks, train_tokenizer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer

CONFIGS = Path(__file__).parent / "configs"
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class ModelArguments:
    """Which model is trained."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to fine-tune: a name on the Hub, or a folder."}
    )
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Builds an untrained model from this config instead: model_type and any of "
            "its fields, as a YAML mapping or JSON."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer. None: that of the model; for an untrained model a new one, "
            "trained on the training texts."
        },
    )
    tokenizer_vocab_size: int = field(
        default=512, metadata={"help": "Vocabulary of a newly trained tokenizer."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "File with a chat template for the tokenizer."}
    )
    lora: bool = field(
        default=False,
        metadata={"help": "Trains a LoRA adapter and leaves the model itself as it is."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the adapter: its output is times alpha / r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: str = field(
        default="all-linear",
        metadata={"help": "Modules that get an adapter: 'all-linear', or names with commas."},
    )


@dataclass
class DataArguments:
    """Which rows it is trained on."""

    _argument_group_name = "data (none named: the quickstart tasks)"

    train_file: str | None = field(
        default=None,
        metadata={"help": "Rows as .json, .jsonl, .csv or .parquet, or a folder of `datasets`."},
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Held-out rows, in any of the same forms."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    eval_share: float = field(
        default=0.0,
        metadata={"help": "Share of the training rows, 0 to 1, held out where none are named."},
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Trains on the first rows only."}
    )
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Evaluates on the first rows only."}
    )
    num_samples: int = field(default=8, metadata={"help": "Generated answers to show at the end."})
    num_cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process on a machine without an accelerator. None: all cores, "
            "shared by the processes (accelerate launch would give each process one)."
        },
    )


def main() -> None:
    """Runs the recipe."""
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, MaskedSFTConfig),
        sys.argv[1:],
        default_config=CONFIGS / "quickstart.yaml",
        description=__doc__ or "",
    )
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    use_all_cores(args, data_args.num_cpu_threads)
    set_seed(args.seed)
    try:
        trainer = make_trainer(model_args, data_args, args)
    except ValueError as error:
        # Whatever is wrong with settings or data is said there; a traceback would only hide it.
        raise SystemExit(f"sft.py: {error}") from None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        print_results(trainer, data_args.num_samples)
    trainer.accelerator.end_training()


def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: MaskedSFTConfig
) -> MaskedSFTTrainer:
    """Loads everything and puts it together.

    Raises:
        ValueError: If settings, data and model do not fit each other.
    """
    train_rows, eval_rows = load_rows(data_args, seed=args.seed)
    model, tokenizer = load_model_and_tokenizer(model_args, train_rows)
    return MaskedSFTTrainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=lora_config(model_args),
    )


def use_all_cores(args: MaskedSFTConfig, num_threads: int | None) -> None:
    """Lets a machine without an accelerator use its cores."""
    if args.device.type == "cpu":
        available = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(num_threads or max(available, 1))


def load_rows(data_args: DataArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Loads the training rows and, where there are any, the held-out rows."""
    if data_args.train_file is not None:
        train = read_rows(data_args.train_file, data_args.train_split)
        evaluation = (
            read_rows(data_args.eval_file, data_args.eval_split or data_args.train_split)
            if data_args.eval_file
            else None
        )
    elif data_args.dataset_name is not None:
        name, config = data_args.dataset_name, data_args.dataset_config
        train = load_dataset(name, config, split=data_args.train_split)
        evaluation = (
            load_dataset(name, config, split=data_args.eval_split) if data_args.eval_split else None
        )
    else:
        train, evaluation = make_tasks()
    if evaluation is None and data_args.eval_share > 0:
        parts = train.train_test_split(test_size=data_args.eval_share, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    return first_rows(train, data_args.max_train_rows), first_rows(
        evaluation, data_args.max_eval_rows
    )


def read_rows(path: str, split: str) -> Dataset:
    """Reads rows from a file, or from a folder that `datasets` saved."""
    if Path(path).is_dir():
        saved = load_from_disk(path)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    if not Path(path).exists():
        raise ValueError(f"There is no '{path}' to read rows from.")
    suffix = Path(path).suffix
    if suffix not in FILE_FORMATS:
        raise ValueError(
            f"'{path}' ends in '{suffix}'; rows are read from {', '.join(FILE_FORMATS)} files and "
            "from folders saved by `datasets`."
        )
    return load_dataset(FILE_FORMATS[suffix], data_files=path, split="train")


def first_rows(dataset: Dataset | None, count: int | None) -> Any:
    """The first rows of a dataset; None takes all."""
    if dataset is None or count is None:
        return dataset
    return dataset.select(range(min(count, len(dataset))))


def load_model_and_tokenizer(
    model_args: ModelArguments, train_rows: Dataset
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The model, or its name for the trainer to load, and its tokenizer where it is not its own."""
    name = model_args.tokenizer_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name) if name else None
    model: Any = model_args.model_name_or_path
    if (model is None) == (model_args.model_config is None):
        raise ValueError(
            "Name the model to fine-tune with model_name_or_path, or describe an untrained one "
            "with model_config; one of the two."
        )
    if model_args.model_config is not None:
        config = model_args.model_config
        config = json.loads(config) if isinstance(config, str) else config
        if tokenizer is None:
            tokenizer = train_tokenizer(list(texts_of(train_rows)), model_args.tokenizer_vocab_size)
        model = build_model(config, tokenizer)
    if model_args.chat_template_path is not None:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = Path(model_args.chat_template_path).read_text(encoding="utf-8")
    return model, tokenizer


def texts_of(value: Any) -> Any:
    """Every text inside rows, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, list | Dataset):
        for part in value:
            yield from texts_of(part)


def lora_config(model_args: ModelArguments) -> LoraConfig | None:
    """The adapter that the flags describe; None without `--lora`."""
    if not model_args.lora:
        return None
    modules = model_args.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=modules.split(",") if "," in modules else modules,
    )


def print_results(trainer: MaskedSFTTrainer, num_samples: int) -> None:
    """Shows the evaluation before and after, some answers, and where everything is."""
    console = Console()
    evaluations = [record for record in trainer.state.log_history if "eval_loss" in record]
    if evaluations:
        table = Table(title="Held-out rows", title_justify="left")
        table.add_column("")
        before = evaluations[0] if evaluations[0]["step"] == 0 else {}
        for title in (*(["before training"] if before else []), "after training"):
            table.add_column(title, justify="right")
        for key in ("eval_exact_match", "eval_loss", "eval_perplexity", "eval_token_accuracy"):
            if key in evaluations[-1]:
                figures = [record[key] for record in ((before,) if before else ())]
                figures.append(evaluations[-1][key])
                style = ".1%" if key in ("eval_exact_match", "eval_token_accuracy") else ".3f"
                name = key.removeprefix("eval_").replace("_", " ")
                table.add_row(name, *(format(figure, style) for figure in figures))
        console.print(table)
    if trainer.responses and num_samples > 0:
        table = Table(title="Some answers to held-out prompts", title_justify="left")
        for column in ("prompt", "answer", "expected", "same"):
            table.add_column(column, overflow="fold")
        step = max(len(trainer.responses) // num_samples, 1)
        for response in trainer.responses[::step][:num_samples]:
            same = response.response.strip() == response.reference.strip()
            texts = (" ".join(text.split()) for text in response)
            table.add_row(*texts, "yes" if same else "no")
        console.print(table)
    folder = Path(str(trainer.args.output_dir))
    console.print(f"Model, tokenizer, model card, report/ and metrics.jsonl are in {folder}/")


if __name__ == "__main__":
    main()
