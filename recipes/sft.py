"""Fine-tunes a language model on responses: `accelerate launch recipes/sft.py [config.yaml]`.

Without arguments it trains a small model on small tasks, offline, in about two minutes on a
laptop, and shows what it learned. With a YAML file or flags it trains any model on any data.
"""

import json
import logging
import sys
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import cpu_threads  # noqa: F401  # before torch is loaded
import evaluate
from arguments import named_flags, nearest, parse_arguments
from datasets import Dataset
from parallel import show_progress_once, use_all_cores
from peft import LoraConfig
from quickstart import build_model, train_tokenizer
from rich.console import Console
from rich.table import Table
from rows import DataArguments, load_rows
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_sft_plugin import (
    MaskedSFTConfig,
    MaskedSFTTrainer,
    ShardDataset,
    visible_lines,
)

CONFIGS = Path(__file__).parent / "configs"


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
            "help": "Tokenizer. None: that of the model; for an untrained model that of the shards "
            "it is trained on, or a new one, trained on the training texts."
        },
    )
    tokenizer_vocab_size: int = field(
        default=512, metadata={"help": "Vocabulary of a newly trained tokenizer."}
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


def main() -> None:
    """Trains, evaluates and saves, on as many processes as were launched."""
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, MaskedSFTConfig),
        sys.argv[1:],
        default_config=CONFIGS / "quickstart.yaml",
        description=__doc__ or "",
    )
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    use_all_cores(args, data_args.num_cpu_threads)
    show_progress_once(args)
    set_seed(args.seed)
    try:
        require_lora(model_args, named_flags(sys.argv[1:]))
        checkpoint = find_checkpoint(args)
        trainer = make_trainer(model_args, data_args, args)
    except ValueError as error:
        # Whatever is wrong with settings or data is said there; a traceback would only hide it.
        raise SystemExit(visible_lines(f"sft.py: {error}")) from None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        if not is_explained(error):
            raise
        raise SystemExit(visible_lines(f"sft.py: {error}")) from None
    if trainer.state.global_step < trainer.state.max_steps:
        # SIGTERM leaves little time, and a model that is not finished is not to be published.
        return
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        print_results(trainer, data_args.num_samples)


def is_explained(error: Exception) -> bool:
    """Whether the plugin raised it, which says what to do; a traceback would only hide that."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("hf_sft_plugin.")


def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: MaskedSFTConfig
) -> MaskedSFTTrainer:
    """Loads everything and puts it together.

    Raises:
        ValueError: If settings, data and model do not fit each other.
    """
    require_metrics(args)
    train_rows, eval_rows = load_rows(data_args, args.seed, args.use_loss_mask)
    ignored = [name for name in ("eval_masks", "predict_with_generate") if getattr(args, name)]
    if eval_rows is None and ignored:
        raise ValueError(
            f"{ignored[0]} is set, but there are no held-out rows to evaluate. Name some with "
            "eval_file or eval_split, or hold out a share with eval_share."
        )
    model, tokenizer = load_model_and_tokenizer(model_args, train_rows)
    try:
        return MaskedSFTTrainer(
            model,
            args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=lora_config(model_args),
        )
    except OSError as error:
        # `from_pretrained` says in an OSError without a number that it found nothing to load; the
        # system's own, such as a full disk, have one.
        if error.errno is not None or not isinstance(model, str):
            raise
        raise ValueError(_cannot_load("model_name_or_path", model, error)) from error


def find_checkpoint(args: MaskedSFTConfig) -> str | bool | None:
    """The checkpoint to resume from: a folder, or True for the last complete one in output_dir.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    output_dir = Path(str(args.output_dir))
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if str(asked).lower() == "true":
        if last is None:
            raise ValueError(
                f"resume_from_checkpoint is true, but '{output_dir}' holds no checkpoint-* folder. "
                "Leave it out to start anew, or set output_dir to that of the run to go on with."
            )
        return True
    if not Path(asked, "trainer_state.json").is_file():
        hint = f"The last one in output_dir is '{last}'." if last else "Leave it out to start anew."
        raise ValueError(
            f"resume_from_checkpoint is '{asked}', but there is no trainer_state.json in it, so it "
            f"is not a checkpoint of a run. {hint}"
        )
    return asked


def require_metrics(args: MaskedSFTConfig) -> None:
    """Loads the metrics of generated responses once, before anything else takes time.

    Raises:
        ValueError: If one cannot be loaded.
    """
    for name in args.generation_metrics if args.predict_with_generate else ():
        if name != "exact_match":  # built in
            try:
                evaluate.load(name)
            except (OSError, ImportError) as error:
                raise ValueError(
                    f"generation_metrics names '{name}', which cannot be loaded: {error} Use "
                    "'exact_match', which is built in, or the path of a metric of `evaluate`, or "
                    "give it what it asks for."
                ) from error


