"""The head of a linear layer: formulas on full logits in float64 are the truth it is held to."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from objectives import OBJECTIVES
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sft_plugin.loss import linear_head
from hf_sft_plugin.loss.fused_head import HeadLoss, full_head_loss, fused_head_loss
from hf_sft_plugin.loss.linear_head import is_plain_linear, linear_head_loss
from hf_sft_plugin.loss.logit_tile import LogitTransform
from hf_sft_plugin.loss.objective import LossObjective

NUM_ROWS, HIDDEN, VOCAB = 23, 6, 17
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(multiplier=0.5),
    LogitTransform(divisor=3.0),
    LogitTransform(softcap=4.0),
]
MODULE = "hf_sft_plugin.loss.linear_head"


class Problem:
    """Inputs of a head, drawn in float64 and rounded to a dtype."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        num_rows: int = NUM_ROWS,
        bias: bool = False,
        scale: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(dtype).requires_grad_()

        self.hidden, self.weight = draw(num_rows, HIDDEN), draw(VOCAB, HIDDEN)
        self.bias = draw(VOCAB) if bias else None
        self.targets = torch.randint(0, VOCAB, (num_rows,), generator=generator)
        self.weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)

    @property
    def tensors(self) -> list[Tensor]:
        """What has a gradient."""
        every = (self.hidden, self.weight, self.bias)
        return [tensor for tensor in every if tensor is not None and tensor.requires_grad]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of all tensors that have one."""
        return list(torch.autograd.grad(loss, self.tensors))

    def fast(
        self, transform: LogitTransform | None = None, settings: dict[str, Any] | None = None
    ) -> HeadLoss:
        """What is tested."""
        return linear_head_loss(
            self.hidden,
            self.targets,
            self.weights,
            self.weight,
            self.bias,
            transform or LogitTransform(),
            LossObjective(**(settings or {})),
        )

    def plain(
        self, transform: LogitTransform | None = None, settings: dict[str, Any] | None = None
    ) -> HeadLoss:
        """The loss on full logits in the working dtype."""
        logits = nn.functional.linear(self.hidden, self.weight, self.bias)
        logits = (transform or LogitTransform())(logits)
        return full_head_loss(logits, self.targets, self.weights, LossObjective(**(settings or {})))

    def general(self, settings: dict[str, Any]) -> HeadLoss:
        """The fused head of any module."""

        def head(rows: Tensor) -> Tensor:
            return nn.functional.linear(rows, self.weight, self.bias)

        objective = LossObjective(**settings)
        return fused_head_loss(
            self.hidden, self.targets, self.weights, head, self.tensors[1:], VOCAB, objective
        )

    def truth(
        self,
        reference_losses: Callable[..., Tensor],
        transform: LogitTransform | None = None,
        settings: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Loss, statistics and gradients by the formulas, in float64 on the same inputs."""
        inputs = [tensor.detach().double().requires_grad_() for tensor in self.tensors]
        hidden, weight = (
            (inputs[0], inputs[1])
            if self.weight.requires_grad
            else (
                inputs[0],
                self.weight.double(),
            )
        )
        z = hidden @ weight.T
        if self.bias is not None:
            z = z + inputs[-1]
        transform = transform or LogitTransform()
        z = z * (transform.multiplier or 1.0) / (transform.divisor or 1.0)
        if transform.softcap:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        losses = reference_losses(z, self.targets, **(settings or {}))
        loss = (losses * self.weights).sum()
        log_p = torch.log_softmax(z.detach(), -1)
        values = {
            "loss": loss.detach(),
            "token_losses": losses.detach(),
            "log_probs": log_p.gather(1, self.targets.unsqueeze(1)).squeeze(1),
            "token_entropy": -(log_p.exp() * log_p).sum(1),
            "is_top1": (log_p.argmax(1) == self.targets).double(),
        }
        return values, list(torch.autograd.grad(loss, inputs))


