"""Logits become statistics and their own gradient, whatever the sizes are multiples of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sft_plugin.loss.logit_tile import LogitTile, LogitTransform, RowValues, _row_maxima
from hf_sft_plugin.loss.objective import LossObjective

NUM_ROWS = 11


@pytest.mark.parametrize("size", [1, 3, 511, 512, 513, 1024, 1300])
def test_the_largest_number_and_its_first_position_are_found(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    # Small whole numbers, so that most rows hold their largest several times.
    z = torch.randint(0, 5, (40, size), generator=generator).float()
    z[0], z[1] = 0.0, -torch.inf
    z[2, -1] = 9.0
    top, position = _row_maxima(z)
    expected = [(max(row), row.index(max(row))) for row in z.tolist()]
    assert list(zip(top.squeeze(1).tolist(), position.squeeze(1).tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("transform", "scale"),
    [
        (LogitTransform(), 1.0),
        (LogitTransform(multiplier=3.0), 3.0),
        (LogitTransform(divisor=4.0), 0.25),
        (LogitTransform(multiplier=3.0, divisor=4.0, softcap=5.0), 0.75),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_type": "dft"}, {"label_smoothing": 0.1, "z_loss_coef": 0.1, "entropy_coef": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("rows_at_a_time", [1, 4, 100])
def test_values_and_gradients_are_those_of_the_formulas(
    transform: LogitTransform,
    scale: float,
    settings: dict[str, Any],
    rows_at_a_time: int,
    reference_losses: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 13
    monkeypatch.setattr("hf_sft_plugin.loss.logit_tile._CPU_BLOCK_SIZE", rows_at_a_time * size)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, size, generator=generator, dtype=torch.float64).mul(4)
    bias = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, size, (NUM_ROWS,), generator=generator)
    weights = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)

    raw = logits.clone().requires_grad_()
    z = (raw + bias) * scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    losses = reference_losses(z, targets, **settings)
    true, true_bias = torch.autograd.grad((losses * weights).sum(), (raw, bias))
    log_p = torch.log_softmax(z.detach(), dim=-1)

    bias_gradient = torch.zeros(size, dtype=torch.float64)
    values = RowValues.empty(NUM_ROWS, like=logits, dtype=torch.float64)
    tile = LogitTile(
        bias.detach(),
        transform,
        LossObjective(**settings),
        torch.float64,
        needs_gradient=True,
        bias_gradient=bias_gradient,
    )
    tile.consume(logits, targets, weights, values)
    gradient = logits * values.coefficients.unsqueeze(1)
    for found, expected in (
        (values.token_losses, losses.detach()),
        (values.log_probs, log_p.gather(1, targets.unsqueeze(1)).squeeze(1)),
        (values.token_entropy, -(log_p.exp() * log_p).sum(1)),
        (values.is_top1, (log_p.argmax(1) == targets).double()),
        (gradient, true),
        (bias_gradient, true_bias),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
