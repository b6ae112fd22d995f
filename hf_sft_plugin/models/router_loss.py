"""The router's loss of a mixture of experts: a mean over micro-batches, by their tokens.

A model works it out from the tokens of one forward pass, as a product of two means over them. That
of a whole optimizer step could not be had without running it twice, so it is the mean of those of
its micro-batches, in which each counts by its tokens.
"""

from typing import Any

from hf_sft_plugin.models.model_interface import find_text_config

# Where the configs of mixture-of-experts models say how much the router's loss counts.
_AUX_LOSS_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def aux_loss_coefficient(model: Any) -> float:
    """How much the router loss of a mixture of experts counts.

    Args:
        model: Unwrapped from Accelerate.

    Raises:
        ValueError: If its config does not say it.
    """
    config = find_text_config(model)
    values = (getattr(config, name, None) for name in _AUX_LOSS_COEFFICIENTS)
    coefficient: float | None = next((value for value in values if value is not None), None)
    if coefficient is None:
        raise ValueError(
            f"{type(model).__name__} gives a router's loss, but its config does not say how much "
            f"it counts, in none of {', '.join(_AUX_LOSS_COEFFICIENTS)}. Set one of them, or "
            "output_router_logits to false."
        )
    return coefficient


def has_router_loss(model: Any) -> bool:
    """Whether a model is asked for the loss of its router."""
    return bool(getattr(find_text_config(model), "output_router_logits", False))
