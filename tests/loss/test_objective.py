"""The loss of a token: its values, its derivatives, and the values that are refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from objectives import OBJECTIVES
from torch import Tensor

from hf_sft_plugin.loss.objective import LossObjective, LossType
from hf_sft_plugin.loss.token_stats import token_terms


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_formula(
    settings: dict[str, Any], reference_losses: Callable[..., Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(9, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 7, (9,), generator=generator)
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    losses = LossObjective(**settings).token_losses(*token_terms(logits, targets)[0])
    expected = reference_losses(logits, targets, **settings)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad((losses * weights).sum(), logits)
    (true,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_it_needs_the_vocabulary_only_where_a_term_sums_over_it(settings: dict[str, Any]) -> None:
    objective = LossObjective(**settings)
    sums = {"label_smoothing", "z_loss_coef", "entropy_coef"}
    assert objective.needs_vocabulary == bool(sums & settings.keys())
    assert objective.is_nll == (settings == {})


@pytest.mark.parametrize("gamma", [0.25, 1.0, 2.0])
def test_a_certain_or_impossible_target_gives_no_nan(gamma: float) -> None:
    for settings in ({"loss_type": "dft"}, {"loss_type": "focal", "focal_gamma": gamma}):
        certain = torch.tensor([0.0, -1e-30, -200.0], requires_grad=True)
        losses = LossObjective(**settings).token_losses(certain)  # type: ignore[arg-type]  # mixed
        losses.sum().backward()
        assert certain.grad is not None
        assert certain.grad.isfinite().all()
        assert losses[:2].tolist() == [0.0, pytest.approx(0.0, abs=1e-29)]
    impossible = LossObjective(LossType.DFT).token_losses(torch.tensor([-math.inf]))
    assert impossible.tolist() == [0.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "hinge"}, "choose one of nll, dft, focal"),
        ({"focal_gamma": 0.0}, "set loss_type to 'nll'"),
        ({"focal_gamma": math.inf}, "focal_gamma is inf"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"z_loss_coef": -1e-4}, "z_loss_coef is -0.0001"),
        ({"entropy_coef": math.nan}, "entropy_coef is nan"),
    ],
)
def test_impossible_values_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LossObjective(**settings)
