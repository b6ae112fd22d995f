"""Attention without padding, against softmax written out in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen

from hf_sft_plugin.models import attention
from hf_sft_plugin.models.attention import document_attention

LENGTHS = [7, 1, 12, 4]
NUM_TOKENS = sum(LENGTHS)


class Layer(nn.Module):
    """Stands for the layer that asks for attention."""


def heads(num_heads: int, size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, num_heads, NUM_TOKENS, size, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).to(query.device, torch.int32)
    output, weights = document_attention(
        Layer(),
        query,
        key,
        value,
        None,
        document_lengths=LENGTHS,
        cu_seq_lens_q=boundaries,
        **options,
    )
    assert weights is None
    return output


def truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lengths: list[int] = LENGTHS,
) -> Tensor:
    """One token and one head at a time, in float64."""
    query, key, value = (x[0].double() for x in (query, key, value))
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    group = len(query) // len(key)
    starts = [sum(lengths[:n]) for n, length in enumerate(lengths) for _ in range(length)]
    rows = []
    for position, start in enumerate(starts):
        first = start if sliding_window is None else max(start, position - sliding_window + 1)
        seen = slice(first, position + 1)
        outputs = []
        for head, q in enumerate(query[:, position]):
            scores = key[head // group, seen] @ q * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            weights = scores.exp()
            total = weights.sum() + (0 if s_aux is None else s_aux[head].double().exp())
            outputs.append(weights / total @ value[head // group, seen])
        rows.append(torch.stack(outputs))
    return torch.stack(rows).unsqueeze(0)


SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.7},
        *({"sliding_window": window} for window in (1, 2, 5, 12, 100)),
        {"softcap": 1.5},
        {"softcap": 1.5, "sliding_window": 3},
        {"s_aux": SINKS},
        {"s_aux": SINKS, "sliding_window": 5, "softcap": 2.0},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("smallest_block", [1, 256])
def test_each_token_sees_what_came_before_it_in_its_own_document(
    options: dict[str, Any],
    num_kv_heads: int,
    smallest_block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_sft_plugin.models.attention._MIN_BLOCK", smallest_block)
    inputs = heads(4, 8, 0), heads(num_kv_heads, 8, 1), heads(num_kv_heads, 8, 2)
    output, expected = run(*inputs, **options), truth(*inputs, **options)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    gradient = heads(4, 8, 3).detach().transpose(1, 2)
    found = torch.autograd.grad(output, inputs, gradient)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


# A prompt of seven tokens, a response of one, a conversation that goes on from both, and one more.
CONTEXTS = [[], [0], [0, 1], [0]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"sliding_window": window} for window in (1, 2, 5, 12, 100)),
        {"softcap": 1.5, "sliding_window": 3},
        {"s_aux": SINKS, "scaling": 0.7},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("smallest_block", [1, 256])
def test_a_document_that_goes_on_from_others_sees_them_before_itself(
    options: dict[str, Any],
    num_kv_heads: int,
    smallest_block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_sft_plugin.models.attention._MIN_BLOCK", smallest_block)
    inputs = heads(4, 8, 0), heads(num_kv_heads, 8, 1), heads(num_kv_heads, 8, 2)
    shared = sharing()
    output, expected = run(*inputs, **shared, **options), joined_truth(*inputs, **options)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    gradient = heads(4, 8, 3).detach().transpose(1, 2)
    found = torch.autograd.grad(output, inputs, gradient)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def sharing() -> dict[str, Any]:
    """What a layer is told of `CONTEXTS`."""
    pieces = torch.arange(NUM_TOKENS).split(LENGTHS)
    keys = [[*(pieces[n] for n in context), pieces[own]] for own, context in enumerate(CONTEXTS)]
    counts = [sum(map(len, parts)) for parts in keys]
    return {
        "document_contexts": CONTEXTS,
        "key_index": torch.cat([part for parts in keys for part in parts]),
        "cu_seq_lens_k": torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        "max_length_k": max(counts),
    }


def joined_truth(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Each document with all that stands before it, as a document of its own; its own part."""
    parts = [tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)]
    outputs = []
    for own, context in enumerate(CONTEXTS):
        whole = [torch.cat([part[n] for n in (*context, own)], dim=2) for part in parts]
        outputs.append(truth(*whole, lengths=[whole[0].shape[2]], **options)[:, -LENGTHS[own] :])
    return torch.cat(outputs, dim=1)


def test_values_may_be_smaller_than_keys() -> None:
    inputs = heads(4, 12, 0), heads(4, 12, 1), heads(4, 6, 2)
    torch.testing.assert_close(run(*inputs), truth(*inputs), rtol=1e-12, atol=1e-13)