def values_of(result: HeadLoss) -> dict[str, Tensor]:
    values = {"loss": result.loss.detach(), "token_losses": result.token_losses}
    return {**values, **result.stats._asdict()}


@pytest.fixture(params=[1, 5, 1000], ids=lambda rows: f"{rows} rows per tile")
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles, blocks and panels that fit nothing."""
    monkeypatch.setattr("hf_sft_plugin.loss.tile_choice._CPU_BYTES", request.param * VOCAB * 8)
    monkeypatch.setattr(f"{MODULE}._PANEL_SIZE", 5 * HIDDEN)
    monkeypatch.setattr("hf_sft_plugin.loss.logit_tile._CPU_BLOCK_SIZE", 2 * VOCAB)
    monkeypatch.setattr("hf_sft_plugin.loss.logit_tile._TOP_BLOCK", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_every_objective_has_the_values_and_gradients_of_its_formula(
    bias: bool,
    transform: LogitTransform,
    settings: dict[str, Any],
    reference_losses: Callable[..., Tensor],
) -> None:
    problem = Problem(bias=bias)
    values, gradients = problem.truth(reference_losses, transform, settings)
    found = problem.fast(transform, settings)
    for name, value in values_of(found).items():
        torch.testing.assert_close(value, values[name], rtol=1e-12, atol=1e-12)
    for a, b in zip(problem.gradients(found.loss), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_the_other_two_ways_have_them_as_well(
    settings: dict[str, Any],
    reference_losses: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.fused_head._TILE_SIZE", 4 * VOCAB)
    problem = Problem(bias=True)
    values, gradients = problem.truth(reference_losses, None, settings)
    for found in (problem.general(settings), problem.plain(None, settings)):
        for name, value in values_of(found).items():
            torch.testing.assert_close(value, values[name], rtol=1e-12, atol=1e-12)
        for a, b in zip(problem.gradients(found.loss), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


# The gradient of DFT is not that of its value: its probability is a constant by definition.
@pytest.mark.parametrize("settings", [s for s in OBJECTIVES if "dft" not in s.values()], ids=str)
@pytest.mark.parametrize("way", ["fast", "general", "plain"])
def test_the_gradient_is_that_of_finite_differences(
    way: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.tile_choice._CPU_BYTES", 2 * VOCAB * 8)
    problem = Problem(num_rows=5, bias=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        problem.hidden, problem.weight, problem.bias = hidden, weight, bias
        if way == "fast":
            return 3 * problem.fast(LogitTransform(divisor=2.0, softcap=4.0), settings).loss
        if way == "general":
            return 3 * problem.general(settings).loss
        return 3 * problem.plain(None, settings).loss

    assert torch.autograd.gradcheck(loss, problem.tensors)


@pytest.mark.parametrize("has_instructions", [False, True], ids=["imitated", "native"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "focal"},
        {"label_smoothing": 0.1, "z_loss_coef": 0.01, "entropy_coef": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tiles", [1, 5])
def test_it_errs_no_more_than_the_full_logits(
    num_tiles: int,
    settings: dict[str, Any],
    mode: str,
    has_instructions: bool,
    reference_losses: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In root mean square, with one rounding of the working dtype as slack; see law 9."""
    monkeypatch.setattr(f"{MODULE}._has_instructions", lambda dtype: has_instructions)
    itemsize = 2 if has_instructions and mode != "float32" else 4
    monkeypatch.setattr(
        "hf_sft_plugin.loss.tile_choice._CPU_BYTES", 400 // num_tiles * VOCAB * itemsize
    )
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    working_dtype = torch.float32 if mode == "float32" else torch.bfloat16
    problem = Problem(dtype, num_rows=400, bias=True)
    values, gradients = problem.truth(reference_losses, None, settings)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        fast, plain = problem.fast(None, settings), problem.plain(None, settings)
    pairs = [
        (values[name], value, values_of(plain)[name])
        for name, value in values_of(fast).items()
        if name != "is_top1"
    ]
    found, reference = problem.gradients(fast.loss), problem.gradients(plain.loss)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in problem.tensors]
    pairs += zip(gradients, found, reference, strict=True)
    for true, a, b in pairs:
        slack = torch.finfo(working_dtype).eps / 2 * true.norm()
        assert (a.double() - true).norm() <= (b.double() - true).norm() + slack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tiles", [1, 5])
