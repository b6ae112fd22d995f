"""The settings: defaults, refusals, the command line, and what leaves the process."""

import argparse
import copy
import dataclasses
import io
import json
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_sft_plugin import LossNormalization, MaskedSFTConfig
from hf_sft_plugin.training.speed_options import SpeedOptions
from hf_sft_plugin.types import DataOptions

Make = Callable[..., MaskedSFTConfig]
TOKEN = "hf_" + "s" * 34
OWN_DEFAULTS = {
    "loss_normalization": "token",
    "normalize_constant": None,
    "loss_type": "nll",
    "focal_gamma": None,
    "z_loss_coef": 0.0,
    "entropy_coef": 0.0,
    "fused_head": "auto",
    "max_tokens_per_microbatch": "auto",
    "auto_gradient_checkpointing": False,
    "packing": False,
    "verify_before_training": False,
    "keep_freed_memory": True,
    "padding_free": "auto",
    "shared_prompts": "auto",
    "trained_positions_only": "auto",
    "fused_layers": "auto",
    "group_by_prompt": False,
    "max_dropped_share": 0.05,
    "dataset_num_proc": None,
    "chat_template_path": None,
    "model_tags": None,
    "pad_to_multiple_of": None,
    "model_init_kwargs": None,
    "eval_masks": [],
    "predict_with_generate": False,
    "generation_metrics": ["exact_match"],
    "generation_max_new_tokens": 256,
    "generation_num_rows": None,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "logging_steps": 10,
    "activation_checkpointing": None,
    "activation_checkpointing_kwargs": None,
}
# None until the settings are checked: the older name may say more.
CHECKED_DEFAULTS = {**OWN_DEFAULTS, "activation_checkpointing": False}
DATA_DEFAULTS = {
    "max_length": None,
    "overflow": "keep_start",
    "prompt_column": None,
    "response_column": None,
    "messages_column": None,
    "prompt_format": "plain",
    "stop_token": None,
    "data_format": "auto",
    "ignored_columns": None,
    "chat_template_kwargs": None,
    "train_on": "response",
    "train_roles": ["assistant"],
    "use_loss_mask": True,
    "multi_turn": "auto",
    "boundary": "split",
    "control_tokens": "text",
}


