"""The head in tiles: the same numbers and gradients as full logits, in bounded memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sft_plugin.loss.fused_head import full_head_loss, fused_head_loss
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.token_stats import token_stats

NUM_ROWS, HIDDEN, VOCAB = 23, 6, 17
NLL = LossObjective()


def make_inputs(dtype: torch.dtype, num_rows: int = NUM_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), targets, weights


def make_head(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=torch.float64).to(dtype)


def run_fused(hidden: Tensor, targets: Tensor, weights: Tensor, head: nn.Module) -> Tensor:
    parameters = [p for p in head.parameters() if p.requires_grad]
    return fused_head_loss(hidden, targets, weights, head, parameters, VOCAB, NLL).loss


def run_full(hidden: Tensor, targets: Tensor, weights: Tensor, head: nn.Module) -> Tensor:
    return full_head_loss(head(hidden), targets, weights, NLL).loss


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    trained = [p for p in head.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, [hidden, *trained]))


@pytest.fixture(params=[1, 5, 1000], ids=lambda rows: f"{rows} rows per tile")
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.fused_head._TILE_SIZE", request.param * VOCAB)


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_tiles_give_the_loss_and_gradient_of_full_logits(bias: bool, frozen: bool) -> None:
    hidden, targets, weights = make_inputs(torch.float64)
    head = make_head(torch.float64, bias).requires_grad_(not frozen)
    fused = run_fused(hidden, targets, weights, head)
    full = run_full(hidden, targets, weights, head)
    torch.testing.assert_close(fused, full, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(fused, hidden, head), gradients(full, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_tile")
def test_the_statistics_are_those_of_full_logits() -> None:
    hidden, targets, weights = make_inputs(torch.float64)
    head = make_head(torch.float64)
    stats = fused_head_loss(hidden, targets, weights, head, [], VOCAB, NLL).stats
    for fused, full in zip(stats, token_stats(head(hidden), targets), strict=True):
        torch.testing.assert_close(fused, full.detach(), rtol=1e-12, atol=1e-12)
        assert not fused.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_errs_no_more_than_the_reference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth is float64 on the same rounded inputs; the slack is one rounding of the result."""
    monkeypatch.setattr("hf_sft_plugin.loss.fused_head._TILE_SIZE", 4 * VOCAB)
    hidden, targets, weights = make_inputs(dtype, num_rows=400)
    head = make_head(dtype)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_head = make_head(torch.float64)
    exact_head.load_state_dict({k: v.double() for k, v in head.state_dict().items()})
    truth = gradients(
        run_full(exact_hidden, targets, weights, exact_head), exact_hidden, exact_head
    )
    fused = gradients(run_fused(hidden, targets, weights, head), hidden, head)
    full = gradients(run_full(hidden, targets, weights, head), hidden, head)
    for true, a, b in zip(truth, fused, full, strict=True):
        slack = torch.finfo(dtype).eps * true.abs().max()
        assert (a.double() - true).abs().max() <= (b.double() - true).abs().max() + slack


def test_autocast_runs_the_products_in_bfloat16_and_the_gradient_arrives_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.fused_head._TILE_SIZE", 4 * VOCAB)
    hidden, targets, weights = make_inputs(torch.float32)
    head = make_head(torch.float32)
    exact_inputs = (hidden.detach().double().requires_grad_(), targets, weights.double())
    exact_head = make_head(torch.float32).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = run_fused(hidden, targets, weights, head)
        full = run_full(hidden, targets, weights, head)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, full, rtol=1e-5, atol=1e-5)
    true = gradients(run_full(*exact_inputs, exact_head), exact_inputs[0], exact_head)
    for a, b, exact in zip(
        gradients(fused, hidden, head), gradients(full, hidden, head), true, strict=True
    ):
        assert a.dtype == torch.float32
        # bfloat16 keeps 8 bits; the fused path may lose no more than the plain one does.
        assert (a - exact).norm() <= (b - exact).norm() + 2**-9 * exact.norm()


