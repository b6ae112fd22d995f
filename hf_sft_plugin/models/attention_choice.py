"""Whether rows can be trained without padding: chosen by a proof on the model itself.

A list of models would be out of date tomorrow.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_sft_plugin.models.adapters import adapter_state, find_row_dependence
from hf_sft_plugin.models.attention import IMPLEMENTATION, AttentionSwitch
from hf_sft_plugin.models.attention_probe import find_problem

logger = logging.getLogger(__name__)


class AttentionChoice(NamedTuple):
    """How a model attends.

    Attributes:
        is_padding_free: Whether rows are laid end to end.
        summary: One line for the user.
        switch: Where `document_attention` takes the place of the model's own attention.
        shares_prompts: Whether what rows begin with in common may run once.
    """

    is_padding_free: bool
    summary: str
    switch: AttentionSwitch | None
    shares_prompts: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """The attention that this choice is about, for a forward pass."""
        if self.switch is None:
            yield
            return
        with self.switch.set_to(IMPLEMENTATION):
            yield

    def keep_in_backward(self, *losses: Tensor | None) -> None:
        """The same while gradients of these losses are worked out.

        Gradient checkpointing runs layers again then, and they look at the config again.
        """
        switch = self.switch
        for loss in losses:
            if switch is not None and loss is not None and loss.requires_grad:
                loss.register_hook(lambda _: switch.set_until_gradients_are_there())


class AttentionChooser:
    """Chooses once for each model, and says once where rows have to be padded.

    Attributes:
        choice: The last choice; None before the first.
    """

    def __init__(self) -> None:
        self.choice: AttentionChoice | None = None
        self._asked: tuple[Any, ...] | None = None

    def choose(
        self, wrapped: nn.Module, model: nn.Module, padding_free: str, share_prompts: bool = True
    ) -> AttentionChoice:
        """Chooses how a model attends.

        Args:
            wrapped: The model as Accelerate prepared it.
            model: The same model, unwrapped from Accelerate.
            padding_free: `auto`, `on` or `off`; see `MaskedSFTConfig`.
            share_prompts: See `choose_attention`.

        Raises:
            ValueError: If it is `on`, and rows have to be padded.
        """
        asked = model, adapter_state(model), padding_free, share_prompts
        if self.choice is not None and self._asked == asked:
            return self.choice
        if padding_free == "off":
            choice = AttentionChoice(False, "padded, because padding_free is 'off'", None)
        else:
            choice = choose_attention(wrapped, model, share_prompts)
            if not choice.is_padding_free and padding_free == "on":
                raise ValueError(
                    f"padding_free is 'on', but rows have to be {choice.summary}. Set it to 'auto' "
                    "to allow that."
                )
            if not choice.is_padding_free:
                logger.warning("Rows are %s.", choice.summary)
        self.choice, self._asked = choice, asked
        return choice

    def give_back(self) -> None:
        """Leaves the model with the attention that it came with, whatever was broken off."""
        if self.choice is not None and self.choice.switch is not None:
            self.choice.switch.give_back()


def choose_attention(
    wrapped: nn.Module, model: nn.Module, share_prompts: bool = True
) -> AttentionChoice:
    """Chooses how a model attends, and says why; costs a few forward passes of 20 tokens or less.

    Args:
        wrapped: The model as Accelerate prepared it.
        model: The same model, unwrapped from Accelerate.
        share_prompts: Whether what rows begin with in common shall run once, where it may.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return AttentionChoice(False, "padded, because it is not a model of transformers", None)
    config = config.get_text_config()
    own = config._attn_implementation
    is_on_gpu = next(model.parameters()).is_cuda
    # Flex attention has no backward pass on a CPU.
    is_replaced = own in ("sdpa", "eager") or (own == "flex_attention" and not is_on_gpu)
    switch = AttentionSwitch(model) if is_replaced else None
    if config.output_attentions:
        problem: str | None = "the config asks for attention weights"
    elif switch is None and not ("flash" in str(own) or own == "flex_attention"):
        problem = f"nothing is known about the attention implementation {own!r}"
    else:
        problem = find_row_dependence(model) or find_problem(wrapped, model, switch)
    if problem is not None:
        return AttentionChoice(False, f"padded, because {problem}", None)
    if switch is None:
        return AttentionChoice(True, f"{own}, no padding", None)
    kernel = "per-document SDPA"
    if is_on_gpu:
        kernel = f"varlen_attn in half precision, else {kernel}"
    if not share_prompts:
        return AttentionChoice(True, f"{kernel}, no padding", switch)
    problem = find_problem(wrapped, model, switch, shares_prompts=True)
    if problem is not None:
        summary = f"{kernel}, no padding, prompts once per row, because {problem}"
        return AttentionChoice(True, summary, switch)
    return AttentionChoice(True, f"{kernel}, no padding, shared prompts once", switch, True)
