"""Settings of a recipe from a YAML file and flags; a name that does not exist is never ignored."""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser


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
        for key in settings:
            if key not in names:
                parser.error(f"{config}: unknown key '{key}'.{_nearest(key, names)}")
        parser.set_defaults(**{name: _as_default(value) for name, value in settings.items()})
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        flags = [f"--{name}" for name in names]
        parser.error(f"unknown argument '{unknown[0]}'.{_nearest(unknown[0], flags)}")
    return tuple(instances)


def _names_model_or_data(arguments: Sequence[str]) -> bool:
    named = {argument.split("=")[0].replace("-", "_").lstrip("_") for argument in arguments}
    return bool(named & {"model_name_or_path", "model_config", "train_file", "dataset_name"})


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


def _nearest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name.split("=")[0], names, n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else " See --help for all of them."


_CONFIGS = Path(sys.argv[0]).parent / "configs"
