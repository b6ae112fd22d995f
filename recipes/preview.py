"""Shows which tokens of each row would be trained, and why, before anything is paid for.

It takes the YAML file or the flags of sft.py and loads no model, only the tokenizer; without any it
shows rows of the quickstart. Trained text is coloured, or stands in brackets where there is no
colour, and below each row stands why each span of it is trained. `--only set_aside` shows rows
that cannot be trained and the cure, `--only truncated` rows that lose tokens, `--containing TEXT
--ids` the tokens of rows that you have a question about, `--html rows.html` a page to search in
the browser, and `--against other.yaml` what other settings would train instead. Settings that
concern only training are accepted and play no part.
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Collection
from typing import Any

import sft
from arguments import parse_arguments
from datasets import Dataset
from rows import DataArguments, load_rows
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_sft_plugin import (
    DataOptions,
    MaskedSFTConfig,
    PreviewArguments,
    TokenizationSetup,
    make_tokenization_setup,
    read_chat_template,
    show_preview,
    visible_lines,
)

_TOKENIZER_SETTINGS = (
    "model_name_or_path",
    "model_config",
    "tokenizer_name_or_path",
    "tokenizer_vocab_size",
)
_ROW_SETTINGS = (
    "tasks",
    "train_file",
    "dataset_name",
    "dataset_config",
    "train_split",
    "block_size",
    "max_train_rows",
)


def main() -> None:
    """Runs the recipe."""
    model_args, data_args, options, training, arguments = _parse(sys.argv[1:])
    try:
        rows, _ = load_rows(data_args, int(training.seed or 42), options.use_loss_mask)
        tokenizer = load_tokenizer(model_args, rows, training.chat_template_path)
        setup = make_tokenization_setup(tokenizer, options, _model(model_args))
        against = None
        if arguments.against is not None:
            against = _other_setup(arguments.against, model_args, rows, tokenizer)
        show_preview(rows, setup, arguments, against=against)
    except (OSError, ValueError) as error:
        # Whatever is wrong with settings or data is said there; a traceback would only hide it.
        raise SystemExit(visible_lines(f"preview.py: {error}")) from None


def load_tokenizer(
    model_args: sft.ModelArguments, rows: Dataset, chat_template_path: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that sft.py would use, with its chat template.

    Raises:
        ValueError: If no model and no tokenizer is named.
    """
    name = model_args.tokenizer_name_or_path or model_args.model_name_or_path
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    elif model_args.model_config is not None:
        tokenizer = sft.make_tokenizer(model_args, rows)
    else:
        raise ValueError(
            "Name the model to fine-tune with model_name_or_path, or only a tokenizer with "
            "tokenizer_name_or_path."
        )
    if chat_template_path is not None:
        tokenizer.chat_template = read_chat_template(chat_template_path)
    return tokenizer


def _other_setup(
    settings_file: str,
    model_args: sft.ModelArguments,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizationSetup:
    """The setup of another settings file; where it names no tokenizer, with the same one."""
    other, _, options, training, _ = _parse([settings_file])
    path = training.chat_template_path
    if other.model_name_or_path or other.tokenizer_name_or_path or other.model_config:
        return make_tokenization_setup(load_tokenizer(other, rows, path), options, _model(other))
    if path is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = read_chat_template(path)
    return make_tokenization_setup(tokenizer, options, _model(model_args))


def _model(model_args: sft.ModelArguments) -> Any:
    """Name or config of the model, which knows stop tokens and the longest row."""
    config = model_args.model_config
    if config is None:
        return model_args.model_name_or_path
    return AutoConfig.for_model(**(json.loads(config) if isinstance(config, str) else config))


def _parse(argv: list[str]) -> tuple[Any, ...]:
    return parse_arguments(
        (
            _showing(sft.ModelArguments, _TOKENIZER_SETTINGS),
            _showing(DataArguments, _ROW_SETTINGS),
            DataOptions,
            _training_settings(),
            PreviewArguments,
        ),
        argv,
        default_config=sft.CONFIGS / "quickstart.yaml",
        description=__doc__ or "",
    )


def _showing(type_: type, names: Collection[str]) -> type:
    """The same settings, of which only those with these names are in the help."""
    hidden = [field for field in dataclasses.fields(type_) if field.name not in names]
    return dataclasses.make_dataclass(
        type_.__name__,
        [_hide(field, field.type, field.default) for field in hidden],
        bases=(type_,),
    )


def _training_settings() -> type:
    """Settings that sft.py knows, so that its files work as they are; one of them counts here."""
    known = DataOptions.__dataclass_fields__
    fields = [
        field
        for field in dataclasses.fields(MaskedSFTConfig)
        if field.init and field.name not in known
    ]
    settings = [
        (field.name, str | None, dataclasses.field(default=None, metadata=field.metadata))
        if field.name == "chat_template_path"
        else _hide(field, str | None, None)
        for field in fields
    ]
    return dataclasses.make_dataclass("TrainingSettings", settings)


def _hide(field: dataclasses.Field[Any], type_: Any, default: Any) -> tuple[str, Any, Any]:
    hidden = dataclasses.field(default=default, metadata={"help": argparse.SUPPRESS})
    return field.name, type_, hidden


if __name__ == "__main__":
    main()
