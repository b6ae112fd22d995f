"""Norm, gated product, rotary embedding and low-rank adapter, each as one autograd function.

Written in single operations, as models have them, every intermediate result is a pass over memory
and most are kept until the backward pass. These keep what they were given, and no more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sft_plugin.loss.token_stats import refuse_second_derivative

_ALTERNATIVE = "fused_layers='off'"


class RMSNorm(torch.autograd.Function):
    """Root mean square normalization, `y = x / sqrt(mean(x^2) + eps) * scale`, in float32.

    The formula is that of Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Normalizes over the last dimension.

        Args:
            ctx: Keeps `x`, `scale` and a number for each row.
            x: `(..., D)`.
            scale: `(D,)`.
            eps: Keeps rows of zeros finite.
            dtype: That of the result.

        Returns:
            `(..., D)`, rounded once where that is not float32.
        """
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        return (wide * inverse).mul_(scale.float()).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """With `h = 1 / sqrt(mean(x^2) + eps)`: `h g s - x h^3 mean(g s x)`, and `sum(g x h)`."""
        refuse_second_derivative(_ALTERNATIVE)
        x, scale, inverse = ctx.saved_tensors
        wide, grad, factor = x.float(), grad.float(), scale.float()
        product = grad * wide
        rows, heights = product.reshape(-1, x.shape[-1]), inverse.reshape(-1)
        grad_x = grad_scale = None
        # Autocast would round the sums.
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                grad_scale = rows.t().mv(heights).to(scale.dtype)
            if ctx.needs_input_grad[0]:
                mean = rows.mv(factor).mul_(heights.pow(3)).div_(x.shape[-1]).view_as(inverse)
                torch.mul(grad, factor, out=product)
                grad_x = product.mul_(inverse).addcmul_(wide, mean, value=-1).to(x.dtype)
        return grad_x, grad_scale, None, None


class GatedProduct(torch.autograd.Function):
    """`activation(gate) * up`, whose activation is worked out again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Multiplies two tensors of one shape.

        Args:
            ctx: Keeps both.
            gate: Goes through the activation.
            up: Is multiplied with what comes of it.
            activation: A function of each element, without parameters.
        """
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The product rule."""
        refuse_second_derivative(_ALTERNATIVE)
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (grad_gate,) = torch.autograd.grad(activated, leaf, (grad * up).to(activated.dtype))
        return grad_gate, (grad * activated.detach()).to(up.dtype), None


class Rotation(torch.autograd.Function):
    """Rotary position embedding, by the pairs `(i, i + d/2)` of a head.

    The formula is that of Su et al. 2021, https://arxiv.org/abs/2104.09864, in the layout of
    transformers.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates each head by the angles of its position.

        Args:
            ctx: Keeps the angles, which all layers share.
            heads: `(B, H, S, d)`.
            cos: Of the angles, `(B, 1, S, d)`.
            sin: Likewise.
        """
        ctx.save_for_backward(cos, sin)
        ctx.dtype = heads.dtype
        sin_first, sin_second = sin.chunk(2, dim=-1)
        return _rotate(heads, cos, sin_first, sin_second, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Rotates back."""
        refuse_second_derivative(_ALTERNATIVE)
        cos, sin = ctx.saved_tensors
        sin_first, sin_second = sin.chunk(2, dim=-1)
        return _rotate(grad, cos, sin_second, sin_first, -1).to(ctx.dtype), None, None


class LoRALinear(torch.autograd.Function):
    """A frozen linear layer with an adapter of low rank, `y = x W^T + b + s (x A^T) B^T`.

    The formula is that of Hu et al. 2021, https://arxiv.org/abs/2106.09685. The scale multiplies
    products of r numbers, and the second product adds to the first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cast: Tensor,
        weights: tuple[Tensor, Tensor | None, Tensor, Tensor],
        scale: float,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        """Multiplies in the dtype of `cast`.

        Args:
            ctx: Keeps `cast`, the weights and `(N, r)` numbers.
            x: `(..., I)`.
            cast: The same without a graph, in the dtype of the products.
            weights: W `(O, I)`, the bias `(O,)`, A and B in that dtype.
            scale: s.
            a: `(r, I)`, A as it is trained.
            b: `(O, r)`, B as it is trained.

        Returns:
            `(..., O)`, in the dtype of `cast`.
        """
        rows, (weight, bias, first, second) = cast.reshape(-1, cast.shape[-1]), weights
        low = rows @ first.t()
        # The small term comes first, so that the large one and the sum are rounded once together.
        scaled = low * scale
        output = scaled @ second.t() if bias is None else torch.addmm(bias, scaled, second.t())
        output.addmm_(rows, weight.t())
        ctx.save_for_backward(rows, weight, first, second, low)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With `h = s g B`: `g W + h A` for x, `h^T x` for A and `s g^T (x A^T)` for B."""
        refuse_second_derivative(_ALTERNATIVE)
        rows, weight, first, second, low = ctx.saved_tensors
        of_x, of_a, of_b = ctx.dtypes
        grad = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
        grad_low = (grad @ second).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_low @ first).addmm_(grad, weight).view(ctx.shape).to(of_x)
        grad_a = (grad_low.t() @ rows).to(of_a)
        grad_b = (grad.t() @ low).mul_(ctx.scale).to(of_b)
        return grad_x, None, None, None, grad_a, grad_b


def _rotate(
    heads: Tensor, cos: Tensor, from_second: Tensor, from_first: Tensor, sign: int
) -> Tensor:
    """`heads * cos`, and in each half the other times its factor: minus, and plus, the sign."""
    rotated = heads * cos
    first, second = heads.to(rotated.dtype).chunk(2, dim=-1)
    own_first, own_second = rotated.chunk(2, dim=-1)
    own_first.addcmul_(second, from_second, value=-sign)
    own_second.addcmul_(first, from_first, value=sign)
    return rotated
