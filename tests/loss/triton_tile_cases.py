"""What Triton's kernels have to fulfil; `test_triton_tile.py` runs this in processes of its own.

Triton decides when it is imported whether it compiles kernels or interprets them, so no other test
may share the process.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from objectives import OBJECTIVES
from torch import Tensor, nn
from triton.runtime import interpreter

from hf_sft_plugin import head_loss
from hf_sft_plugin.loss import tile_choice, triton_tile
from hf_sft_plugin.loss.logit_tile import LogitTile, LogitTransform, RowValues
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.triton_tile import TritonTile

DEVICE = torch.device(os.environ["TRITON_CASES_DEVICE"], 0)
IS_CUDA = DEVICE.type == "cuda"
NUM_ROWS, VOCAB = 3, 37
EVERYTHING = OBJECTIVES[-1]
PLAIN, CHANGED = LogitTransform(), LogitTransform(multiplier=3.0, divisor=7, softcap=4)
TRANSFORMS = [LogitTransform(multiplier=0.7), LogitTransform(divisor=3.0), CHANGED]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows take two blocks, the second of them all but empty."""
    monkeypatch.setattr(triton_tile, "_BLOCK_SIZE", 32)
    monkeypatch.setattr(triton_tile, "_BIAS_BLOCK_SIZE", 32)


