"""Norm, gated product and rotary embedding are what models write out in single operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hf_sft_plugin.models.layer_functions import GatedProduct, RMSNorm, Rotation

EPS = 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The result and the gradients of all inputs, in float64."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    output = function(*leaves)
    output.backward(grad.to(output.dtype))
    found = [output, *(leaf.grad for leaf in leaves)]
    return [each.detach().double() for each in found if each is not None]


def true_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * scale


def models_norm(x: Tensor, scale: Tensor) -> Tensor:
    module = LlamaRMSNorm(len(scale), EPS)
    module.weight = nn.Parameter(scale) if scale.is_leaf else scale
    return torch.func.functional_call(module, {"weight": scale}, (x,))  # type: ignore[no-any-return]


def our_norm(x: Tensor, scale: Tensor) -> Tensor:
    normed: Tensor = RMSNorm.apply(x, scale, EPS, torch.promote_types(x.dtype, scale.dtype))
    return normed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7, 576), (3, 5, 2, 64), (4, 1), (200, 1000)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_the_norm_errs_no_more_than_that_of_the_model(
    dtype: torch.dtype, shape: tuple[int, ...], size: float
) -> None:
    inputs = [(draw(*shape) * size).to(dtype), (1 + draw(shape[-1], seed=1)).to(dtype)]
    grad = draw(*shape, seed=2).to(dtype)
    truth = run(true_norm, grad.double(), *(each.double() for each in inputs))
    ours, models = (run(norm, grad, *inputs) for norm in (our_norm, models_norm))
    # What is rounded are the terms, which may cancel.
    x, scale, upstream = inputs[0].double(), inputs[1].double(), grad.double()
    height = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    terms = truth[0], upstream * scale * height, (upstream * x * height).abs().flatten(0, -2).sum(0)
    for own, other, exact, term in zip(ours, models, truth, terms, strict=True):
        slack = torch.finfo(torch.float32).eps * term.norm()
        assert (own - exact).norm() <= (other - exact).norm() + slack


def test_the_norm_of_mixed_dtypes_is_that_of_the_model() -> None:
    x, scale, grad = draw(5, 64).bfloat16(), draw(64, seed=1).float(), draw(5, 64, seed=2)
    ours, models = (run(norm, grad, x, scale) for norm in (our_norm, models_norm))
    assert our_norm(x, scale).dtype == torch.float32
    for own, other in zip(ours, models, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-2)


def test_rows_of_zeros_and_rows_with_nan_stay_among_themselves() -> None:
    x = draw(3, 8).float()
    x[0], x[1, 2] = 0.0, torch.nan
    output, grad_x, _ = run(our_norm, torch.ones(3, 8), x, torch.ones(8))
    assert output[0].eq(0).all()
    assert grad_x[0].isfinite().all()
    assert output[1].isnan().all()
    assert output[2].isfinite().all()
    assert grad_x[2].isfinite().all()


@pytest.mark.parametrize(("trains_x", "trains_scale"), [(True, False), (False, True)])
def test_a_norm_gives_gradients_to_what_is_trained_alone(
    trains_x: bool, trains_scale: bool
) -> None:
    x, scale = (
        draw(3, 8).float().requires_grad_(trains_x),
        torch.ones(8).requires_grad_(trains_scale),
    )
    our_norm(x, scale).sum().backward()
    assert (x.grad is not None, scale.grad is not None) == (trains_x, trains_scale)


def test_no_matrix_product_of_a_norm_is_rounded_by_autocast() -> None:
    x, scale, grad = draw(5, 64).float(), draw(64, seed=1).float(), draw(5, 64, seed=2)
    plain = run(our_norm, grad, x, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(our_norm, grad, x, scale)
    assert all(map(torch.equal, plain, cast))


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_the_gated_product_is_that_of_the_activation(name: str) -> None:
    activation: Any = ACT2FN[name]
    gate, up, grad = (draw(2, 5, 6, seed=seed) for seed in range(3))
    ours = run(lambda *inputs: GatedProduct.apply(*inputs, activation), grad, gate, up)
    plain = run(lambda gate, up: activation(gate) * up, grad, gate, up)
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-14, atol=1e-14)
    leaves = gate.requires_grad_(), up.requires_grad_()
    assert gradcheck(lambda *inputs: GatedProduct.apply(*inputs, activation), leaves)


def test_a_gated_product_of_two_dtypes_gives_each_its_own_gradient() -> None:
    gate, up = draw(4, 6).bfloat16().requires_grad_(), draw(4, 6, seed=1).float().requires_grad_()
    output = GatedProduct.apply(gate, up, nn.functional.silu)
    output.sum().backward()
    assert output.dtype == torch.float32
    assert gate.grad is not None
    assert gate.grad.dtype == torch.bfloat16
    assert up.grad is not None
    assert up.grad.dtype == torch.float32


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_rotation_is_that_of_the_model(is_transposed: bool) -> None:
    heads, grad = (draw(2, 5, 3, 8, seed=seed) for seed in (0, 1))
    if not is_transposed:
        heads, grad = heads.transpose(1, 2).contiguous(), grad.transpose(1, 2).contiguous()
    else:
        heads, grad = heads.transpose(1, 2), grad.transpose(1, 2)
    # The two halves of real angles are the same; those of a scaled embedding need not be.
    cos, sin = draw(2, 5, 8, seed=2), draw(2, 5, 8, seed=3)
    ours = run(lambda x: Rotation.apply(x, cos[:, None], sin[:, None]), grad, heads)
    models = run(lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0], grad, heads)
    for own, other in zip(ours, models, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-14, atol=1e-14)
    leaf = heads.detach().requires_grad_()
    assert gradcheck(lambda x: Rotation.apply(x, cos[:, None], sin[:, None]), leaf)


def test_a_rotation_takes_the_dtype_of_its_angles_and_gives_gradients_in_that_of_the_heads() -> (
    None
):
    heads = draw(1, 2, 3, 8).bfloat16().requires_grad_()
    cos, sin = draw(1, 1, 3, 8, seed=1).float(), draw(1, 1, 3, 8, seed=2).float()
    rotated = Rotation.apply(heads, cos, sin)
    rotated.sum().backward()
    assert rotated.dtype == torch.float32
    assert heads.grad is not None
    assert heads.grad.dtype == torch.bfloat16


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda x: our_norm(x, torch.ones(8)),
    "gated product": lambda x: GatedProduct.apply(x, x, torch.tanh),
    "rotation": lambda x: Rotation.apply(x, torch.ones(4, 8), torch.ones(4, 8)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_of_the_gradient_is_refused(name: str) -> None:
    x = draw(1, 1, 4, 8).float().requires_grad_()
    output = FUNCTIONS[name](x).square().sum()
    # At once: torch.autograd.grad would walk around a refusal of later.
    with pytest.raises(RuntimeError, match="Use fused_layers='off'"):
        torch.autograd.grad(output, x, create_graph=True)
