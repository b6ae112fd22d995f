"""The fused head of a plain linear layer: three matrix products over the response rows, no more.

Rows go through in tiles. A product fills one reused tile with logits; `LogitTile` overwrites them
with their gradient; two more products carry it on. What is held beside the gradients does not grow
with the number of rows.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_sft_plugin.loss.fused_head import HeadLoss, refuse_row_gradients
from hf_sft_plugin.loss.logit_tile import LogitTile, LogitTransform, RowValues
from hf_sft_plugin.loss.masked_loss import weighted_sum, widest_float
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.tile_choice import choose_tile, tile_bytes
from hf_sft_plugin.loss.token_stats import (
    TokenStats,
    refuse_second_derivative,
    statistics_dtype,
)

# Numbers of the weight, or of its gradient, that are converted at a time. On a CPU more no longer
# fit its cache, on an accelerator the products of fewer do not keep it busy.
_PANEL_SIZE = 2**21
_ACCELERATOR_PANEL_SIZE = 2**26
# Tiles of an accelerator have a multiple of these rows: its kernels multiply so many at a time.
_ACCELERATOR_ROWS = 128
# Numbers that rows of a tile are apart: half of them are as much as a GPU reads at once.
_ROW_MULTIPLE = 16
_TINY = torch.finfo(torch.float32).tiny
_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
# What nn.Linear does as long as nobody replaced it.
_LINEAR_FORWARD = nn.Linear.forward


def linear_head_loss(
    hidden_states: Tensor,
    targets: Tensor,
    weights: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    objective: LossObjective,
) -> HeadLoss:
    """Like `fused_head_loss` for the head `transform(linear(hidden_states, weight, bias))`.

    The products run in the dtype that autocast or the weight asks for, or in float32 on a
    processor that has no instructions for that dtype, where it is both faster and closer to the
    truth. Everything between the products is float32, or float64 for float64.

    Args:
        hidden_states: `(N, D)`.
        targets: `(N,)`, int64, each in `[0, V)`.
        weights: `(N,)`, what each row's loss is multiplied with.
        weight: `(V, D)`.
        bias: `(V,)`, or None.
        transform: What the model does to the logits.
        objective: The loss of one token.

    Returns:
        The loss and the statistics of the N rows.

    Raises:
        RuntimeError: If the gradient of each row is asked for; see `refuse_row_gradients`.
    """
    refuse_row_gradients(weights)
    # Inside, all gradients seem needed, even under no_grad.
    is_trained = torch.is_grad_enabled()
    loss, token_losses, *stats = _LinearHeadFunction.apply(
        hidden_states, weight, bias, targets, weights, transform, objective, is_trained
    )
    return HeadLoss(loss, token_losses, TokenStats(*stats))


def is_plain_linear(
    head: nn.Module, forward: Callable[..., Tensor], hidden_states: Tensor
) -> TypeGuard[nn.Linear]:
    """Whether a head is one for `linear_head_loss`: a linear layer that nobody has changed.

    Adapters, quantized layers, parametrizations, weights that are sharded or elsewhere, and a
    forward of the instance's own (Accelerate leaves one where it moves weights) are not. Hooks run
    before and after it, whichever way is taken: those of FSDP2 have the weight whole meanwhile.

    Args:
        head: The LM head.
        forward: Its forward, as it was before anything of ours replaced it.
        hidden_states: What it is called with.
    """
    if getattr(forward, "__func__", None) is not _LINEAR_FORWARD:
        return False
    # `fully_shard` puts a class of its own in the place of that of a module.
    if type(head) is not nn.Linear and type(head).__bases__ != (FSDPModule, nn.Linear):
        return False
    tensors = [hidden_states, *(t for t in (head.weight, head.bias) if t is not None)]
    dtypes = {tensor.dtype for tensor in tensors}
    # Under autocast they may differ, but it leaves float64 alone.
    is_cast = torch.is_autocast_enabled(hidden_states.device.type) and torch.float64 not in dtypes
    return (
        all(type(t) in (Tensor, nn.Parameter) and type(t.data) is Tensor for t in tensors)
        and all(tensor.device == hidden_states.device for tensor in tensors)
        and dtypes <= _DTYPES
        and (is_cast or len(dtypes) == 1)
    )


class _LinearHeadFunction(torch.autograd.Function):
    """Gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        transform: LogitTransform,
        objective: LossObjective,
        is_trained: bool,
    ) -> tuple[Tensor, ...]:
        needs = [is_trained and needed for needed in ctx.needs_input_grad[:3]]
        matrix = _Weight(weight, _product_dtype(hidden_states.device.type, weight.dtype))
        dtype = statistics_dtype(weight)
        grad_hidden = torch.empty_like(hidden_states, dtype=dtype) if needs[0] else None
        factors = weights.to(dtype)
        num_rows = _tile_rows(len(targets), matrix, weight if needs[1] else None)
        num_tiles = -(-len(targets) // max(1, num_rows))
        grad_weight: _WeightGradient | _WholeGradient | None = None
        grad_scale = None
        if needs[1] and num_tiles and _adds_in_float32(matrix):
            grad_scale = (factors.abs().max() * abs(transform.scale)).clamp_min(_TINY)
            grad_weight = _WholeGradient(weight, num_tiles, grad_scale)
        elif needs[1]:
            grad_weight = _WeightGradient(weight, matrix.dtype, num_tiles)
        float_bias = None if bias is None else bias.to(dtype)
        grad_bias = (
            torch.zeros_like(bias, dtype=widest_float(bias.device))
            if bias is not None and needs[2]
            else None
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            tile = choose_tile(hidden_states.device, matrix.dtype)
            work = tile(float_bias, transform, objective, dtype, any(needs), grad_bias)
            values = _run_tiles(
                hidden_states, matrix, targets, factors, num_rows, work, grad_hidden, grad_weight
            )
        ctx.dtypes = hidden_states.dtype, weight.dtype, None if bias is None else bias.dtype
        grad_total = None if grad_weight is None else grad_weight.total
        ctx.save_for_backward(grad_hidden, grad_total, grad_bias, grad_scale)
        outputs = values[:4]
        ctx.mark_non_differentiable(*outputs)
        return weighted_sum(values.token_losses, weights), *outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("torch.log_softmax on the full logits")
        # Asking an accelerator would mean waiting for it.
        is_one = grad_loss.device.type == "cpu" and grad_loss.item() == 1
        *saved, scale = ctx.saved_tensors
        factors = [None if is_one else grad_loss] * len(saved)
        if scale is not None:
            factors[1] = scale * grad_loss
        grads = (
            None if grad is None else (grad if factor is None else grad * factor).to(dtype)
            for grad, factor, dtype in zip(saved, factors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def _run_tiles(
    hidden_states: Tensor,
    matrix: "_Weight",
    targets: Tensor,
    weights: Tensor,
    num_rows: int,
    work: LogitTile,
    grad_hidden: Tensor | None,
    grad_weight: "_WeightGradient | _WholeGradient | None",
) -> RowValues:
    """Takes N rows through the head and back: their values, and the gradients filled in."""
    count = len(hidden_states)
    values = RowValues.empty(count, like=hidden_states, dtype=weights.dtype)
    # Rows of any other length are slow to write and to read.
    width = -(-matrix.size // _ROW_MULTIPLE) * _ROW_MULTIPLE
    room = hidden_states.new_empty(num_rows, width, dtype=matrix.dtype)
    # oneDNN's products for AMX read one number behind a row of odd length, and add 0 times that.
    room[:, matrix.size :] = 0
    tile = room[:, : matrix.size]
    for start in range(0, count, max(1, num_rows)):
        rows = slice(start, start + num_rows)
        hidden, part = hidden_states[rows], RowValues(*(value[rows] for value in values))
        logits = tile[: len(hidden)]
        matrix.apply(hidden.to(matrix.dtype), out=logits)
        work.consume(logits, targets[rows], weights[rows], part)
        coefficients = part.coefficients.unsqueeze(1)
        if grad_hidden is not None:
            torch.mul(matrix.apply_transposed(logits), coefficients, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.add(logits, hidden, coefficients)
    return values


def _tile_rows(count: int, matrix: "_Weight", trained: Tensor | None) -> int:
    """Rows of a tile: of all tiles the same, since a small one would cost as much as a large one.

    One tile takes all rows where several would need no less memory, with the sum over them.

    Args:
        count: Rows in all.
        matrix: The weight.
        trained: The same, where it has a gradient.
    """
    most, row_bytes = tile_bytes(matrix.device), max(1, matrix.size * matrix.dtype.itemsize)
    if trained is not None and _adds_in_float32(matrix) and trained.dtype != torch.float32:
        most_at_once = most + trained.numel() * torch.float32.itemsize
        if count * row_bytes <= most_at_once:
            return count
    num_tiles = -(-count // max(1, most // row_bytes))
    num_rows = -(-count // max(1, num_tiles))
    if matrix.device.type != "cpu":
        num_rows = min(count, -(-num_rows // _ACCELERATOR_ROWS) * _ACCELERATOR_ROWS)
    return num_rows


class _Weight:
    """A weight `(V, D)` in the dtype of the products.

    Where that is wider than its own, it is converted a panel at a time, so that no second weight is
    held; a sum over panels is then in float32 and loses nothing.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.size, self.dtype, self.device = len(weight), dtype, weight.device
        is_widened = dtype.itemsize > weight.dtype.itemsize
        self._weight = weight if is_widened else weight.to(dtype)
        num_rows = _panel_rows(weight) if is_widened else len(weight)
        self._panels = [slice(start, start + num_rows) for start in range(0, self.size, num_rows)]
        # Used again for every panel: new memory costs as much as what is done with it.
        self._room = (
            weight.new_empty(num_rows, weight.shape[1], dtype=dtype) if is_widened else None
        )

    def apply(self, hidden_states: Tensor, out: Tensor) -> None:
        """Writes the logits of `(n, D)` to `out`."""
        for panel, matrix in self._converted():
            torch.mm(hidden_states, matrix.T, out=out[:, panel])

    def apply_transposed(self, grad_logits: Tensor) -> Tensor:
        """The gradient of the hidden states, `(n, D)`."""
        total = grad_logits.new_zeros(len(grad_logits), self._weight.shape[1])
        for panel, matrix in self._converted():
            total.addmm_(grad_logits[:, panel], matrix)
        return total

    def _converted(self) -> Iterator[tuple[slice, Tensor]]:
        for panel in self._panels:
            part = self._weight[panel]
            yield panel, part if self._room is None else self._room[: len(part)].copy_(part)


class _WeightGradient:
    """Sums the gradient of a weight over tiles, in at least float32.

    A weight in float32 has its gradient summed in place. That of any other is summed in panels,
    each of which is converted and dropped after the last tile.

    Attributes:
        total: `(V, D)` in the dtype of the weight; complete after the last tile.
    """

    def __init__(self, weight: Tensor, product_dtype: torch.dtype, num_tiles: int) -> None:
        self.dtype, self.product_dtype = statistics_dtype(weight), product_dtype
        new = torch.empty_like if num_tiles else torch.zeros_like
        self.total = new(weight, memory_format=torch.contiguous_format)
        is_direct = weight.dtype == product_dtype == self.dtype
        num_rows = max(1, len(weight)) if is_direct else _panel_rows(weight)
        self._panels = [slice(start, start + num_rows) for start in range(0, len(weight), num_rows)]
        self._sums: list[Tensor | None] = [None] * len(self._panels)
        self._room = weight.new_empty(
            num_rows if num_tiles == 1 and not is_direct else 0, weight.shape[1], dtype=self.dtype
        )
        self._num_left = num_tiles

    def add(self, grad_logits: Tensor, hidden_states: Tensor, coefficients: Tensor) -> None:
        """Adds a tile: the sum over its rows of coefficient * gradient * hidden state."""
        self._num_left -= 1
        scale = None
        if self.product_dtype != self.dtype:
            # Equal coefficients become 1, which costs no rounding; small ones do not vanish.
            scale = coefficients.abs().max().clamp_min(torch.finfo(self.dtype).tiny)
            coefficients = coefficients / scale
        rows = (hidden_states * coefficients).to(self.product_dtype)
        for index, panel in enumerate(self._panels):
            factors = grad_logits[:, panel].T, rows
            total, sums = self.total[panel], self._sums[index]
            is_first = sums is None
            if sums is None:
                sums = self._room_for(total)
            if scale is None:
                torch.addmm(sums, *factors, beta=0 if is_first else 1, out=sums)
            else:
                product = torch.mm(*factors).to(self.dtype).mul_(scale)
                sums = sums.copy_(product) if is_first else sums.add_(product)
            self._sums[index] = sums
            if self._num_left == 0:
                self._sums[index] = None
                if total.dtype != self.dtype:
                    total.copy_(sums)

    def _room_for(self, total: Tensor) -> Tensor:
        """Where a panel is summed: in place, or in room that the last tile gives back at once."""
        if total.dtype == self.dtype:
            return total
        if self._num_left:
            return total.new_empty(total.shape, dtype=self.dtype)
        return self._room[: len(total)]


class _WholeGradient:
    """The same in one product per tile, where the device adds products up in float32 itself.

    Attributes:
        total: `(V, D)` in the dtype of the weight, but not multiplied with the scale yet.

    Args:
        weight: In float32 or bfloat16.
        num_tiles: At least 1.
        scale: What the largest coefficient is; all are divided by it, so that equal ones become 1,
            which costs no rounding.
    """

    def __init__(self, weight: Tensor, num_tiles: int, scale: Tensor) -> None:
        self.total = torch.empty_like(weight, memory_format=torch.contiguous_format)
        is_in_place = num_tiles == 1 or weight.dtype == torch.float32
        self._sums = (
            self.total if is_in_place else torch.empty_like(self.total, dtype=torch.float32)
        )
        self._scale, self._num_tiles, self._num_left = scale, num_tiles, num_tiles

    def add(self, grad_logits: Tensor, hidden_states: Tensor, coefficients: Tensor) -> None:
        """As in `_WeightGradient`."""
        rows = (hidden_states * (coefficients / self._scale)).to(grad_logits.dtype)
        factors, sums = (grad_logits.T, rows), self._sums
        if sums.dtype == grad_logits.dtype:
            torch.mm(*factors, out=sums)
        elif self._num_left == self._num_tiles:
            torch.mm(*factors, out_dtype=sums.dtype, out=sums)
        else:
            torch.addmm(sums, *factors, out_dtype=sums.dtype, out=sums)
        self._num_left -= 1
        if self._num_left == 0 and sums is not self.total:
            self.total.copy_(sums)


def _adds_in_float32(matrix: _Weight) -> bool:
    """Whether products of bfloat16 can be had in float32, and so added up.

    With float16 the coefficients of a tile could be too small for a scale that is that of all.
    """
    is_nvidia = matrix.device.type == "cuda" and torch.version.hip is None
    return is_nvidia and matrix.dtype == torch.bfloat16


def _panel_rows(weight: Tensor) -> int:
    size = _PANEL_SIZE if weight.device.type == "cpu" else _ACCELERATOR_PANEL_SIZE
    return max(1, size // max(1, weight.shape[1]))


def _product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products: that of the weight or of autocast, where it is worth it."""
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    is_half = dtype in (torch.bfloat16, torch.float16)
    if is_half and device == "cpu" and not _has_instructions(dtype):
        return torch.float32
    return dtype


@cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies this dtype itself; imitating it is several times slower."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities["architecture"] != "x86_64":
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(capabilities[f"avx512_{name}"] or capabilities[f"amx_{name}"])