def test_the_gradient_is_that_of_finite_differences_and_scales_with_the_upstream_one() -> None:
    hidden, targets, weights = make_inputs(torch.float64, num_rows=5)
    head = make_head(torch.float64)
    weight = head.weight

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        def apply(rows: Tensor) -> Tensor:
            return rows @ weight.T

        return 3 * fused_head_loss(hidden, targets, weights, apply, [weight], VOCAB, NLL).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_no_rows_give_a_zero_that_is_connected_to_everything() -> None:
    hidden = torch.randn(4, HIDDEN, requires_grad=True)
    head = make_head(torch.float32)
    none = torch.zeros(0, dtype=torch.long)
    loss = run_fused(hidden[:0], none, torch.zeros(0), head)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_without_gradients_only_the_numbers_are_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets, weights = make_inputs(torch.float64)
    head = make_head(torch.float64)
    gradients_asked: list[Any] = []
    monkeypatch.setattr("torch.autograd.grad", lambda *args, **_: gradients_asked.append(args))
    with torch.no_grad():
        loss = run_fused(hidden, targets, weights, head)
    assert not loss.requires_grad
    assert gradients_asked == []
    torch.testing.assert_close(loss, run_full(hidden, targets, weights, head).detach())


def test_a_head_that_is_no_linear_layer_works_the_same() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(HIDDEN, 8), nn.Tanh(), nn.Linear(8, VOCAB)).double()
    hidden, targets, weights = make_inputs(torch.float64)
    fused = run_fused(hidden, targets, weights, head)
    full = run_full(hidden, targets, weights, head)
    for a, b in zip(gradients(fused, hidden, head), gradients(full, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    hidden, targets, weights = make_inputs(torch.float64)
    head = make_head(torch.float64)
    for run in (run_fused, run_full):
        with pytest.raises(RuntimeError, match="differentiated only once"):
            torch.autograd.grad(run(hidden, targets, weights, head), hidden, create_graph=True)


def test_no_more_than_a_tile_of_logits_exists_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.fused_head._TILE_SIZE", 4 * VOCAB)
    rows_seen: list[int] = []
    tiles: list[weakref.ref[Any]] = []
    num_alive: list[int] = []
    head = make_head(torch.float64)
    hidden, targets, weights = make_inputs(torch.float64)

    def counting_head(rows: Tensor) -> Tensor:
        rows_seen.append(len(rows))
        logits = head(rows)
        tiles.append(weakref.ref(logits.untyped_storage()))
        num_alive.append(sum(tile() is not None for tile in tiles))
        return logits

    loss = fused_head_loss(
        hidden, targets, weights, counting_head, list(head.parameters()), VOCAB, NLL
    ).loss
    num_alive.append(sum(tile() is not None for tile in tiles))
    loss.backward()
    assert rows_seen == [4, 4, 4, 4, 4, 3]
    # The tile before may live until the next one is assigned to its name; after the last, none.
    assert max(num_alive) <= 2
    assert num_alive[-1] == 0


def test_a_parameter_that_nothing_depends_on_gets_a_gradient_of_zero() -> None:
    hidden, targets, weights = make_inputs(torch.float64)
    head, unused = make_head(torch.float64), torch.ones(3, requires_grad=True)
    parameters = [*head.parameters(), unused]
    loss = fused_head_loss(hidden, targets, weights, head, parameters, VOCAB, NLL).loss
    *_, found = torch.autograd.grad(loss, parameters)
    assert found.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("device", "expected"), [("cpu", [32, 32, 6]), ("meta", [70])])
def test_an_accelerator_takes_more_rows_at_a_time(
    device: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.fused_head._TILE_SIZE", 32 * VOCAB)
    seen = []

    def head(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows.new_zeros(len(rows), VOCAB)

    hidden = torch.zeros(70, 4, device=device)
    targets = torch.zeros(70, dtype=torch.long, device=device)
    weights = torch.ones(70, device=device)
    fused_head_loss(hidden, targets, weights, head, [], VOCAB, LossObjective())
    assert seen == expected