def test_what_memory_held_before_reaches_nothing(
    num_tiles: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kernels read on behind a row of an odd number of logits."""
    monkeypatch.setattr(f"{MODULE}._has_instructions", lambda dtype: True)
    monkeypatch.setattr(
        "hf_sft_plugin.loss.tile_choice._CPU_BYTES", 400 // num_tiles * VOCAB * dtype.itemsize
    )
    problem = Problem(dtype, num_rows=400, bias=True)
    torch.use_deterministic_algorithms(True)
    try:
        # Now torch.empty gives NaN.
        assert problem.hidden.new_empty(3).isnan().all()
        answer = problem.fast()
        gradients = problem.gradients(answer.loss)
    finally:
        torch.use_deterministic_algorithms(False)
    for values in (answer.loss, answer.token_losses, *answer.stats, *gradients):
        assert values.isfinite().all()


def test_on_a_processor_without_the_dtype_it_errs_far_less(
    reference_losses: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._has_instructions", lambda dtype: False)
    problem = Problem(torch.bfloat16, num_rows=200)
    values, _ = problem.truth(reference_losses)
    fast, plain = (
        (run().stats.log_probs - values["log_probs"]).norm()
        for run in (problem.fast, problem.plain)
    )
    assert fast < plain / 1000


def test_no_rows_give_a_zero_that_is_connected_to_everything() -> None:
    problem = Problem(num_rows=0, bias=True)
    loss = problem.fast(None, OBJECTIVES[-1]).loss
    assert loss.item() == 0.0
    for gradient, tensor in zip(problem.gradients(loss), problem.tensors, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_one_row_and_weights_of_zero(reference_losses: Callable[..., Tensor]) -> None:
    problem = Problem(num_rows=1)
    values, gradients = problem.truth(reference_losses)
    found = problem.fast()
    torch.testing.assert_close(found.loss.detach(), values["loss"], rtol=1e-12, atol=0)
    for a, b in zip(problem.gradients(found.loss), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        problem = Problem(dtype)
        problem.weights = torch.zeros(NUM_ROWS, dtype=torch.float64)
        for settings in OBJECTIVES:
            loss = problem.fast(None, settings).loss
            assert loss.item() == 0.0
            assert not any(gradient.any() for gradient in problem.gradients(loss))


@pytest.mark.parametrize("settings", [s for s in OBJECTIVES if "label_smoothing" not in s], ids=str)
def test_a_bias_of_minus_infinity_is_as_if_the_token_did_not_exist(
    settings: dict[str, Any], reference_losses: Callable[..., Tensor]
) -> None:
    problem = Problem(bias=True)
    problem.targets = problem.targets % (VOCAB - 2)
    smaller = Problem(bias=True)
    smaller.targets, smaller.weights = problem.targets, problem.weights
    smaller.weight = problem.weight.detach()[:-2].requires_grad_()
    assert problem.bias is not None
    smaller.bias = problem.bias.detach()[:-2].requires_grad_()
    with torch.no_grad():
        problem.bias[-2:] = -torch.inf
    values, gradients = smaller.truth(reference_losses, None, settings)
    found = problem.fast(None, settings)
    for name, value in values_of(found).items():
        torch.testing.assert_close(value, values[name], rtol=1e-12, atol=1e-12)
    hidden, weight, bias = problem.gradients(found.loss)
    for a, b in zip((hidden, weight[:-2], bias[:-2]), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert not weight[-2:].any()
    assert not bias[-2:].any()


def test_smoothing_over_an_impossible_token_is_infinite_like_its_formula() -> None:
    problem = Problem(bias=True)
    assert problem.bias is not None
    with torch.no_grad():
        problem.bias[3] = -torch.inf
    for run in (problem.fast, problem.plain):
        assert run(None, {"label_smoothing": 0.1}).loss.item() == torch.inf


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_huge_logits_are_exact(
    settings: dict[str, Any], reference_losses: Callable[..., Tensor]
) -> None:
    """Logits of some ten thousand; the truth is taken of differences to the largest."""
    problem = Problem(scale=60.0)
    found = problem.fast(None, settings)
    plain = problem.plain(None, settings)
    assert (problem.hidden @ problem.weight.T).max() > 1e4
    for name, value in values_of(found).items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, values_of(plain)[name], rtol=1e-12, atol=1e-11)
    log_p = torch.log_softmax((problem.hidden @ problem.weight.T).detach(), -1)
    entropy = -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(found.stats.token_entropy, entropy, rtol=1e-10, atol=1e-10)
    pairs = zip(problem.gradients(found.loss), problem.gradients(plain.loss), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_of_equal_logits_the_first_counts_as_the_most_probable() -> None:
    problem = Problem(torch.float32)
    problem.weight = torch.zeros(VOCAB, HIDDEN, requires_grad=True)
    problem.targets = torch.arange(NUM_ROWS) % VOCAB
    assert problem.fast().stats.is_top1.tolist() == (problem.targets == 0).float().tolist()


class CountedProducts(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_tiles")
def test_three_products_over_the_rows_and_two_where_the_weight_is_frozen() -> None:
    product = NUM_ROWS * VOCAB * HIDDEN
    problem = Problem()
    frozen = Problem()
    frozen.weight.requires_grad_(False)
    for one, is_trained, expected in ((problem, True, 3), (frozen, True, 2), (problem, False, 1)):
        with CountedProducts() as products, torch.set_grad_enabled(is_trained):
            loss = one.fast().loss
        assert loss.requires_grad == is_trained
        assert products.count == expected * product
        if is_trained:
            with CountedProducts() as products:
                one.gradients(loss)
            assert products.count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_instructions", [False, True], ids=["imitated", "native"])
def test_memory_beside_the_gradients_does_not_grow_with_the_rows(
    dtype: torch.dtype, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._has_instructions", lambda dtype: has_instructions)
    monkeypatch.setattr("hf_sft_plugin.loss.tile_choice._CPU_BYTES", 2**20)
    monkeypatch.setattr(f"{MODULE}._PANEL_SIZE", 2**15)
    monkeypatch.setattr("hf_sft_plugin.loss.logit_tile._CPU_BLOCK_SIZE", 2**15)
    vocab, hidden = 8192, 32
    weight = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    peaks = []
    # Both are multiples of the rows in a tile.
    for num_rows in (128, 1280):
        rows = torch.randn(num_rows, hidden, dtype=dtype, requires_grad=True)
        targets, weights = torch.zeros(num_rows, dtype=torch.long), torch.ones(num_rows)
        objective = LossObjective()

        def run(*inputs: Tensor, objective: LossObjective = objective) -> HeadLoss:
            rows, targets, weights = inputs
            transform = LogitTransform()
            return linear_head_loss(rows, targets, weights, weight, None, transform, objective)

        peaks.append(peak_of(run, rows, targets, weights))
    # Values, weights and the gradient of a row, in float32.
    per_row = 4 * (hidden + 12)
    assert peaks[1] - peaks[0] <= (1280 - 128) * per_row
    if not has_instructions:
        # The gradient, its sum in float32, a tile and its blocks. Imitated products take more.
        sums = vocab * hidden * 4 if dtype == torch.bfloat16 else 0
        tile = 2**20 + 4 * 2**17
        assert peaks[0] <= weight.nbytes + sums + tile + 128 * per_row


def peak_of(run: Callable[..., Any], *args: Any) -> int:
    """Bytes allocated at the highest point of a call, over those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run(*args)
    del result
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return max(itertools.accumulate(size for _, size in changes))


def test_a_gradient_from_above_is_multiplied_in_as_often_as_it_is_asked_for() -> None:
    problem = Problem()
    loss = problem.fast().loss
    once = torch.autograd.grad(loss, problem.tensors, retain_graph=True)
    half = torch.autograd.grad(loss / 2, problem.tensors, retain_graph=True)
    again = torch.autograd.grad(loss, problem.tensors)
    for a, b, c in zip(once, half, again, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(a / 2, b)


def test_the_gradient_of_the_weight_is_handed_over_not_copied() -> None:
    problem = Problem()
    loss = problem.fast().loss
    kept = loss.grad_fn.saved_tensors[1].data_ptr()  # type: ignore[union-attr]  # there is one
    loss.backward()
    assert problem.weight.grad is not None
    assert problem.weight.grad.data_ptr() == kept


def test_what_a_sum_cannot_give_is_refused_with_the_alternative() -> None:
    problem = Problem()
    with pytest.raises(
        RuntimeError, match=r"only once\. Use torch\.log_softmax on the full logits"
    ):
        torch.autograd.grad(problem.fast().loss, problem.hidden, create_graph=True)

    def loss_of_row(row: Tensor, target: Tensor) -> Tensor:
        one = target.new_ones(1, dtype=torch.float64)
        arguments = problem.weight, None, LogitTransform(), LossObjective()
        return linear_head_loss(row[None], target[None], one, *arguments).loss

    per_row = torch.func.vmap(torch.func.grad(loss_of_row))
    with pytest.raises(RuntimeError, match=r"gradient of each row.*torch\.log_softmax"):
        per_row(problem.hidden.detach(), problem.targets)
    problem.weights.requires_grad_()
    for run in (problem.fast, lambda: problem.general({})):
        with pytest.raises(RuntimeError, match=r"gradient of each row.*torch\.log_softmax"):
            run()


def make_linear(**changes: Any) -> nn.Linear:
    return nn.Linear(HIDDEN, VOCAB, **changes)


class Subclass(nn.Linear):
    """May do anything."""


def with_own_forward() -> nn.Linear:
    head = make_linear()
    own = head.forward
    head.forward = lambda hidden: own(hidden) + 1
    return head


def with_hook(kind: str) -> nn.Linear:
    head = make_linear()
    getattr(head, f"register_{kind}")(lambda *_: None)
    return head


def with_parametrization() -> nn.Module:
    head = make_linear()
    parametrize.register_parametrization(head, "weight", nn.Tanh())
    return head


class Wrapped(Tensor):
    """Stands for a quantized or sharded weight."""


def with_strange_weight() -> nn.Linear:
    head = make_linear()
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Wrapped), requires_grad=False)
    return head


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (make_linear, True),
        (lambda: make_linear(bias=False), True),
        (lambda: make_linear().requires_grad_(requires_grad=False), True),
        (lambda: Subclass(HIDDEN, VOCAB), False),
        (lambda: nn.Sequential(make_linear()), False),
        (with_own_forward, False),
        (lambda: with_hook("forward_hook"), True),
        (lambda: with_hook("forward_pre_hook"), True),
        (lambda: with_hook("full_backward_hook"), True),
        (lambda: with_hook("full_backward_pre_hook"), True),
        (with_parametrization, False),
        (with_strange_weight, False),
        (lambda: make_linear(device="meta"), False),
        (lambda: make_linear(dtype=torch.bfloat16), False),
        (lambda: make_linear().to(torch.float8_e4m3fn), False),
    ],
)
def test_only_a_linear_layer_that_nobody_changed_goes_the_short_way(
    make: Callable[[], nn.Module], expected: bool
) -> None:
    head = make()
    assert is_plain_linear(head, head.forward, torch.zeros(2, HIDDEN)) == expected