@pytest.fixture(autouse=True)
def _nearest_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts off what the hardware rounds to the nearest bfloat16."""
    cut_off = interpreter.InterpreterBuilder.create_fp_trunc

    def round_to_nearest(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return cut_off(self, source, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", round_to_nearest)


class Answer(NamedTuple):
    """What is known of a tile, in float64."""

    gradient: Tensor
    bias_gradient: Tensor | None
    values: dict[str, Tensor]


class Problem:
    """A tile of logits and all that is asked of it."""

    def __init__(
        self,
        logits: Tensor,
        transform: LogitTransform | None = None,
        settings: dict[str, Any] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(2)
        self.logits = logits.to(DEVICE)
        self.targets = torch.randint(0, logits.shape[1], logits.shape[:1], generator=generator)
        self.targets = self.targets.to(DEVICE)
        self.weights = torch.rand(len(logits), generator=generator).to(DEVICE)
        self.bias = None if bias is None else bias.to(DEVICE)
        self.transform = transform or LogitTransform()
        self.settings = settings or {}

    def run(self, kind: type[LogitTile], dtype: torch.dtype = torch.float32) -> Answer:
        """By the code under test, or by plain torch."""
        logits = self.logits.to(dtype) if dtype == torch.float64 else self.logits.clone()
        bias_gradient = None
        if self.bias is not None:
            bias_gradient = torch.zeros_like(self.bias, dtype=torch.float64)
        values = RowValues.empty(len(logits), like=logits, dtype=dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        objective = LossObjective(**self.settings)
        work = kind(bias, self.transform, objective, dtype, True, bias_gradient)
        work.consume(logits, self.targets, self.weights.to(dtype), values)
        gradient = logits.double() * values.coefficients.double().unsqueeze(1)
        known = {name: value.double() for name, value in values._asdict().items()}
        del known["coefficients"]
        return Answer(gradient, bias_gradient, known)

    def truth(self, reference_losses: Callable[..., Tensor]) -> Answer:
        """By the formulas, in float64."""
        raw = self.logits.double().requires_grad_()
        bias = torch.zeros(raw.shape[1], device=DEVICE, dtype=torch.float64)
        if self.bias is not None:
            bias = self.bias.double()
        bias.requires_grad_()
        z = self.transform(raw + bias)
        losses = reference_losses(z, self.targets, **self.settings)
        loss = (losses * self.weights.double()).sum()
        gradient, bias_gradient = torch.autograd.grad(loss, (raw, bias))
        log_p = torch.log_softmax(z.detach(), -1)
        values = {
            "token_losses": losses.detach(),
            "log_probs": log_p.gather(1, self.targets.unsqueeze(1)).squeeze(1),
            "token_entropy": -(log_p.exp() * log_p).sum(1),
            "is_top1": (log_p.argmax(1) == self.targets).double(),
        }
        return Answer(gradient, bias_gradient if self.bias is not None else None, values)


def draw(*shape: int, scale: float = 4.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * scale


def assert_errs_no_more(found: Answer, plain: Answer, true: Answer) -> None:
    """In root mean square; the slack is a hundredth, and two roundings of float32. See law 9."""
    triples = [(found.gradient, plain.gradient, true.gradient)]
    triples += [(found.values[name], plain.values[name], true.values[name]) for name in true.values]
    if found.bias_gradient is not None:
        assert plain.bias_gradient is not None
        assert true.bias_gradient is not None
        triples.append((found.bias_gradient, plain.bias_gradient, true.bias_gradient))
    for ours, theirs, exact in triples:
        slack = 0.01 * (theirs - exact).norm() + 2 * EPS * exact.norm()
        assert (ours - exact).norm() <= (theirs - exact).norm() + slack


@pytest.mark.parametrize(
    ("dtype", "settings", "is_changed"),
    [
        *((torch.float32, settings, False) for settings in OBJECTIVES),
        *((torch.bfloat16, settings, True) for settings in OBJECTIVES),
        *((dtype, EVERYTHING, True) for dtype in (torch.float32, torch.float16)),
        *((dtype, {}, False) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_every_objective_errs_no_more_than_plain_torch(
    dtype: torch.dtype,
    settings: dict[str, Any],
    is_changed: bool,
    reference_losses: Callable[..., Tensor],
) -> None:
    transform, bias = (CHANGED, draw(VOCAB, scale=1.0)) if is_changed else (PLAIN, None)
    problem = Problem(draw(NUM_ROWS, VOCAB).to(dtype), transform, settings, bias)
    found, plain = problem.run(TritonTile), problem.run(LogitTile)
    assert_errs_no_more(found, plain, problem.truth(reference_losses))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_every_transform_errs_no_more_than_plain_torch(
    transform: LogitTransform, has_bias: bool, reference_losses: Callable[..., Tensor]
) -> None:
    bias = draw(VOCAB, scale=1.0) if has_bias else None
    problem = Problem(draw(NUM_ROWS, VOCAB), transform, {}, bias)
    found, plain = problem.run(TritonTile), problem.run(LogitTile)
    assert_errs_no_more(found, plain, problem.truth(reference_losses))


@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(1, 1), (2, 2), (1, 31), (2, 32), (1, 33), (2, 64), (1, 131)]
)
def test_no_size_has_to_be_a_multiple_of_anything(
    vocab_size: int, num_rows: int, reference_losses: Callable[..., Tensor]
) -> None:
    problem = Problem(draw(num_rows, vocab_size), CHANGED, EVERYTHING, draw(vocab_size))
    found, true = problem.run(TritonTile), problem.truth(reference_losses)
    torch.testing.assert_close(found.gradient, true.gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.bias_gradient, true.bias_gradient, rtol=1e-5, atol=1e-6)
    for name, value in true.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-5, atol=1e-6)


def test_one_block_may_hold_a_whole_row(
    reference_losses: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tile, "_BLOCK_SIZE", 4096)
    problem = Problem(draw(NUM_ROWS, VOCAB), None, EVERYTHING)
    found, plain = problem.run(TritonTile), problem.run(LogitTile)
    assert_errs_no_more(found, plain, problem.truth(reference_losses))


@pytest.mark.parametrize(
    ("order", "settings"),
    [("rising", EVERYTHING), ("falling", EVERYTHING), *(("mixed", s) for s in OBJECTIVES)],
    ids=str,
)
def test_huge_logits_are_exact(order: str, settings: dict[str, Any]) -> None:
    """From -10,000 to 10,000: the largest changes with every block, or never."""
    columns = torch.linspace(-1e4, 1e4, VOCAB)
    spread = {"rising": columns, "falling": columns.flip(0), "mixed": draw(VOCAB, scale=1e4)}
    problem = Problem(spread[order] + draw(NUM_ROWS, VOCAB), None, settings)
    problem.targets[:2] = problem.logits[:2].argmax(1)
    found, exact = problem.run(TritonTile), problem.run(LogitTile, torch.float64)
    assert found.gradient.isfinite().all()
    assert all(value.isfinite().all() for value in found.values.values())
    assert_errs_no_more(found, problem.run(LogitTile), exact)


@pytest.mark.parametrize(
    ("impossible", "settings"),
    [
        *((slice(0, 33), s) for s in OBJECTIVES if "label_smoothing" not in s),
        (slice(30, VOCAB), {"entropy_coef": 0.3}),
    ],
    ids=str,
)
def test_a_bias_of_minus_infinity_is_as_if_the_token_did_not_exist(
    impossible: slice, settings: dict[str, Any], reference_losses: Callable[..., Tensor]
) -> None:
    """Even where that is all of a block."""
    bias = draw(VOCAB)
    bias[impossible] = -torch.inf
    keep = bias.isfinite()
    logits = draw(NUM_ROWS, VOCAB)
    problem, smaller = Problem(logits, None, settings, bias), Problem(logits[:, keep])
    smaller.settings, smaller.bias = settings, bias[keep].to(DEVICE)
    problem.targets = keep.nonzero().squeeze(1).to(DEVICE)[smaller.targets]
    found, plain, true = (
        problem.run(TritonTile),
        problem.run(LogitTile),
        smaller.truth(reference_losses),
    )
    assert not found.gradient[:, ~keep].any()
    found, plain = (
        answer._replace(
            gradient=answer.gradient[:, keep],
            bias_gradient=None if answer.bias_gradient is None else answer.bias_gradient[keep],
        )
        for answer in (found, plain)
    )
    assert_errs_no_more(found, plain, true)


def test_smoothing_over_an_impossible_token_is_infinite_and_an_impossible_target_too() -> None:
    bias = torch.zeros(VOCAB)
    bias[30] = -torch.inf
    smoothed = Problem(draw(NUM_ROWS, VOCAB), None, {"label_smoothing": 0.1}, bias)
    target = Problem(draw(NUM_ROWS, VOCAB), None, {}, bias)
    target.targets[:] = 30
    for problem in (smoothed, target):
        for kind in (TritonTile, LogitTile):
            assert (problem.run(kind).values["token_losses"] == torch.inf).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_loss_of_its_row_and_no_other(value: float) -> None:
    problem = Problem(draw(NUM_ROWS, VOCAB))
    problem.logits[2, 20] = value
    losses = problem.run(TritonTile).values["token_losses"]
    assert losses.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_logits_the_first_counts_as_the_most_probable(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 3, (8, VOCAB), generator=generator).to(dtype)
    rows[0], rows[1] = 0.0, -torch.arange(VOCAB)
    first = torch.tensor([row.index(max(row)) for row in rows.tolist()])
    problem = Problem(rows, LogitTransform(softcap=2.0))
    for offset, expected in ((0, 1.0), (1, 0.0)):
        problem.targets = ((first + offset) % VOCAB).to(DEVICE)
        assert (problem.run(TritonTile).values["is_top1"] == expected).all()


@pytest.mark.parametrize("settings", [{}, {"loss_type": "focal"}, EVERYTHING], ids=str)
def test_rows_of_weight_zero_have_no_gradient(settings: dict[str, Any]) -> None:
    problem = Problem(draw(NUM_ROWS, VOCAB), None, settings, draw(VOCAB))
    problem.weights.zero_()
    found = problem.run(TritonTile)
    assert not found.gradient.any()
    assert found.bias_gradient is not None
    assert not found.bias_gradient.any()


def test_a_target_that_is_all_but_certain_keeps_its_gradient() -> None:
    """Where p rounds to 1, p - 1 is worked out as if it did not."""
    rows = torch.zeros(1, VOCAB)
    rows[0, 3] = 40.0
    problem = Problem(rows)
    problem.targets[:], problem.weights[:] = 3, 1.0
    others = (VOCAB - 1) * torch.tensor(-40.0, dtype=torch.float64).exp()
    gradient = problem.run(TritonTile).gradient[0, 3].cpu()
    # As in plain torch: log(1 + x) of a float32 sum is 0 here, so it is that, and not noise.
    torch.testing.assert_close(gradient, problem.run(LogitTile).gradient[0, 3].cpu())
    assert abs(gradient + others) < 1e-7


def test_without_a_gradient_the_values_are_the_same_and_nothing_is_written() -> None:
    problem = Problem(draw(NUM_ROWS, VOCAB), None, EVERYTHING)
    logits = problem.logits.clone()
    values = RowValues.empty(NUM_ROWS, like=logits, dtype=torch.float32)
    work = TritonTile(
        None, problem.transform, LossObjective(**EVERYTHING), torch.float32, False, None
    )
    work.consume(logits, problem.targets, problem.weights, values)
    assert torch.equal(logits, problem.logits)
    for name, value in problem.run(TritonTile).values.items():
        assert torch.equal(getattr(values, name).double(), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_between_the_rows_is_left_alone(dtype: torch.dtype) -> None:
    room = torch.full((NUM_ROWS, VOCAB + 6), 7.0, dtype=dtype, device=DEVICE)
    problem = Problem(draw(NUM_ROWS, VOCAB).to(dtype), None, EVERYTHING)
    tile = room[:, 2:-4]
    tile.copy_(problem.logits)
    # Every other target of a longer row of them.
    targets = problem.targets.repeat_interleave(2)[::2]
    values = RowValues.empty(NUM_ROWS, like=tile, dtype=torch.float32)
    work = TritonTile(
        None, problem.transform, LossObjective(**EVERYTHING), torch.float32, True, None
    )
    work.consume(tile, targets, problem.weights, values)
    assert torch.equal(
        tile.double() * values.coefficients.double().unsqueeze(1), problem.run(TritonTile).gradient
    )
    assert (room[:, :2] == 7).all()
    assert (room[:, -4:] == 7).all()


def test_equal_inputs_give_equal_bits() -> None:
    problem = Problem(draw(NUM_ROWS, VOCAB), None, EVERYTHING, draw(VOCAB))
    first, second = problem.run(TritonTile), problem.run(TritonTile)
    assert torch.equal(first.gradient, second.gradient)
    assert first.bias_gradient is not None
    assert second.bias_gradient is not None
    assert torch.equal(first.bias_gradient, second.bias_gradient)


@triton.jit
def tangent_kernel(x: tl.tensor, out: tl.tensor, size: tl.constexpr) -> None:
    columns = tl.arange(0, size)
    tl.store(out + columns, triton_tile._tanh(tl.load(x + columns)))


def test_the_tangent_is_right_to_two_units_in_the_last_place() -> None:
    half = torch.logspace(-30, 2, 1022, base=10)
    x = torch.cat([half, torch.tensor([0.6, torch.inf])])
    x = torch.cat([x, -x]).to(DEVICE)
    found = torch.empty_like(x)
    tangent_kernel[(1,)](x, found, len(x))
    true = torch.tanh(x.double())
    assert ((found - true).abs() <= 2 * EPS * true.abs()).all()


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_a_head_goes_through_the_kernels_and_errs_no_more_than_through_plain_torch(
    mode: str,
    has_bias: bool,
    reference_losses: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over three tiles, in root mean square, with one rounding as slack; see law 9."""
    working_dtype = torch.float32 if mode == "float32" else torch.bfloat16
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    num_rows, hidden_size = 11, 2
    linear = "hf_sft_plugin.loss.linear_head"
    tile_bytes = 5 * VOCAB * (4 if mode == "float32" else 2)
    monkeypatch.setattr(f"{linear}.tile_bytes", lambda device: tile_bytes)
    monkeypatch.setattr(f"{linear}._ACCELERATOR_ROWS", 1)
    monkeypatch.setattr(f"{linear}._has_instructions", lambda dtype: True)
    torch.manual_seed(0)
    head = nn.Linear(hidden_size, VOCAB, bias=has_bias, device=DEVICE, dtype=dtype)
    rows = torch.randn(num_rows, hidden_size, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCAB, (num_rows,), device=DEVICE)
    weights = torch.rand(num_rows, device=DEVICE)
    tensors = [rows, *head.parameters()]
    seen = []

    def run(kind: type[LogitTile]) -> list[Tensor]:
        class Seen(kind):  # type: ignore[misc, valid-type]  # it is a class
            def consume(self, *args: Any) -> None:
                seen.append(kind)
                super().consume(*args)

        monkeypatch.setattr(f"{linear}.choose_tile", lambda *_: Seen)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=mode == "autocast"):
            answer = head_loss(head, rows, targets, weights, objective=LossObjective(**EVERYTHING))
        gradients = torch.autograd.grad(answer.loss, tensors)
        return [answer.loss.detach(), answer.token_losses, *answer.stats[:2], *gradients]

    found, plain = run(TritonTile), run(LogitTile)
    assert seen == [TritonTile] * 3 + [LogitTile] * 3
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    z = nn.functional.linear(*doubles)
    losses = reference_losses(z, targets, **EVERYTHING)
    loss = (losses * weights.double()).sum()
    log_p = torch.log_softmax(z.detach(), -1)
    true = [
        loss.detach(),
        losses.detach(),
        log_p.gather(1, targets.unsqueeze(1)).squeeze(1),
        -(log_p.exp() * log_p).sum(1),
        *torch.autograd.grad(loss, doubles),
    ]
    for ours, theirs, exact in zip(found, plain, true, strict=True):
        slack = torch.finfo(working_dtype).eps / 2 * exact.norm()
        assert (ours.double() - exact).norm() <= (theirs.double() - exact).norm() + slack