def load_model_and_tokenizer(
    model_args: ModelArguments, train_rows: Dataset | ShardDataset
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The model, or its name for the trainer to load, and its tokenizer where it is not its own."""
    model: Any = model_args.model_name_or_path
    if (model is None) == (model_args.model_config is None):
        raise ValueError(
            "Name the model to fine-tune with model_name_or_path, or describe an untrained one "
            "with model_config; one of the two."
        )
    name = model_args.tokenizer_name_or_path
    tokenizer = load_tokenizer("tokenizer_name_or_path", name) if name else None
    if model_args.model_config is not None:
        config = read_model_config(model_args.model_config)
        if tokenizer is None:
            tokenizer = make_tokenizer(model_args, train_rows)
        model = build_model(config, tokenizer)
    return model, tokenizer


def make_tokenizer(
    model_args: ModelArguments, train_rows: Dataset | ShardDataset
) -> PreTrainedTokenizerBase:
    """The tokenizer of an untrained model: that of its shards, or a new one of its texts."""
    if isinstance(train_rows, ShardDataset):
        return load_tokenizer("train_file", str(train_rows.folder / "tokenizer"))
    return train_tokenizer(list(texts_of(train_rows)), model_args.tokenizer_vocab_size)


def load_tokenizer(setting: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a setting names."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(_cannot_load(setting, name, error)) from error


def _cannot_load(setting: str, name: str, error: OSError) -> str:
    reason = " ".join(str(error).split())
    return (
        f"{setting} is '{name}', from which nothing could be loaded: {reason} Name a folder with a "
        "saved model and tokenizer, or one on the Hub that can be reached."
    )


def read_model_config(config: dict[str, Any] | str) -> dict[str, Any]:
    """The config of an untrained model, which may be JSON.

    Raises:
        ValueError: If it is no mapping, or its model_type is missing or unknown.
    """
    example = 'such as \'{"model_type": "qwen3", "hidden_size": 64}\''
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"model_config is {config!r:.80}, which is not JSON ({error}). Give a JSON object "
                f"{example}."
            ) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(
            f"model_config is {json.dumps(config):.80}, without a model_type, so nothing says what "
            f"to build. Give a JSON object {example}."
        )
    if config["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"model_config: the model_type '{config['model_type']}' is unknown to transformers."
            f"{nearest(str(config['model_type']), list(CONFIG_MAPPING), otherwise='')}"
        )
    known = CONFIG_MAPPING[config["model_type"]]()
    names = {*known.to_dict(), *known.attribute_map, *PreTrainedConfig().to_dict()}
    unknown = next((name for name in config if name not in names), None)
    if unknown is not None:
        raise ValueError(
            f"model_config: '{unknown}' is no field of a {config['model_type']} config."
            f"{nearest(unknown, sorted(names), otherwise='')}"
        )
    return config


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


def require_lora(model_args: ModelArguments, flags: Collection[str]) -> None:
    """Refuses settings of an adapter where none is trained.

    A settings file may state the defaults, so that `--lora false` turns lora.yaml into full
    fine-tuning; a flag says what its user wants.

    Raises:
        ValueError: If there are such settings.
    """
    for setting in fields(ModelArguments):
        if model_args.lora or not setting.name.startswith("lora_"):
            continue
        value = getattr(model_args, setting.name)
        if setting.name in flags or value != setting.default:
            raise ValueError(
                f"{setting.name} is {value!r}, but there is no --lora, so no adapter would be made "
                "and all weights would be trained. Add --lora (in YAML lora: true), or leave "
                f"{setting.name} out."
            )


def lora_config(model_args: ModelArguments) -> LoraConfig | None:
    """The adapter that the flags describe; None without `--lora`.

    Raises:
        ValueError: If no module is named.
    """
    if not model_args.lora:
        return None
    modules = model_args.lora_target_modules
    names = [name.strip() for name in modules.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"lora_target_modules is {modules!r}, which names no module, so nothing would get an "
            "adapter. Give 'all-linear', or names with commas, such as 'q_proj,v_proj'."
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        # PEFT takes a text for a regular expression over whole names, unless it is this one.
        target_modules="all-linear" if names == ["all-linear"] else names,
    )


def print_results(trainer: MaskedSFTTrainer, num_samples: int) -> None:
    """Shows the evaluation before and after, some answers, and where everything is."""
    console = Console(markup=False, emoji=False)  # rows and models write text, not markup
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
            texts = (visible_lines(" ".join(text.split())) for text in response[:3])
            table.add_row(*texts, "yes" if same else "no")
        console.print(table)
    folder = visible_lines(str(Path(str(trainer.args.output_dir))))
    console.print(f"Model, tokenizer, model card, report/ and metrics.jsonl are in {folder}/")


if __name__ == "__main__":
    main()
