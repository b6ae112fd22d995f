"""What `logit_tile.py` does to a tile of logits, as Triton kernels that touch each logit twice.

One kernel reads the tile and leaves a few sums of each row, torch works out from them what the loss
and the gradient of each row are, and another kernel reads the tile again and writes the gradient
over it. With b bytes to a logit that is 3 * b bytes of memory traffic for each of them, b where no
gradient is asked for, and nothing else of the size of the tile is held. The gradient of a bias
reads the tile once more.

Nothing is added up by several programs at once, so equal inputs give equal bits.
"""

from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sft_plugin.loss.logit_tile import LogitTile, RowSums, RowValues

# Columns that a program works on at a time: with the warps below, 16 numbers for each thread.
_BLOCK_SIZE = 4096
_NUM_WARPS = 8
# The gradient of the bias: few columns, so that there are programs enough.
_BIAS_BLOCK_SIZE = 256
# The least finite float32, which stands for -inf where that would be multiplied with 0.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


class TritonTile(LogitTile):
    """A `LogitTile` for tiles in float32, bfloat16 or float16 on a device that Triton knows.

    The statistics are float32, whatever the tile is.
    """

    def consume(self, logits: Tensor, targets: Tensor, weights: Tensor, values: RowValues) -> None:
        """As in `LogitTile`; the columns of the logits have to be adjacent."""
        assert self.dtype == torch.float32, "float64 belongs to LogitTile"
        assert logits.stride(1) == 1, "the kernels step from column to column"
        values.coefficients.copy_(weights * self.transform.scale)
        num_rows, vocab_size = logits.shape
        block_size = min(_BLOCK_SIZE, triton.next_power_of_2(vocab_size))
        tile = (
            logits,
            logits.stride(0),
            None if self.bias is None else self.bias.contiguous(),
            targets.contiguous(),
            vocab_size,
            *(None if value is None else float(value) for value in astuple(self.transform)),
        )
        sums = torch.empty(5, num_rows, dtype=torch.float32, device=logits.device)
        # Triton launches on the current device, which need not be that of the tile.
        with torch.cuda.device_of(logits):
            has_mean = bool(self.objective.label_smoothing)
            _row_sums_kernel[(num_rows,)](
                *tile, sums, num_rows, values.is_top1, has_mean, block_size, num_warps=_NUM_WARPS
            )
            top, target, exp_sum, product_sum, mean = sums
            row_sums = RowSums(top, target, exp_sum, product_sum, mean if has_mean else None)
            rows = self._finish_rows(row_sums, values, vocab_size)
            if not self.needs_gradient:
                return
            if self.bias_gradient is not None:
                # Before the gradient is rounded to the dtype of the tile.
                _bias_gradient_kernel[(triton.cdiv(vocab_size, _BIAS_BLOCK_SIZE),)](
                    *tile,
                    top,
                    *rows,
                    num_rows,
                    values.coefficients,
                    self.bias_gradient,
                    _BIAS_BLOCK_SIZE,
                )
            grid = (num_rows * triton.cdiv(vocab_size, block_size),)
            _gradient_kernel[grid](*tile, top, *rows, block_size, num_warps=_NUM_WARPS)


