"""The router's loss of a mixture of experts: a mean over micro-batches, by their tokens.

A model works it out from the tokens of one forward pass, as a product of two means over them. That
of a whole optimizer step could not be had without running it twice, so it is the mean of those of
its micro-batches, in which each counts by its tokens.
"""

from typing import Any

from transformers import PreTrainedConfig

# Where the configs of mixture-of-experts models say how much the router's loss counts.
_AUX_LOSS_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def aux_loss_coefficient(config: Any) -> float:
    """How much the router loss of a mixture of experts counts.

    Args:
        config: Of the model.

    Raises:
        ValueError: If the config does not say it.
    """
    config = config.get_text_config()
    values = (getattr(config, name, None) for name in _AUX_LOSS_COEFFICIENTS)
    coefficient: float | None = next((value for value in values if value is not None), None)
    if coefficient is None:
        raise ValueError(
            f"{type(config).__name__} does not say how much the router's loss counts, in none "
            f"of {', '.join(_AUX_LOSS_COEFFICIENTS)}. Set output_router_logits to false."
        )
    return coefficient


def has_router_loss(model: Any) -> bool:
    """Whether a model is asked for the loss of its router."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return False
    return bool(getattr(config.get_text_config(), "output_router_logits", False))