def test_every_setting_of_our_own_has_its_default_and_a_help_text() -> None:
    fields = {field.name: field for field in dataclasses.fields(MaskedSFTConfig)}
    own = {*vars(MaskedSFTConfig)["__annotations__"], *DataOptions.__dataclass_fields__}
    own |= SpeedOptions.__dataclass_fields__.keys()
    own -= {name for name in own if fields[name].metadata["help"] == argparse.SUPPRESS}
    assert own == {*OWN_DEFAULTS, *DATA_DEFAULTS}
    for name, default in (OWN_DEFAULTS | DATA_DEFAULTS).items():
        factory = fields[name].default_factory
        assert default == (fields[name].default if factory is dataclasses.MISSING else factory())
        assert len(fields[name].metadata["help"]) > 20, name
        assert fields[name].metadata["help"].endswith("."), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_normalization": "mean"}, "loss_normalization is 'mean'; .*token, example, const"),
        ({"loss_normalization": None}, "loss_normalization is None; choose one of token"),
        (
            {"loss_normalization": "constant"},
            "go together: normalize_constant is None and loss_normalization is 'constant'",
        ),
        (
            {"normalize_constant": 5.0},
            "go together: normalize_constant is 5.0 and loss_normalization is 'token'",
        ),
        *(
            (
                {"loss_normalization": "constant", "normalize_constant": value},
                f"normalize_constant is {value}; a divisor is positive and finite",
            )
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        ({"shared_prompts": "on"}, "shared_prompts is 'on'; choose auto or off"),
        ({"trained_positions_only": "on"}, "trained_positions_only is 'on'; choose auto or off"),
        (
            {"group_by_prompt": True, "train_sampling_strategy": "sequential"},
            "group_by_prompt is set, and train_sampling_strategy is 'sequential'",
        ),
        ({"loss_type": "hinge"}, "loss_type is 'hinge'; choose one of nll, dft, focal"),
        ({"focal_gamma": 2.0}, "focal_gamma is 2.0, but loss_type is 'nll'.*leave focal_gamma out"),
        ({"loss_type": "focal", "focal_gamma": -1.0}, "focal_gamma is -1.0, but the exponent is"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing is 1.0; a share"),
        ({"fused_head": "yes"}, "fused_head is 'yes'; choose auto, on or off"),
        ({"fused_head": False}, "fused_head is False; choose auto, on or off. In YAML put quotes"),
        ({"padding_free": True}, "padding_free is True; choose auto, on or off. In YAML put"),
        *(
            ({"max_dropped_share": value}, f"max_dropped_share is {value}; a share is between 0 a")
            for value in (-0.1, 1.1, math.nan)
        ),
        *(
            ({name: value}, f"{name} is {value}; it counts from 1")
            for name in (
                *("dataset_num_proc", "pad_to_multiple_of", "generation_max_new_tokens"),
                *("generation_num_rows", "per_device_train_batch_size"),
                *("per_device_eval_batch_size", "gradient_accumulation_steps"),
            )
            for value in (0, -1)
        ),
        ({"pad_to_multiple_of": "64"}, "pad_to_multiple_of is '64'; give a whole number"),
        ({"pad_to_multiple_of": 64.0}, "pad_to_multiple_of is 64.0; give a whole number"),
        ({"generation_metrics": "bleu"}, r"is 'bleu'; give a list of names, such as \['bleu'\]"),
        ({"eval_masks": None}, "eval_masks is None; give a list of names"),
        ({"max_tokens_per_microbatch": 3.5}, "is 3.5; give a number of tokens, 'auto', or None"),
        *(
            ({"model_init_kwargs": value}, "; give a JSON object, such as")
            for value in ("dtype=bfloat16", "{dtype", "[1]", "3", "")
        ),
        ({"model_init_kwargs": {"token": TOKEN}}, "model_init_kwargs holds a token, .*HF_TOKEN"),
        ({"model_init_kwargs": f'{{"token": "{TOKEN}"}}'}, "holds a token, .*hf auth login"),
        (
            {"auto_gradient_checkpointing": True, "max_tokens_per_microbatch": 64},
            "nothing is estimated, because max_tokens_per_microbatch is 64. Set that to 'auto'",
        ),
        ({"eval_masks": "all"}, r"is 'all'; give a list of names, such as \['all'\]"),
        ({"eval_masks": ["all", "last"]}, "eval_masks names 'last'; choose some of response, "),
        ({"max_length": 1}, "max_length is 1, but a row needs at least 2 tokens"),
        ({"overflow": "cut"}, "overflow is 'cut'; .*keep_start, .*drop, error"),
        ({"prompt_format": "text"}, "prompt_format is 'text'; choose one of plain, chat"),
        (
            {"messages_column": "m", "prompt_column": "p"},
            "messages_column was given together with prompt_column",
        ),
        (
            {"messages_column": "m", "response_column": "r"},
            "messages_column was given together with prompt_column or response_column",
        ),
        ({"logging_strategy": "sometimes"}, "sometimes"),
    ],
)
def test_an_impossible_value_is_refused_with_what_is_possible(
    settings: dict[str, Any], message: str, make_config: Make
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_config(**settings)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_normalization": LossNormalization.EXAMPLE},
        {"loss_normalization": "constant", "normalize_constant": 1e-3},
        {"max_dropped_share": 0},
        {"max_dropped_share": 1},
        {"max_length": 2},
        {"generation_metrics": []},
        {"model_init_kwargs": {}},
        {"model_init_kwargs": {"token": True}},
    ],
)
def test_a_possible_value_is_kept(settings: dict[str, Any], make_config: Make) -> None:
    config = make_config(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def parse(*arguments: str) -> MaskedSFTConfig:
    (config,) = HfArgumentParser(MaskedSFTConfig).parse_args_into_dataclasses(
        ["--use_cpu", "--report_to", "none", *arguments]
    )
    return config


def test_no_argument_at_all_gives_the_defaults() -> None:
    config = parse()
    for name, default in (CHECKED_DEFAULTS | DATA_DEFAULTS).items():
        assert getattr(config, name) == default


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--loss_normalization", "example"], {"loss_normalization": "example"}),
        (
            ["--loss_normalization", "constant", "--normalize_constant", "4096"],
            {"loss_normalization": "constant", "normalize_constant": 4096.0},
        ),
        (["--fused_head", "off"], {"fused_head": "off"}),
        (["--padding_free", "off"], {"padding_free": "off"}),
        (["--max_dropped_share", "0.5"], {"max_dropped_share": 0.5}),
        (["--max_length", "128", "--overflow", "drop"], {"max_length": 128, "overflow": "drop"}),
        (["--stop_token", "<|im_end|>"], {"stop_token": "<|im_end|>"}),
        (["--predict_with_generate"], {"predict_with_generate": True}),
        (
            ["--generation_metrics", "exact_match", "bleu"],
            {"generation_metrics": ["exact_match", "bleu"]},
        ),
        (["--generation_num_rows", "7"], {"generation_num_rows": 7}),
        (["--logging_steps", "0.1"], {"logging_steps": 0.1}),
        (
            ["--model_init_kwargs", '{"dtype": "bfloat16", "use_cache": false, "n": {"x": 2}}'],
            {"model_init_kwargs": {"dtype": "bfloat16", "use_cache": False, "n": {"x": 2}}},
        ),
    ],
)
def test_settings_come_from_the_command_line(
    arguments: list[str], settings: dict[str, Any]
) -> None:
    config = parse(*arguments)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["--loss_normalization", "mean"], ["token", "example", "constant"]),
        (["--fused_head", "yes"], ["auto", "on", "off"]),
        (["--overflow", "wrap"], ["keep_start", "drop", "error"]),
        (["--prompt_format", "raw"], ["plain", "chat"]),
    ],
)
def test_the_command_line_names_the_choices(
    arguments: list[str], choices: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert arguments[1] in message
    assert all(choice in message for choice in choices)


def test_the_data_options_are_those_of_the_data_room(make_config: Make) -> None:
    given = {
        "max_length": 9,
        "overflow": "drop",
        "prompt_column": "p",
        "response_column": "r",
        "messages_column": None,
        "prompt_format": "chat",
        "stop_token": "<|im_end|>",
        "data_format": "prompt_response",
        "ignored_columns": ["id"],
        "chat_template_kwargs": {"enable_thinking": False},
        "train_on": "last_response",
        "train_roles": ["assistant", "tool"],
        "use_loss_mask": False,
        "multi_turn": "joint",
        "boundary": "include",
        "control_tokens": "keep",
    }
    assert make_config(**given).data_options() == given
    assert make_config().data_options() == DATA_DEFAULTS


def test_the_settings_become_json_without_secrets_and_come_back(make_config: Make) -> None:
    config = make_config(
        hub_token=TOKEN,
        stop_token="<|im_end|>",
        loss_normalization=LossNormalization.EXAMPLE,
        model_init_kwargs='{"dtype": "bfloat16"}',
    )
    settings = json.loads(config.to_json_string())
    expected = CHECKED_DEFAULTS | {
        "loss_normalization": "example",
        "model_init_kwargs": {"dtype": "bfloat16"},
        "stop_token": "<|im_end|>",
        "logging_steps": 1,
        "hub_token": "<HUB_TOKEN>",
    }
    assert {name: settings[name] for name in expected} == expected
    again = MaskedSFTConfig(**{**settings, "hub_token": None})
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("show", [repr, str, "{}".format, MaskedSFTConfig.to_json_string])
def test_nothing_that_is_printed_shows_the_hub_token(show: Any, make_config: Make) -> None:
    text = show(make_config(hub_token=TOKEN))
    assert TOKEN not in text
    assert "<HUB_TOKEN>" in text


def save_with_torch(config: MaskedSFTConfig) -> bytes:
    file = io.BytesIO()
    torch.save(config, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("dump", "load"),
    [
        (save_with_torch, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
        (pickle.dumps, pickle.loads),
    ],
    ids=["training_args.bin", "pickle"],
)
def test_a_pickle_keeps_everything_but_the_hub_token(
    dump: Callable[[Any], bytes], load: Callable[[bytes], Any], make_config: Make
) -> None:
    config = make_config(hub_token=TOKEN, max_length=9, model_init_kwargs='{"dtype": "auto"}')
    data = dump(config)
    assert TOKEN.encode() not in data
    assert config.hub_token == TOKEN
    loaded = load(data)
    assert isinstance(loaded, MaskedSFTConfig)
    assert loaded.hub_token is None
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_a_copy_in_memory_is_equal_keeps_the_token_and_stands_alone(
    duplicate: Callable[[Any], Any], make_config: Make
) -> None:
    config = make_config(hub_token=TOKEN, model_init_kwargs='{"dtype": "auto"}')
    other = duplicate(config)
    assert type(other) is MaskedSFTConfig
    assert other == config
    assert other.hub_token == TOKEN
    assert other.device == config.device
    other.max_length = 7
    assert config.max_length is None


def test_a_deep_copy_shares_no_list(make_config: Make) -> None:
    config = make_config()
    copy.deepcopy(config).generation_metrics.append("bleu")
    assert config.generation_metrics == ["exact_match"]


def test_a_replaced_value_is_checked_like_a_new_one(make_config: Make) -> None:
    config = make_config(hub_token=TOKEN)
    assert dataclasses.replace(config, max_length=7).max_length == 7
    with pytest.raises(ValueError, match="fused_head is 'maybe'"):
        dataclasses.replace(config, fused_head="maybe")


def test_no_memory_is_pinned_without_a_device(make_config: Make) -> None:
    assert make_config(dataloader_pin_memory=True).dataloader_pin_memory is False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"accelerator_config": {"split_batches": False}}, True),
        ({"accelerator_config": {"non_blocking": False}}, False),
        ({"dataloader_pin_memory": False}, False),
    ],
)
def test_batches_travel_to_a_gpu_while_the_host_goes_on(
    given: dict[str, Any],
    expected: bool,
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    config: Any = make_config(use_cpu=False, **given)
    assert config.accelerator_config.non_blocking is expected
    monkeypatch.undo()
    config = make_config(**given)
    assert config.accelerator_config.non_blocking is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": None}, "packing is set, but not max_length"),
        ({"padding_free": "off"}, "padding_free is 'off', which would pad the rows inside"),
        ({"group_by_prompt": True}, "fit together, and so group_by_prompt cannot"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "and so train_sampling_strategy 'group_by_length' cannot .* set that to 'random'",
        ),
    ],
)
def test_packing_is_refused_where_it_could_not_work(
    settings: dict[str, Any], message: str, make_config: Make
) -> None:
    usual: dict[str, Any] = {"packing": True, "max_length": 64}
    assert make_config(**usual, train_sampling_strategy="sequential").packing
    with pytest.raises(ValueError, match=message):
        make_config(**{**usual, **settings})