# Tiles begin at any row and have any number of them; none of that is worth a kernel of its own.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["targets", "is_top1"])
def _row_sums_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    bias: tl.tensor,
    targets: tl.tensor,
    vocab_size: tl.tensor,
    multiplier: tl.tensor,
    divisor: tl.tensor,
    softcap: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    is_top1: tl.tensor,
    has_mean: tl.constexpr,
    block_size: tl.constexpr,
) -> None:
    """Writes the `RowSums` of one row, `(5, num_rows)`; reads its logits once, a block at a time.

    All sums are of logits less the largest so far, and follow it when it grows: their terms are of
    one sign, so nothing cancels.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    target_z = _capped(_scaled(logits, bias, target, None, multiplier, divisor), softcap)
    # One by one, or Triton's interpreter leaves them Python numbers.
    top = _LOWEST
    top_column = 0
    exp_sum = 0.0
    product_sum = 0.0
    z_sum = 0.0
    for start in range(0, vocab_size, block_size):
        columns = start + tl.arange(0, block_size)
        mask = columns < vocab_size
        z = _capped(_scaled(logits, bias, columns, mask, multiplier, divisor), softcap)
        z = tl.where(mask, z, float("-inf"))
        block_top = tl.max(z, 0)
        # In few blocks of many.
        if block_top > top:
            # Of equal logits the first counts as the most probable.
            top_column = tl.min(tl.where(z == block_top, columns, vocab_size), 0)
        new_top = tl.maximum(top, block_top)
        down = tl.maximum(top - new_top, _LOWEST)
        shrink = tl.exp(down)
        top = new_top
        z -= top
        exp_z = tl.exp(z)
        products = tl.maximum(z, _LOWEST) * exp_z
        product_sum = product_sum * shrink + exp_sum * (shrink * down) + tl.sum(products, 0)
        exp_sum = exp_sum * shrink + tl.sum(exp_z, 0)
        if has_mean:
            z_sum += start * down + tl.sum(tl.where(mask, z, 0.0), 0)
    sums += row
    tl.store(sums, top)
    tl.store(sums + num_rows, target_z - top)
    tl.store(sums + 2 * num_rows, exp_sum)
    tl.store(sums + 3 * num_rows, product_sum)
    if has_mean:
        tl.store(sums + 4 * num_rows, z_sum / vocab_size)
    tl.store(is_top1 + row, (top_column == target).to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=["targets"])
def _gradient_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    bias: tl.tensor,
    targets: tl.tensor,
    vocab_size: tl.tensor,
    multiplier: tl.tensor,
    divisor: tl.tensor,
    softcap: tl.tensor,
    tops: tl.tensor,
    exp_factors: tl.tensor,
    at_targets: tl.tensor,
    product_factors: tl.tensor,
    offsets: tl.tensor,
    spreads: tl.tensor,
    block_size: tl.constexpr,
) -> None:
    """Writes the gradient of some columns of a row over their logits.

    The programs of a row follow each other, so that those that run at a time are close in memory.
    """
    num_blocks = tl.cdiv(vocab_size, block_size)
    row = tl.program_id(0) // num_blocks
    logits += row.to(tl.int64) * row_stride
    columns = tl.program_id(0) % num_blocks * block_size + tl.arange(0, block_size)
    mask = columns < vocab_size
    gradient = _gradient(
        logits,
        bias,
        targets,
        multiplier,
        divisor,
        softcap,
        tops,
        exp_factors,
        at_targets,
        product_factors,
        offsets,
        spreads,
        row,
        columns,
        mask,
    )
    tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["targets", "coefficients"]
)
def _bias_gradient_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    bias: tl.tensor,
    targets: tl.tensor,
    vocab_size: tl.tensor,
    multiplier: tl.tensor,
    divisor: tl.tensor,
    softcap: tl.tensor,
    tops: tl.tensor,
    exp_factors: tl.tensor,
    at_targets: tl.tensor,
    product_factors: tl.tensor,
    offsets: tl.tensor,
    spreads: tl.tensor,
    num_rows: tl.tensor,
    coefficients: tl.tensor,
    bias_gradient: tl.tensor,
    block_size: tl.constexpr,
) -> None:
    """Adds coefficient * gradient of all rows, at some columns, to the gradient of the bias."""
    columns = tl.program_id(0) * block_size + tl.arange(0, block_size)
    mask = columns < vocab_size
    bias_gradient += columns
    total = tl.load(bias_gradient, mask=mask)
    for row in range(num_rows):
        gradient = _gradient(
            logits,
            bias,
            targets,
            multiplier,
            divisor,
            softcap,
            tops,
            exp_factors,
            at_targets,
            product_factors,
            offsets,
            spreads,
            row,
            columns,
            mask,
        )
        total += (gradient * tl.load(coefficients + row)).to(total.dtype)
        logits += row_stride
    tl.store(bias_gradient, total, mask=mask)


@triton.jit
def _gradient(
    logits: tl.tensor,
    bias: tl.tensor,
    targets: tl.tensor,
    multiplier: tl.tensor,
    divisor: tl.tensor,
    softcap: tl.tensor,
    tops: tl.tensor,
    exp_factors: tl.tensor,
    at_targets: tl.tensor,
    product_factors: tl.tensor,
    offsets: tl.tensor,
    spreads: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """The gradient of some columns of a row as in `RowGradient`, through soft cap and all."""
    z = _scaled(logits, bias, columns, mask, multiplier, divisor)
    if softcap is not None:
        capped = _tanh(tl.div_rn(z, softcap))
        z = capped * softcap
    z -= tl.load(tops + row)
    exp_z = tl.exp(z)
    gradient = exp_z * tl.load(exp_factors + row)
    if product_factors is not None:
        products = (tl.maximum(z, _LOWEST) + tl.load(offsets + row)) * exp_z
        gradient += products * tl.load(product_factors + row)
    if spreads is not None:
        gradient += tl.load(spreads + row)
    is_target = columns == tl.load(targets + row)
    gradient = tl.where(is_target, tl.load(at_targets + row), gradient)
    if softcap is not None:
        gradient *= 1.0 - capped * capped
    return gradient


@triton.jit
def _scaled(
    logits: tl.tensor,
    bias: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    multiplier: tl.tensor,
    divisor: tl.tensor,
) -> tl.tensor:
    """Logits with their bias, as they are before the soft cap, in float32."""
    z = tl.load(logits + columns, mask=mask).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=mask)
    if multiplier is not None:
        z *= multiplier
    if divisor is not None:
        z = tl.div_rn(z, divisor)
    return z


@triton.jit
def _capped(z: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Logits after the soft cap, where there is one."""
    if softcap is not None:
        z = _tanh(tl.div_rn(z, softcap)) * softcap
    return z


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """The hyperbolic tangent to 2 units in the last place; Triton has none of its own.

    Near 0 a polynomial for (tanh(x) - x) / x^3 in x^2, fitted for the least largest error.
    """
    square = x * x
    series = -0.005905868019908667
    series = series * square + 0.02080538496375084
    series = series * square - 0.053786683827638626
    series = series * square + 0.13331958651542664
    series = series * square - 0.33333298563957214
    size = tl.abs(x)
    far = 1.0 - tl.div_rn(2.0, tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, x + x * (square * series), tl.where(x < 0, -far, far))
