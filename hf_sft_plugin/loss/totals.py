"""Step 9 of the walk: sums and counts stay on the device and are reduced once per log."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_sft_plugin.loss.masked_loss import widest_float
from hf_sft_plugin.loss.token_stats import TokenStats


@dataclass
class Totals:
    """Sums and counts over any number of rows, from which every mean is made by one division.

    Attributes:
        loss: Sum of the weighted losses of trained tokens, in nats.
        divisor: What the loss is divided by: see `LossNormalization`.
        nll: Sum of the unweighted negative log-likelihoods of trained tokens, in nats.
        token_entropy: Sum of the entropies at trained positions, in nats.
        num_correct: Trained tokens that were the most probable token.
        num_response_tokens: Trained tokens.
        num_tokens: Tokens read, without padding.
        num_nonfinite_losses: Trained tokens whose loss is NaN or infinite, which are in no mean.
        aux_loss: Sum of the router's loss of each forward pass times the tokens that it read.
        num_routed_tokens: Tokens read in forward passes that had such a loss.
    """

    loss: float = 0.0
    divisor: float = 0.0
    nll: float = 0.0
    token_entropy: float = 0.0
    num_correct: float = 0.0
    num_response_tokens: float = 0.0
    num_tokens: float = 0.0
    num_nonfinite_losses: float = 0.0
    aux_loss: float = 0.0
    num_routed_tokens: float = 0.0

    def __add__(self, other: "Totals") -> "Totals":
        """Totals of both together."""
        return Totals(*(a + b for a, b in zip(self.to_list(), other.to_list(), strict=True)))

    def to_list(self) -> list[float]:
        """The values in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]

    def means(self, with_nll: bool = False) -> dict[str, float]:
        """Loss, entropy and accuracy; empty where no token was trained, NaN where none is finite.

        Args:
            with_nll: Adds the negative log-likelihood per token, where the loss is another one.
        """
        count = self.num_response_tokens - self.num_nonfinite_losses
        if self.num_response_tokens == 0 or (self.divisor == 0 and count > 0):
            return {}
        sums = {
            **({"nll": self.nll} if with_nll else {}),
            "token_entropy": self.token_entropy,
            "token_accuracy": self.num_correct,
        }
        return {
            "loss": self.loss / self.divisor if count else math.nan,
            **{name: value / count if count else math.nan for name, value in sums.items()},
        }

    def aux_loss_mean(self) -> dict[str, float]:
        """The router's loss of a mixture of experts, by tokens; empty where there was none."""
        count = self.num_routed_tokens
        return {"aux_loss": self.aux_loss / count} if count else {}

    def perplexity(self) -> float:
        """Perplexity of the trained tokens without weights: exp of their mean -log p."""
        mean = self.nll / self.num_response_tokens
        return math.exp(mean) if mean < 709 else math.inf

    def counts(self) -> dict[str, int]:
        """Tokens trained and read."""
        return {
            "num_response_tokens": round(self.num_response_tokens),
            "num_tokens": round(self.num_tokens),
        }


NUM_TOTALS = len(fields(Totals))


def row_totals(
    token_losses: Tensor,
    stats: TokenStats,
    positions: Tensor,
    weights: Tensor,
    divisors: Tensor,
    num_tokens: Tensor,
    leaves_out_nonfinite: bool = False,
    aux_loss: Tensor | None = None,
) -> Tensor:
    """Sums what is known about the positions of each row; nothing leaves the device.

    Args:
        token_losses: `(N,)`, the losses of the N trained positions, in row-major order.
        stats: Statistics of the N trained positions, in row-major order.
        positions: `(N,)`, the trained positions in the flattened batch.
        weights: `(B, S)`, as `token_weights` gave them.
        divisors: `(B,)`, likewise.
        num_tokens: `(B,)`, tokens of each row without padding.
        leaves_out_nonfinite: Whether tokens whose loss or statistics are not finite are counted
            and left out of the sums, and their share of the weights out of the divisor.
        aux_loss: The router's loss of the forward pass, a scalar; None where there is none.

    Returns:
        `(B, 10)`: a row for each row, a column for each field of `Totals`.
    """
    dtype = widest_float(weights.device)
    values = torch.stack([token_losses, *stats]).to(dtype)
    weight = weights.flatten().index_select(0, positions).to(dtype)
    left_out = torch.zeros_like(weight)
    if leaves_out_nonfinite:
        is_finite = values.isfinite().all(0)
        values, left_out = values.where(is_finite, 0), (~is_finite).to(dtype)
    losses, log_probs, entropy, hits = values
    ones = torch.ones_like(weight)
    columns = [losses * weight, -log_probs, entropy, hits, ones, left_out, weight]
    per_token = torch.stack([*columns, weight * left_out], dim=-1)
    rows = positions.div(weights.shape[1], rounding_mode="floor")
    sums = per_token.new_zeros(len(weights), len(columns) + 1).index_add_(0, rows, per_token)
    loss, nll, entropy, hits, counts, num_left_out, weight, lost = sums.unbind(-1)
    divisors = divisors.to(dtype) * (1 - lost / weight.where(weight > 0, 1))
    num_tokens = num_tokens.to(dtype)
    of_rows = [loss, divisors, nll, entropy, hits, counts, num_tokens, num_left_out]
    if aux_loss is None:
        of_rows += [torch.zeros_like(loss)] * 2
    else:
        of_rows += [num_tokens * aux_loss.detach().to(num_tokens), num_tokens]
    return torch.stack(of_rows, dim=-1)


class WindowedTotals:
    """Totals of the steps since the last log, on the device, and of the whole run, reduced."""

    def __init__(self) -> None:
        self.run = Totals()
        self._window: Tensor | None = None

    def add(self, totals: Tensor) -> None:
        """Adds a `(10,)` tensor to the window; no host is asked and no process waits."""
        if self._window is None:
            self._window = torch.zeros_like(totals)
        self._window += totals

    def peek(self, accelerator: Any) -> Totals:
        """The window's totals over all processes; one reduction."""
        return Totals(*accelerator.reduce(self._tensor(accelerator), reduction="sum").tolist())

    def windows(self, accelerator: Any) -> list[Totals]:
        """The window's totals of every process; one gather."""
        window = self._tensor(accelerator)
        rows = accelerator.gather(window) if accelerator.num_processes > 1 else window
        return [Totals(*row) for row in rows.view(-1, NUM_TOTALS).tolist()]

    def close(self, accelerator: Any) -> Totals:
        """Ends the window: returns its totals over all processes and adds them to the run's."""
        totals = self.peek(accelerator)
        self.run += totals
        self._window = None
        return totals

    def restore(self, run: Totals, windows: Sequence[Totals], accelerator: Any) -> None:
        """Takes up where a saved run stopped.

        Every process goes on with its own open window, so that sums are rounded as they were. Where
        there are more or fewer processes than then, one of them carries all for all.
        """
        self.run = run
        self._window = None
        if len(windows) == accelerator.num_processes:
            own = windows[accelerator.process_index]
        else:
            own = sum(windows, Totals()) if accelerator.is_main_process else Totals()
        self.add(self._tensor(accelerator, own))

    def _tensor(self, accelerator: Any, totals: Totals | None = None) -> Tensor:
        """The window, or what is to become of it, on the device."""
        if totals is None and self._window is not None:
            return self._window
        dtype = widest_float(accelerator.device)
        values = (totals or Totals()).to_list()
        return torch.tensor(values, dtype=dtype, device=accelerator.device)
