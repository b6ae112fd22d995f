"""What is summed over response tokens: the loss of one token, as a formula on its statistics."""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class LossType(StrEnum):
    """How much a token's negative log-likelihood counts, given the probability p of the target.

    Attributes:
        NLL: Always the same: -log p.
        DFT: p, as a constant: -p log p with the gradient of p * -log p at fixed p (Dynamic
            Fine-Tuning, arXiv 2508.05629). Tokens that the model finds unlikely count less.
        FOCAL: (1 - p)^gamma, with its own gradient (Lin et al., arXiv 1708.02002). Tokens that the
            model already finds likely count less.
    """

    NLL = "nll"
    DFT = "dft"
    FOCAL = "focal"


@dataclass(frozen=True)
class LossObjective:
    """The loss of one token; the default is its negative log-likelihood.

    With p the probability of the target, Z the sum of the exponentiated logits, H the entropy of
    the prediction and m the mean over the vocabulary of the log-probabilities:

        (1 - label_smoothing) * modulation(p) * -log p - label_smoothing * m
            + z_loss_coef * (log Z)^2 - entropy_coef * H

    Every term has its exact gradient; only the modulation of `DFT` is a constant by definition.

    Attributes:
        loss_type: The modulation; see `LossType`.
        focal_gamma: The exponent of `FOCAL`.
        label_smoothing: Share of the target that is spread over the vocabulary, 0 to 1.
        z_loss_coef: Weight of the squared log-normalizer, which keeps logits from drifting.
        entropy_coef: Weight of the entropy: above 0 a bonus for it, below 0 a penalty.

    Raises:
        ValueError: If a value is impossible.

    Examples:
        >>> LossObjective().is_nll, LossObjective(z_loss_coef=1e-4).is_nll
        (True, False)
    """

    loss_type: LossType | str = LossType.NLL
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    z_loss_coef: float = 0.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.loss_type not in list(LossType):
            raise ValueError(
                f"loss_type is {self.loss_type!r}; choose one of {', '.join(LossType)}."
            )
        if not 0 < self.focal_gamma < math.inf:
            raise ValueError(
                f"focal_gamma is {self.focal_gamma}, but the exponent is above 0 and finite. With "
                "0 it would be the plain loss: set loss_type to 'nll'."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; a share is at least 0, and below 1 so "
                "that the target counts."
            )
        if not 0 <= self.z_loss_coef < math.inf:
            raise ValueError(
                f"z_loss_coef is {self.z_loss_coef}; below 0 it would reward large normalizers. "
                "Give 0 or a small positive number, such as 1e-4."
            )
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef is {self.entropy_coef}; give a finite number.")

    @property
    def is_nll(self) -> bool:
        """Whether it is the plain negative log-likelihood."""
        return self.loss_type == LossType.NLL and not self.needs_vocabulary

    @property
    def needs_vocabulary(self) -> bool:
        """Whether it depends on more of a prediction than the probability of the target."""
        return bool(self.label_smoothing or self.z_loss_coef or self.entropy_coef)

    def token_losses(
        self,
        log_probs: Tensor,
        token_entropy: Tensor | None = None,
        log_normalizer: Tensor | None = None,
        mean_log_prob: Tensor | None = None,
    ) -> Tensor:
        """The loss of each token, differentiable in all that it is given.

        Args:
            log_probs: `(N,)`, log p of the targets.
            token_entropy: `(N,)`, H; needed with an `entropy_coef`.
            log_normalizer: `(N,)`, log Z; needed with a `z_loss_coef`.
            mean_log_prob: `(N,)`, m; needed with `label_smoothing`.

        Returns:
            `(N,)`.
        """
        losses = -log_probs
        if self.loss_type == LossType.DFT:
            # A probability of 0 meets an infinite loss: their product is 0 in the limit.
            losses = log_probs.detach().exp() * losses.clamp_max(torch.finfo(losses.dtype).max)
        elif self.loss_type == LossType.FOCAL:
            # Where p rounds to 1, a gamma below 1 would divide by zero.
            missing = torch.expm1(log_probs).neg().clamp_min(torch.finfo(losses.dtype).tiny)
            losses = missing**self.focal_gamma * losses
        if self.label_smoothing:
            assert mean_log_prob is not None, "label smoothing needs the mean log-probability"
            losses = (1 - self.label_smoothing) * losses - self.label_smoothing * mean_log_prob
        if self.z_loss_coef:
            assert log_normalizer is not None, "the z-loss needs the log-normalizer"
            losses = losses + self.z_loss_coef * log_normalizer**2
        if self.entropy_coef:
            assert token_entropy is not None, "the entropy term needs the entropy"
            losses = losses - self.entropy_coef * token_entropy
        return losses
