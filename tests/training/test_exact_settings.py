"""Settings that would make the numbers inexact are refused before anything runs."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer

from hf_sft_plugin import MaskedLossMixin, MaskedSFTConfig


class MaskedTrainer(MaskedLossMixin, Trainer):
    """Somebody's own trainer."""


def test_a_loss_function_that_would_never_be_called_is_refused(
    model: Any, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    with pytest.raises(ValueError, match="compute_loss_func was given"):
        MaskedTrainer(
            model=model, args=make_config(), compute_loss_func=lambda *args, **kwargs: None
        )


def test_several_gpus_in_one_process_are_refused_with_the_command_to_use(
    model: Any, make_config: Callable[..., MaskedSFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make_config()
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match="accelerate launch --num_processes 4"):
        MaskedTrainer(model=model, args=args)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("get_cp_size", "Context or sequence parallelism splits rows"),
        ("get_sp_size", "Context or sequence parallelism splits rows"),
        ("get_tp_size", "Under tensor parallelism several processes see the same rows"),
    ],
)
def test_parallelism_within_a_row_is_refused(
    method: str,
    message: str,
    model: Any,
    make_config: Callable[..., MaskedSFTConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MaskedTrainer, method, lambda self: 2)
    with pytest.raises(ValueError, match=message):
        MaskedTrainer(model=model, args=make_config())