def test_under_autocast_dtypes_may_differ_but_not_with_float64() -> None:
    head = make_linear()
    hidden = torch.zeros(2, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_plain_linear(head, head.forward, hidden.bfloat16())
        assert not is_plain_linear(head, head.forward, hidden.double())
    assert not is_plain_linear(head, head.forward, hidden.bfloat16())
    double = make_linear(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_plain_linear(double, double.forward, hidden.double())
        problem = Problem()
        assert problem.fast().loss.dtype == torch.float64


@pytest.fixture
def _products_in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The products of a CUDA device, on a CPU: of bfloat16, with their sums in float32."""

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert {a.dtype, b.dtype} == {torch.bfloat16}
        assert dtype == out.dtype == torch.float32
        return out.copy_(a.float() @ b.float())

    def addmm(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert total.dtype == torch.float32
        return out.copy_(total + mm(a, b, dtype, out=torch.empty_like(out)))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(f"{MODULE}._has_instructions", lambda dtype: True)
    monkeypatch.setattr(f"{MODULE}._adds_in_float32", lambda matrix: True)
    yield
    library._destroy()


@pytest.mark.usefixtures("_products_in_float32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}, OBJECTIVES[-1]], ids=str)
@pytest.mark.parametrize("num_tiles", [1, 5])
def test_where_products_are_added_in_float32_it_errs_no_more_than_the_full_logits(
    num_tiles: int,
    settings: dict[str, Any],
    dtype: torch.dtype,
    reference_losses: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums = VOCAB * HIDDEN * 4 if dtype == torch.bfloat16 else 0
    tile = 400 * VOCAB * 2 if num_tiles == 1 else 80 * VOCAB * 2
    monkeypatch.setattr("hf_sft_plugin.loss.tile_choice._CPU_BYTES", tile)
    assert (tile + sums < 400 * VOCAB * 2) == (num_tiles > 1)
    problem = Problem(dtype, num_rows=400)
    transform = LogitTransform(multiplier=-0.5)
    _, gradients = problem.truth(reference_losses, transform, settings)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        fast, plain = problem.fast(transform, settings), problem.plain(transform, settings)
    found, reference = (problem.gradients(3 * result.loss) for result in (fast, plain))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in problem.tensors]
    for true, ours, theirs in zip(gradients, found, reference, strict=True):
        true = 3 * true
        slack = torch.finfo(torch.bfloat16).eps / 2 * true.norm()
        assert (ours.double() - true).norm() <= (theirs.double() - true).norm() + slack


@pytest.mark.usefixtures("_products_in_float32")
def test_equal_weights_cost_no_rounding_where_products_are_added_in_float32() -> None:
    problem = Problem(torch.float32)
    gradients = []
    for weight in (1.0, 0.3):
        problem.weights = torch.full((NUM_ROWS,), weight, dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients.append(problem.gradients(problem.fast().loss)[1])
    torch.testing.assert_close(gradients[1], 0.3 * gradients[0], rtol=1e-6, atol=0)


def test_tiles_of_an_accelerator_suit_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(1000, 64, dtype=torch.bfloat16, device="meta")
    # Of 1,310 rows.
    monkeypatch.setattr(f"{MODULE}.tile_bytes", lambda device: 2_620_000)
    matrix = linear_head._Weight(weight, torch.bfloat16)

    def rows(count: int, trained: Tensor | None) -> int:
        return linear_head._tile_rows(count, matrix, trained)

    assert [rows(n, None) for n in (0, 7, 1310, 1311, 4000)] == [0, 7, 1310, 768, 1024]
    monkeypatch.setattr(f"{MODULE}._adds_in_float32", lambda matrix: True)
    # The sum over tiles would take as much as 128 rows.
    assert [rows(n, weight) for n in (1438, 1439)] == [1438, 768]
    assert rows(1438, weight.float()) == 768