def test_tags_are_a_list_of_names(make_config: Make) -> None:
    assert make_config(model_tags=["chess"]).model_tags == ["chess"]
    with pytest.raises(ValueError, match=r"model_tags is 'chess'; give a list .* \['chess'\]"):
        make_config(model_tags="chess")


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_goes_by_both_of_its_names(name: str, make_config: Make) -> None:
    config = make_config(**{name: True, f"{name}_kwargs": '{"use_reentrant": false}'})
    copied = copy.deepcopy(dataclasses.replace(config, logging_steps=3))
    for each in (config, copied):
        assert (each.activation_checkpointing, each.gradient_checkpointing) == (True, True)
        assert each.activation_checkpointing_kwargs == {"use_reentrant": False}
        assert each.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("is_on", [False, True])
@pytest.mark.parametrize("is_rebuilt", [False, True])
def test_a_copy_can_be_changed_by_both_names_of_checkpointing(
    name: str, is_on: bool, is_rebuilt: bool, make_config: Make
) -> None:
    config = make_config(
        gradient_checkpointing=not is_on, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    changes = {name: is_on, f"{name}_kwargs": {"use_reentrant": False}}
    if is_rebuilt:
        changed = MaskedSFTConfig(**{**config.to_dict(), **changes})
    else:
        changed = dataclasses.replace(config, **changes)
    # And one of a copy.
    back = dataclasses.replace(changed, **{name: not is_on, f"{name}_kwargs": None})
    for each, state, options in (
        (changed, is_on, {"use_reentrant": False}),
        (back, not is_on, None),
    ):
        assert each.activation_checkpointing is each.gradient_checkpointing is state
        assert each.activation_checkpointing_kwargs == each.gradient_checkpointing_kwargs == options


@pytest.mark.parametrize(
    ("name", "values"), [("", (False, True)), ("_kwargs", ({"use_reentrant": True}, {}))]
)
def test_names_of_checkpointing_that_contradict_each_other_are_refused(
    name: str, values: tuple[Any, Any], make_config: Make
) -> None:
    both = [f"{each}_checkpointing{name}" for each in ("activation", "gradient")]
    message = f"{both[0]} is {values[0]}, and {both[1]}, its older name, is {values[1]}. Leave one"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(**dict(zip(both, values, strict=True)))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize(("flags", "is_on"), [((), True), (("true",), True), (("false",), False)])
def test_checkpointing_is_a_flag_by_both_of_its_names(
    name: str, flags: tuple[str, ...], is_on: bool
) -> None:
    (config,) = HfArgumentParser(MaskedSFTConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "true", f"--{name}", *flags]
    )
    assert config.activation_checkpointing is config.gradient_checkpointing is is_on


def test_a_subclass_may_have_a_constructor_of_its_own(tmp_path: Any) -> None:
    class Mine(MaskedSFTConfig):
        def __init__(self, mine: int = 1, **settings: Any) -> None:
            super().__init__(**settings)
            self.mine = mine

    class Derived(Mine):
        pass

    assert Derived(mine=2, output_dir=str(tmp_path), use_cpu=True).mine == 2
