"""What other trainers take is answered with what does the same here."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer

TAKES: Any = MaskedSFTTrainer


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("tokenizer", "as processing_class"),
        ("formatting_func", r"dataset\.map\("),
        ("compute_loss_func", "loss_type"),
        ("quantization_config", "model_init_kwargs"),
        ("dataset_text_field", r"rename_column\(name, 'text'\)"),
        ("max_seq_length", "max_length"),
        ("packing", r"MaskedSFTConfig\(packing=\.\.\.\)"),
        ("zzz", r"help\(MaskedSFTConfig\)"),
    ],
)
def test_an_argument_of_another_trainer_is_answered(
    name: str, answer: str, model: Any, tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    with pytest.raises(TypeError, match=f"takes no argument '{name}'.*{answer}"):
        TAKES(model, make_config(), processing_class=tokenizer, **{name: 1})


def test_an_argument_that_is_left_out_as_none_is_no_argument(
    model: Any, tokenizer: Any, make_config: Callable[..., Any]
) -> None:
    TAKES(model, make_config(), processing_class=tokenizer, formatting_func=None)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("dataset_text_field", "rename_column"),
        ("max_seq_length", "max_length"),
        ("truncation_mode", "overflow"),
        ("assistant_only_loss", "train_on='all'"),
        ("eos_token", "stop_token"),
        ("maxlength", "Did you mean 'max_length'"),
        ("zzz", r"help\(MaskedSFTConfig\)"),
    ],
)
def test_a_setting_of_another_config_is_answered(name: str, answer: str) -> None:
    with pytest.raises(TypeError, match=f"has no setting '{name}'.*{answer}"):
        MaskedSFTConfig(**{name: 1})


def test_a_config_of_its_own_has_settings_of_its_own(make_config: Callable[..., Any]) -> None:
    config = make_config(max_length=7)
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):  # noqa: S301
        assert again.max_length == 7
