"""Some rows of logits become their statistics and, in place, their gradient.

The rows are taken a few at a time, so that the passes over them stay in the processor's cache.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.token_stats import TokenTerms

# Numbers worked on at a time. On a CPU more no longer fit its cache, on an accelerator fewer do
# not keep it busy.
_CPU_BLOCK_SIZE = 2**20
_BLOCK_SIZE = 2**25
# Numbers of a row among which the largest is looked for at once; an argmax of a whole row is slow.
_TOP_BLOCK = 512


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its LM head.

    Attributes:
        multiplier: The logits are multiplied with this, where it is given.
        divisor: Then they are divided by this.
        softcap: Then cap * tanh(logits / cap) bounds them.

    Examples:
        >>> LogitTransform(multiplier=2.0)(torch.tensor([1.0, 3.0]))
        tensor([2., 6.])
    """

    multiplier: float | None = None
    divisor: float | None = None
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed logits, in the dtype of the given ones."""
        if self.multiplier is not None:
            logits = logits * self.multiplier
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def scale(self) -> float:
        """What the logits are multiplied with before the soft cap."""
        return (1.0 if self.multiplier is None else self.multiplier) / (self.divisor or 1.0)


class RowValues(NamedTuple):
    """What is known about each row; all of shape `(n,)`.

    Attributes:
        token_losses: The loss of each token, without its weight.
        log_probs: log p(target).
        token_entropy: Entropy of the prediction.
        is_top1: 1.0 where the target is the most probable token, else 0.0.
        coefficients: What the row's gradient has to be multiplied with.
    """

    token_losses: Tensor
    log_probs: Tensor
    token_entropy: Tensor
    is_top1: Tensor
    coefficients: Tensor

    @classmethod
    def empty(cls, count: int, like: Tensor, dtype: torch.dtype) -> "RowValues":
        """Room for the values of `count` rows."""
        return cls(*like.new_zeros(len(cls._fields), count, dtype=dtype))


class RowSums(NamedTuple):
    """What one pass over the transformed logits of each row gives; all of one shape.

    Attributes:
        top: The largest logit; the others are taken less it.
        target: The logit of the target, less the largest.
        exp_sum: Sum of the exponentiated logits.
        product_sum: Sum of each logit times its exponential.
        mean: Mean of the logits; None where the objective has no need of it.
    """

    top: Tensor
    target: Tensor
    exp_sum: Tensor
    product_sum: Tensor
    mean: Tensor | None


class RowGradient(NamedTuple):
    """The gradient of each row, with z for its logits less the largest; all of one shape.

        exp(z) * (exp_factor + product_factor * (z + offset)) + spread, and at_target at the target

    Attributes:
        exp_factor: See above.
        at_target: See above.
        product_factor: See above; None, like `offset`, where the objective has no entropy term.
        offset: See above.
        spread: See above; None without label smoothing.
    """

    exp_factor: Tensor
    at_target: Tensor
    product_factor: Tensor | None = None
    offset: Tensor | None = None
    spread: Tensor | None = None


class LogitTile:
    """Turns logits into statistics and gradients.

    A row of the gradient times its coefficient is the derivative of weight * loss with respect to
    the row's logits before bias and transform. The coefficient is left to the caller, who has
    smaller things to multiply with it.

    Args:
        bias: `(V,)` in the dtype of the statistics, added to the logits; None adds nothing.
        transform: What is done to the logits after that.
        objective: The loss of a token.
        dtype: That of the statistics.
        needs_gradient: Whether the logits are replaced by their gradient; else they are spoilt.
        bias_gradient: `(V,)`, to which the gradient of the bias is added, many times: in the most
            precise dtype there is. None adds nothing.
    """

    def __init__(
        self,
        bias: Tensor | None,
        transform: LogitTransform,
        objective: LossObjective,
        dtype: torch.dtype,
        needs_gradient: bool,
        bias_gradient: Tensor | None,
    ) -> None:
        self.bias, self.transform, self.objective = bias, transform, objective
        self.dtype, self.needs_gradient, self.bias_gradient = dtype, needs_gradient, bias_gradient
        self._buffers: dict[str, Tensor] = {}

    def consume(self, logits: Tensor, targets: Tensor, weights: Tensor, values: RowValues) -> None:
        """Fills in the values of `n` rows and leaves their gradient in the place of their logits.

        Args:
            logits: `(n, V)`, in the dtype of the products.
            targets: `(n,)`.
            weights: `(n,)`, in the dtype of the statistics.
            values: Room for the values of these rows.
        """
        is_cpu = logits.device.type == "cpu"
        size = _CPU_BLOCK_SIZE if is_cpu else _BLOCK_SIZE
        # Reductions give each row to one thread.
        num_rows = max(size // logits.shape[1], torch.get_num_threads() if is_cpu else 1)
        for start in range(0, len(logits), num_rows):
            rows = slice(start, start + num_rows)
            block = RowValues(*(value[rows].unsqueeze(1) for value in values))
            coefficients = weights[rows].unsqueeze(1) * self.transform.scale
            block.coefficients.copy_(coefficients)
            self._consume_block(logits[rows], targets[rows].unsqueeze(1), block)

    def _consume_block(self, logits: Tensor, targets: Tensor, values: RowValues) -> None:
        """As `consume`, for rows that fit the cache; what belongs to a row is `(n, 1)`."""
        z = logits
        if logits.dtype != self.dtype:
            z = self._buffer("logits", logits).copy_(logits)
        slope = self._apply_transform(z)
        top, top1 = _row_maxima(z)
        # After this no logit is too large for exp, and the sum over p * z cancels nothing.
        z.sub_(top)
        target_z = z.gather(1, targets)
        exp_z = torch.exp(z, out=self._buffer("exp", z))
        exp_sum = exp_z.sum(1, keepdim=True)
        mean_z = z.mean(1, keepdim=True) if self.objective.label_smoothing else None
        if self.bias is not None or logits.dtype == torch.float16:
            # A probability of 0 meets a logarithm of -inf: their product is 0 in the limit.
            z.clamp_min_(torch.finfo(self.dtype).min)
        keeps_z = self.needs_gradient and self.objective.entropy_coef
        products = torch.mul(z, exp_z, out=self._buffer("products", z) if keeps_z else z)
        sums = RowSums(top, target_z, exp_sum, products.sum(1, keepdim=True), mean_z)
        values.is_top1.copy_(top1 == targets)
        rows = self._finish_rows(sums, values, z.shape[1])
        if not self.needs_gradient:
            return
        if rows.product_factor is None or rows.offset is None:
            torch.mul(exp_z, rows.exp_factor, out=z)
        else:
            z.add_(rows.offset).mul_(exp_z).mul_(rows.product_factor)
            z.addcmul_(exp_z, rows.exp_factor)
        if rows.spread is not None:
            z.add_(rows.spread)
        z.scatter_(1, targets, rows.at_target)
        if slope is not None:
            z.mul_(slope)
        if self.bias_gradient is not None:
            self.bias_gradient += (z * values.coefficients).sum(0)
        if z is not logits:
            logits.copy_(z)

    def _apply_transform(self, logits: Tensor) -> Tensor | None:
        """Adds the bias and transforms in place; returns the derivative of the soft cap."""
        if self.bias is not None:
            logits.add_(self.bias)
        if self.transform.multiplier is not None:
            logits.mul_(self.transform.multiplier)
        if self.transform.divisor is not None:
            logits.div_(self.transform.divisor)
        if self.transform.softcap is None:
            return None
        logits.div_(self.transform.softcap).tanh_()
        slope = torch.mul(logits, logits, out=self._buffer("slope", logits)).neg_().add_(1)
        logits.mul_(self.transform.softcap)
        return slope

    def _finish_rows(self, sums: RowSums, values: RowValues, vocab_size: int) -> RowGradient:
        """Fills in the values of rows, except `is_top1`, from sums; tells what their gradient is.

        Reads what `coefficients` hold already, the weights times the scale.
        """
        log_sums = sums.exp_sum.log()
        terms = TokenTerms(
            sums.target - log_sums,
            log_sums - sums.product_sum / sums.exp_sum,
            sums.top + log_sums,
            log_sums if sums.mean is None else sums.mean - log_sums,
        )
        losses, slopes = self._differentiate(terms)
        values.log_probs.copy_(terms.log_probs)
        values.token_entropy.copy_(terms.token_entropy)
        values.token_losses.copy_(losses)
        inverse = 1 / sums.exp_sum
        if not self.objective.needs_vocabulary:
            values.coefficients.mul_(-slopes.log_probs)
            # At the target p - 1, without the rounding of p.
            return RowGradient(inverse, torch.expm1(terms.log_probs))
        # The derivatives of the terms are given in `token_terms`.
        entropy, spread = terms.token_entropy, slopes.mean_log_prob / vocab_size
        pushed = slopes.log_normalizer - slopes.mean_log_prob
        log_p = terms.log_probs.clamp_min(torch.finfo(self.dtype).min)
        at_target = log_p.exp() * (pushed - slopes.token_entropy * (log_p + entropy))
        at_target += spread - slopes.log_probs * torch.expm1(log_p)
        has_entropy, is_smoothed = self.objective.entropy_coef, self.objective.label_smoothing
        return RowGradient(
            (pushed - slopes.log_probs) * inverse,
            at_target,
            -slopes.token_entropy * inverse if has_entropy else None,
            entropy - log_sums if has_entropy else None,
            spread if is_smoothed else None,
        )

    def _differentiate(self, terms: TokenTerms) -> tuple[Tensor, TokenTerms]:
        """The loss of each token, and its derivatives with respect to the terms."""
        if self.objective.is_nll:
            zero = torch.zeros_like(terms.log_probs)
            return -terms.log_probs, TokenTerms(zero - 1, zero, zero, zero)
        with torch.enable_grad():
            leaves = TokenTerms(*(term.detach().requires_grad_() for term in terms))
            losses = self.objective.token_losses(*leaves)
            slopes = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        return losses.detach(), TokenTerms(*slopes)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Room of the shape of `like` that is used again for every block."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(like):
            buffer = self._buffers[name] = like.new_empty(like.shape, dtype=self.dtype)
        return buffer[: len(like)]


def _row_maxima(z: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row and its first position, both `(n, 1)`."""
    size = z.shape[1]
    width = min(_TOP_BLOCK, size)
    num_whole = size // width
    maxima = z[:, : num_whole * width].unflatten(1, (num_whole, width)).amax(2)
    if num_whole * width < size:
        maxima = torch.cat([maxima, z[:, num_whole * width :].amax(1, keepdim=True)], dim=1)
    top, block = maxima.max(1, keepdim=True)
    first = block * width
    columns = (first + torch.arange(width, device=z.device)).clamp_max_(size - 1)
    return top, first + z.gather(1, columns).argmax(1, keepdim=True)
