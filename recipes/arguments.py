"""Settings of a recipe from a YAML file and flags; a name that does not exist is never ignored."""

import argparse
import dataclasses
import difflib
import itertools
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser

# Settings that name training rows, and those that say more of them.
_SOURCES = {
    "tasks": ("tasks",),
    "train_file": ("train_file", "train_split", "eval_split"),
    "dataset_name": ("dataset_name", "dataset_config"),
}


def parse_arguments(
    classes: Sequence[type], argv: Sequence[str], default_config: Path, description: str
) -> tuple[Any, ...]:
    """Builds dataclasses from a YAML file, then from flags, which overrule it.

    Args:
        classes: Dataclasses whose fields are the settings.
        argv: Arguments after the program's name; the first may be the path of a YAML file.
        default_config: The YAML file that is used when there are no arguments at all, or only
            flags that name neither a model nor data.
        description: What the program does, for `--help`.

    Returns:
        One instance per class.

    Raises:
        SystemExit: With code 2 and one clear message, if a name or value is wrong.
    """
    parser = HfArgumentParser(
        cast(Any, classes),
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [config.yaml] [--flag value ...]",
    )
    arguments = list(argv)
    config = None
    if arguments and not arguments[0].startswith("-"):
        config = Path(arguments.pop(0))
    elif not _names_model_or_data(arguments):
        config = default_config
    names = [field.name for type_ in classes for field in dataclasses.fields(type_) if field.init]
    if config is not None:
        settings = _read_yaml(parser, config)
        _check_settings(parser, config, settings, classes)
        if named_flags(arguments) & _SOURCES.keys():
            # Rows that are named by flag take the place of those in the file.
            for key in {key for keys in _SOURCES.values() for key in keys}:
                settings.pop(key, None)
        parser.set_defaults(**{name: _as_default(value) for name, value in settings.items()})
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        flags = [f"--{name}" for name in names]
        parser.error(f"unknown argument '{unknown[0]}'.{nearest(unknown[0], flags)}")
    return tuple(instances)


def _check_settings(
    parser: HfArgumentParser, config: Path, settings: dict[str, Any], classes: Sequence[type]
) -> None:
    """Ends the program at a key that does not exist, or at a yes or no that cannot be meant."""
    fields = {
        field.name: field for type_ in classes for field in dataclasses.fields(type_) if field.init
    }
    for key, value in settings.items():
        if key not in fields:
            parser.error(f"{config}: unknown key '{key}'.{nearest(str(key), list(fields))}")
        # What is hidden are settings of another recipe, which play no part in this one.
        is_hidden = fields[key].metadata.get("help") == argparse.SUPPRESS
        if isinstance(value, bool) and not is_hidden and not _takes_bool(key, fields[key].type):
            parser.error(
                f"{config}: {key} is {value}, but it is not a yes-or-no setting. YAML reads yes, "
                f'no, on and off as true and false: put quotes around them, such as {key}: "no".'
            )


def named_flags(arguments: Sequence[str]) -> set[str]:
    """The settings that are named on the command line.

    Examples:
        >>> sorted(named_flags(["a.yaml", "--lora-r=8", "--bf16", "1"]))
        ['bf16', 'lora_r']
    """
    flags = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def nearest(
    name: str, names: Sequence[str], otherwise: str = " See --help for all of them."
) -> str:
    """A sentence that names what may have been meant.

    Common words and a common beginning count beside common letters, so that `lora_rank` is nearer
    to `lora_r` than to `local_rank`.

    Args:
        name: What was written.
        names: What there is.
        otherwise: The sentence where nothing is near.

    Examples:
        >>> nearest("lora_rank", ["local_rank", "lora_r"])
        " Did you mean 'lora_r'?"
    """
    likeness, best = max((_likeness(name.split("=")[0], other), other) for other in names)
    return f" Did you mean '{best}'?" if likeness >= 1 else otherwise


def _likeness(name: str, other: str) -> float:
    """From 0, nothing in common, to 3, the same."""
    name, other = (text.replace("-", "_").strip("_") for text in (name, other))
    words, others = name.split("_"), other.split("_")
    letters = difflib.SequenceMatcher(None, name, other).ratio()
    pairs = zip(name, other, strict=False)
    start = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return letters + start / max(len(name), 1) + len({*words} & {*others}) / len(words)


def _names_model_or_data(arguments: Sequence[str]) -> bool:
    data = {"train_file", "eval_file", "dataset_name"}
    return bool(named_flags(arguments) & {"model_name_or_path", "model_config", *data})


def _takes_bool(name: str, type_: Any) -> bool:
    # True is the last checkpoint, although transformers declares a text.
    return name == "resume_from_checkpoint" or type_ is bool or bool in typing.get_args(type_)


def _read_yaml(parser: HfArgumentParser, path: Path) -> dict[str, Any]:
    if not path.is_file():
        parser.error(f"there is no settings file '{path}'; the ready-made ones are in {_CONFIGS}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(settings, dict):
        parser.error(f"{path} holds a {type(settings).__name__}; settings are 'name: value' lines")
    return settings


def _as_default(value: Any) -> Any:
    # YAML 1.1 reads 3e-4 as text, and argparse converts defaults only where they are text.
    return value if isinstance(value, bool | list | dict) or value is None else str(value)


_CONFIGS = Path(sys.argv[0]).parent / "configs"