def test_a_cpu_reads_the_rows_of_a_head_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def attend(*tensors: Tensor, **options: Any) -> Tensor:
        read.extend(tensor.stride()[-2:] for tensor in tensors)
        return fused(*tensors, **options)

    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    # As a layer gives them: the heads of a token side by side.
    inputs = [
        heads(n, 8, seed).detach().transpose(1, 2).contiguous().requires_grad_()
        for seed, n in enumerate((4, 2, 2))
    ]
    views = [tensor.transpose(1, 2) for tensor in inputs]
    output, expected = run(*views), truth(*views)
    assert read == [(8, 1)] * 3 * len(LENGTHS)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    gradient = heads(4, 8, 3).detach().transpose(1, 2)
    found = torch.autograd.grad(output, inputs, gradient)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
        # And so the layer gets them back, without another copy.
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_not_a_bit_of_a_document_changes_with_the_tokens_of_another() -> None:
    query, key, value = (heads(4, 8, seed, torch.float32).detach() for seed in range(3))
    before = run(query, key, value)
    for tensor in (query, key, value):
        tensor[:, :, 10] = torch.nan
    after = run(query, key, value)
    document = slice(8, 20)
    others = [*range(8), *range(20, 24)]
    assert torch.equal(before[:, others], after[:, others])
    assert after[:, document].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_computes_in_float32_at_least_and_gives_back_the_dtype_of_the_values(
    dtype: torch.dtype,
) -> None:
    inputs = [heads(4, 8, seed, dtype) for seed in range(3)]
    output = run(*inputs)
    assert output.dtype == dtype
    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), truth(*inputs), rtol=bound, atol=4 * bound)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(*inputs), output)


def test_dropout_leaves_the_mean_as_it_is() -> None:
    inputs = heads(4, 8, 0), heads(4, 8, 1), torch.ones(1, 4, NUM_TOKENS, 8)
    torch.manual_seed(0)
    outputs = torch.stack([run(*inputs, dropout=0.25) for _ in range(100)])
    assert outputs.std() > 0.05
    torch.testing.assert_close(outputs.mean(), torch.tensor(1.0), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_lengths": None}, "Layer was run without the lengths of its documents"),
        ({"document_lengths": [5, 5]}, "attends from 1 x 24 to 24 tokens, but .* have 10 together"),
        ({"position_bias": torch.zeros(1)}, "Layer adds a bias of positions to its scores"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(change: dict[str, Any], message: str) -> None:
    options = {
        "document_lengths": LENGTHS,
        "cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0),
        **change,
    }
    inputs = [heads(4, 8, seed) for seed in range(3)]
    with pytest.raises(ValueError, match=message):
        document_attention(Layer(), *inputs, None, **options)


def varlen_of_torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What the documentation of torch says about its kernel, which runs on a GPU alone."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert window_size[1] == 0
    outputs = []
    for number in range(len(cu_seq_q) - 1):
        asked, seen = (slice(*x[number : number + 2].tolist()) for x in (cu_seq_q, cu_seq_k))
        q, k, v = query[asked], key[seen], value[seen]
        assert len(q) <= max_q
        assert len(k) <= max_k
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (k, v))
        # Queries belong to the last of the keys, and see so many before their own.
        rows = torch.arange(len(k) - len(q), len(k)).unsqueeze(-1)
        columns = torch.arange(len(k))
        allowed = columns <= rows
        if window_size[0] >= 0:
            allowed &= columns >= rows - window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or query.shape[-1] ** -0.5)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def varlen_of_torch_2_13(*args: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
    """Wants to be told of fewer heads of keys."""
    assert enable_gqa or args[0].shape[1] == args[1].shape[1]
    return varlen_of_torch_2_11(*args, **options)


@pytest.mark.parametrize("varlen_attn", [varlen_of_torch_2_11, varlen_of_torch_2_13])
@pytest.mark.parametrize(
    "options", [{}, {"scaling": 0.7}, *({"sliding_window": n} for n in (1, 5, 100))], ids=str
)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("shares", [False, True], ids=["apart", "shared"])
def test_the_kernel_of_a_gpu_is_told_all_that_it_has_to_know(
    shares: bool,
    num_kv_heads: int,
    options: dict[str, Any],
    varlen_attn: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_takes_varlen", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    inputs = heads(4, 8, 0), heads(num_kv_heads, 8, 1), heads(num_kv_heads, 8, 2)
    output = run(*inputs, **(sharing() if shares else {}), **options)
    expected = (joined_truth if shares else truth)(*inputs, **options)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"scaling": 0.7}])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shares", [False, True], ids=["apart", "shared"])
def test_a_gpu_errs_no_more_than_rounding(
    options: dict[str, Any], num_kv_heads: int, dtype: torch.dtype, shares: bool
) -> None:
    inputs = [
        heads(n, 16, seed, dtype).detach().cuda().requires_grad_()
        for seed, n in enumerate((4, num_kv_heads, num_kv_heads))
    ]
    if shares:
        told = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in sharing().items()}
        output, expected = run(*inputs, **told, **options), joined_truth(*inputs, **options)
    else:
        output, expected = run(*inputs, **options), truth(*inputs, **options)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=bound, atol=bound)
    gradient = torch.ones_like(output)
    found = torch.autograd.grad(output, inputs, gradient)
    for ours, theirs in zip(
        found, torch.autograd.grad(expected, inputs, gradient.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=4 * bound, atol=4 * bound)