def test_where_the_kernels_run_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    if not IS_CUDA:
        tried = tile_choice._try_tile
        monkeypatch.setattr(tile_choice, "_try_tile", lambda tile, _: tried(tile, DEVICE))
    assert tile_choice.choose_tile(device, torch.bfloat16) is TritonTile


@pytest.mark.skipif(not IS_CUDA, reason="an interpreter waits for nothing")
def test_a_step_never_waits_for_the_device() -> None:
    head = nn.Linear(64, 300, device=DEVICE, dtype=torch.bfloat16)
    rows = torch.randn(50, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets, weights = torch.zeros(50, dtype=torch.long, device=DEVICE), torch.ones_like(rows[:, 0])

    def step() -> None:
        for settings in OBJECTIVES:
            head_loss(
                head, rows, targets, weights, objective=LossObjective(**settings)
            ).loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not IS_CUDA, reason="the interpreter would copy 4 GiB")
def test_a_tile_may_hold_more_numbers_than_32_bits_count() -> None:
    stride = 2**31
    room = torch.empty(stride + VOCAB, dtype=torch.bfloat16, device=DEVICE)
    tile = room.as_strided((2, VOCAB), (stride, 1))
    problem = Problem(draw(2, VOCAB).bfloat16(), None, EVERYTHING)
    tile.copy_(problem.logits)
    values = RowValues.empty(2, like=tile, dtype=torch.float32)
    work = TritonTile(
        None, problem.transform, LossObjective(**EVERYTHING), torch.float32, True, None
    )
    work.consume(tile, problem.targets, problem.weights, values)
    gradient = tile.double() * values.coefficients.double().unsqueeze(1)
    assert torch.equal(gradient, problem.run(TritonTile).gradient)
