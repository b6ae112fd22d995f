"""How a model is asked and where its answers are, whether it is one of transformers or not.

A `Trainer` takes any `nn.Module`, so the names that models of transformers have are looked for here
and nowhere else.

The router's loss of a mixture of experts is worked out by the model for each forward pass, as a
product of two means over its tokens. That of a whole optimizer step would need a second run, so it
is the mean of those of its micro-batches, in which each counts by its tokens.

`torch_compile` compiles the body of a model once, for batches of all sizes. The LM head and the
attention of each document are left out of it; see `FusedHead` and `document_attention`.
"""

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, extract_model_from_parallel, is_compiled_module
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Where the configs of mixture-of-experts models say how much the router's loss counts.
_AUX_LOSS_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What the forward pass of a model gives, without a cache of keys and values.

    Args:
        model: As Accelerate prepared it.
        inputs: What its forward takes, by name.

    Raises:
        ValueError: If its forward does not take just these.
    """
    own: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    own = own.get_base_model() if isinstance(own, PeftModel) else own
    signature = inspect.signature(own.forward)
    takes_all = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    options = {"use_cache": False} if takes_all or "use_cache" in signature.parameters else {}
    try:
        signature.bind(**inputs, **options)
    except TypeError as error:
        raise ValueError(
            f"The forward of {type(own).__name__} is called by name with {', '.join(inputs)}, as "
            f"the batch has them, and never with labels; but here it is {error}. Give forward "
            "arguments of these names (it may ignore some), or let the collator leave them out."
        ) from error
    return model(**inputs, **options)


def find_logits(outputs: Any, ids: object = None) -> Tensor:
    """The logits in what a forward pass gave, `(B, S, V)`.

    Args:
        outputs: Has `logits` as an attribute or under that key, begins with them, or is them.
        ids: The tokens that were read, `(B, S)`; None does not look whether there are as many.

    Raises:
        ValueError: If there are none, or not for all of these tokens.
    """
    found = getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif found is None:
        found = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    if not isinstance(found, Tensor) or found.ndim != 3:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "no such"
        raise ValueError(
            f"The forward of the model returned a {type(outputs).__name__} in which the logits "
            f"should be a tensor of shape (rows, tokens, vocabulary); there is {what}. Return the "
            "logits, a tuple that begins with them, or something with `logits` in it."
        )
    # An adapter may put virtual tokens before each row.
    if isinstance(ids, Tensor) and (len(found) != len(ids) or found.shape[1] < ids.shape[1]):
        raise ValueError(
            f"The model read {' x '.join(map(str, ids.shape))} tokens, but gave logits of shape "
            f"{tuple(found.shape)}, so some tokens have no prediction. Return the logits of all "
            "positions also when there are no labels."
        )
    return found


def find_aux_loss(outputs: Any) -> Tensor | None:
    """The router's loss of a mixture of experts in what a forward pass gave, if there is one."""
    found = getattr(outputs, "aux_loss", None)
    if found is None and isinstance(outputs, Mapping):
        found = outputs.get("aux_loss")
    return found if isinstance(found, Tensor) else None


def find_lm_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, where a model says which it is."""
    head = _call(model, "get_output_embeddings")
    return head if isinstance(head, nn.Module) else None


def find_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds tokens, where a model says which it is."""
    embeddings = _call(model, "get_input_embeddings")
    return embeddings if isinstance(embeddings, nn.Module) else None


def find_text_config(model: Any) -> Any:
    """The config of a model of transformers, of its language model, or None."""
    config = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else None


def _call(model: Any, name: str) -> Any:
    method = getattr(model, name, None)
    return method() if callable(method) else None


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Has random numbers go on afterwards as if none had been drawn."""
    states = random.getstate(), np.random.get_state()
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


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


def compile_for_all_sizes(accelerator: Accelerator) -> None:
    """Has a model compiled for batches of any size from the first one on.

    Rows that are not padded make a batch of another size at every step. By itself `torch.compile`
    compiles for the size of the first, and for any size when the second comes. What the user has
    chosen (`ACCELERATE_DYNAMO_USE_DYNAMIC`) stays.

    Args:
        accelerator: Compiles the model when it prepares it, where it was asked to.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO and plugin.dynamic is None:
        plugin.dynamic = True


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has been applied to a model or to any part of it."""
    # Both ways: a wrapper around a module, and a call of its own on the module.
    return any(
        is_compiled_module(module) or module._compiled_call_impl is not None
        for module in model.modules()
    )
