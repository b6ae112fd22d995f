"""Statistics from full logits, against float64 arithmetic written out by hand."""

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sft_plugin import compute_entropy, get_response_log_probs
from hf_sft_plugin.loss.token_stats import _row_tiles, shift_labels, token_stats


def reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(target) and entropy, in float64, written with sums over a list of numbers."""
    log_probs, entropies = [], []
    for row, target in zip(
        logits.double().reshape(-1, logits.shape[-1]).tolist(),
        targets.flatten().tolist(),
        strict=True,
    ):
        top = max(row)
        log_z = top + math.log(math.fsum(math.exp(value - top) for value in row))
        log_probs.append(row[target] - log_z)
        entropies.append(
            -math.fsum(
                math.exp(value - log_z) * (value - log_z) for value in row if value != -math.inf
            )
        )
    shape = targets.shape
    return tuple(  # type: ignore[return-value]  # of two
        torch.tensor(values, dtype=torch.float64).view(shape) for values in (log_probs, entropies)
    )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    vocab=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
)
def test_any_shape_and_scale_gives_the_written_out_numbers(
    seed: int, shape: list[int], vocab: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(0, vocab, tuple(shape), generator=generator)
    log_probs, entropy = reference(logits, targets)
    stats = token_stats(logits, targets)
    torch.testing.assert_close(stats.log_probs, log_probs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.token_entropy, entropy, rtol=1e-12, atol=1e-12)
    assert torch.equal(stats.is_top1.bool(), logits.argmax(-1) == targets)


def test_the_entropy_of_uniform_logits_is_log_v() -> None:
    assert compute_entropy(torch.full((3, 7), 5.0)).tolist() == pytest.approx([math.log(7)] * 3)


def test_logits_of_ten_thousand_are_exact() -> None:
    logits = torch.tensor([[1e4, 1e4, -1e4], [1e4, 0.0, 0.0]])
    assert compute_entropy(logits).tolist() == [pytest.approx(math.log(2), abs=1e-7), 0.0]


def test_entries_of_minus_infinity_add_nothing_and_get_no_gradient() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    entropy = compute_entropy(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    entropy = compute_entropy(logits)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, compute_entropy(logits.float()), rtol=0, atol=0)


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 3))
    assert torch.autograd.gradcheck(lambda z: tuple(token_stats(z, targets))[:2], (logits,))


def test_many_tiles_give_what_one_tile_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5, 11, dtype=torch.float64)
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    targets = torch.randint(0, 11, (3, 5))

    def run() -> list[Tensor]:
        z = logits.clone().requires_grad_()
        stats = token_stats(z, targets)
        (weights[0] * stats.log_probs + weights[1] * stats.token_entropy).sum().backward()
        assert z.grad is not None
        return [*(stat.detach() for stat in stats), z.grad]

    whole = run()
    monkeypatch.setattr("hf_sft_plugin.loss.token_stats._TILE_SIZE", 22)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))


def test_labels_move_one_step_left_and_the_last_position_is_ignored() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert shift_labels(torch.tensor([0.5, 0.25]), fill=0).tolist() == [0.25, 0.0]


def test_response_log_probs_are_those_of_the_model(model_factory: Callable[..., Any]) -> None:
    model = model_factory().double()
    input_ids = torch.randint(0, 300, (2, 6))
    labels = torch.randint(0, 300, (2, 6))
    result = get_response_log_probs(model, input_ids, labels, return_token_entropy=True)
    log_probs, entropy = reference(model(input_ids).logits.detach(), labels)
    torch.testing.assert_close(result["log_probs"].detach(), log_probs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result["token_entropy"].detach(), entropy, rtol=1e-12, atol=1e-12)
    assert result["log_probs"].requires_grad
    assert set(get_response_log_probs(model, input_ids, labels)) == {"log_probs"}


def test_labels_that_are_ignored_or_misshapen_are_refused(model: Any) -> None:
    input_ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels holds -100.*fill ignored positions"):
        get_response_log_probs(model, input_ids, torch.tensor([[1, -100, 2]]))
    with pytest.raises(ValueError, match=r"shape \(1, 2\) but input_ids \(1, 3\)"):
        get_response_log_probs(model, input_ids, torch.zeros(1, 2, dtype=torch.long))


class _LargeTensors(TorchDispatchMode):
    """Counts the tensors as large as `logits` that are alive at once, `logits` left out."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits.untyped_storage()
        self.alive: list[Any] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.logits.size() // 4:
                self.alive.append(weakref.ref(tensor.untyped_storage()))
        pointers = {ref().data_ptr() for ref in self.alive if ref() is not None}
        self.most = max(self.most, len(pointers - {self.logits.data_ptr()}))
        return result


def _plain_log_probs(model: Any, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    log_p = model(input_ids).logits.float().log_softmax(-1)
    return {"log_probs": log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)}


@pytest.mark.parametrize(
    ("function", "most"),
    [
        (partial(get_response_log_probs, return_token_entropy=True), 1),
        # The usual way, to show that the counter counts: log-probabilities and their gradient.
        (_plain_log_probs, 3),
    ],
    ids=["ours", "log_softmax"],
)
def test_one_tensor_of_the_size_of_the_logits_is_held_beyond_them_their_gradient(
    function: Callable[..., dict[str, Tensor]], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.token_stats._TILE_SIZE", 2 * 50)
    logits = torch.randn(4, 16, 50, requires_grad=True)
    labels = torch.randint(0, 50, (4, 16))

    class Model:
        def __call__(self, input_ids: Tensor) -> Any:
            return type("Output", (), {"logits": logits})

    with _LargeTensors(logits) as counter:
        sum(function(Model(), labels, labels).values()).sum().backward()
    assert counter.most == most


def test_an_accelerator_takes_more_rows_at_a_time() -> None:
    for device, expected in (("cpu", [6, 4]), ("meta", [10])):
        logits = torch.empty(10, 151_936, device=device)
        assert [len(tile) for (tile,) in _row_tiles(logits)] == expected
