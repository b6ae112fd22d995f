"""Any LM head, in the way that is exact for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sft_plugin import LogitTransform, LossObjective, head_loss

NUM_ROWS, HIDDEN, VOCAB = 9, 5, 12


def make_heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    wide = nn.Linear(HIDDEN, VOCAB)
    return {
        "linear": wide,
        "frozen": nn.Linear(HIDDEN, VOCAB).requires_grad_(requires_grad=False),
        "two layers": nn.Sequential(nn.Linear(HIDDEN, 3), nn.Linear(3, VOCAB, bias=False)),
        "no parameters": nn.ReflectionPad1d((0, 3)),
    }


@pytest.mark.parametrize("settings", [{}, {"loss_type": "focal", "entropy_coef": 0.1}], ids=str)
@pytest.mark.parametrize("name", make_heads())
def test_every_head_has_the_loss_and_gradient_of_the_formula(
    name: str, settings: dict[str, Any], reference_losses: Callable[..., Tensor]
) -> None:
    head = make_heads()[name].double()
    rows = torch.randn(NUM_ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    logits = 2 * head(rows)
    targets = torch.arange(NUM_ROWS) % logits.shape[1]
    weights = torch.rand(NUM_ROWS, dtype=torch.float64)
    expected = (reference_losses(logits, targets, **settings) * weights).sum()
    objective, transform = LossObjective(**settings), LogitTransform(multiplier=2.0)
    result = head_loss(head, rows, targets, weights, transform=transform, objective=objective)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    inputs = [rows, *(p for p in head.parameters() if p.requires_grad)]
    pairs = zip(*(torch.autograd.grad(x, inputs) for x in (result.loss, expected)), strict=True)
    for found, true in pairs:
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-13)


def test_a_forward_that_is_given_stands_for_that_of_the_module() -> None:
    head = nn.Linear(HIDDEN, VOCAB)
    rows, targets, weights = torch.randn(2, HIDDEN), torch.tensor([0, 1]), torch.ones(2)
    own_forward = head.forward
    expected = head_loss(head, rows, targets, weights).loss
    head.forward = lambda hidden: own_forward(hidden) * torch.nan
    assert head_loss(head, rows, targets, weights).loss.isnan()
    found = head_loss(head, rows, targets, weights, forward=own_forward).loss
    torch.testing.assert_close(found, expected)
