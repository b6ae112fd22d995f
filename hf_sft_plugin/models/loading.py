"""Models and tokenizers from names, checked against each other before anything is trained."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_sft_plugin.masks.stop_tokens import find_stop_token
from hf_sft_plugin.models.model_interface import find_embeddings, find_text_config
from hf_sft_plugin.rows.arguments import require_tokenizer
from hf_sft_plugin.tokens.truncation import max_row_length

logger = logging.getLogger(__name__)

# Any of them in a config says that positions are rotations, which have no last one.
_ROTARY_SETTINGS = ("rope_parameters", "rope_scaling", "rope_theta")


def load_model(
    model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
    init_kwargs: Mapping[str, Any] | str | None,
    peft_config: PeftConfig | None = None,
) -> PreTrainedModel | PeftModel:
    """The model itself, or the one that a name or path stands for.

    Weights that will be trained are loaded in float32, unless the arguments say otherwise: in
    bfloat16 most updates would be rounded away. Under an adapter they keep the checkpoint's dtype.

    Args:
        model: A model, or what `from_pretrained` takes.
        init_kwargs: Further arguments of `from_pretrained`, also as JSON; only for a name.
        peft_config: The adapter that will be trained in place of the model; None: the model is.

    Raises:
        ValueError: If arguments were given for a model that is already there.
    """
    arguments = json.loads(init_kwargs) if isinstance(init_kwargs, str) else init_kwargs or {}
    if isinstance(model, str | os.PathLike):
        if peft_config is None and not arguments.keys() & {"dtype", "torch_dtype"}:
            arguments = {**arguments, "dtype": torch.float32}
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, **arguments)
        return loaded
    if arguments:
        raise ValueError(
            "model_init_kwargs was given together with a model that is already loaded, so it would "
            "have no effect. Pass the model's name, or load it with these arguments."
        )
    return model


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | PeftModel,
    stop_token: str | None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one saved with the model; able to pad and to stop.

    Args:
        processing_class: A tokenizer, or None for that of the model.
        model: Loaded, so that its config knows its name.
        stop_token: Becomes the eos token, so that it is saved with the tokenizer and inference
            stops there.
        chat_template: Replaces that of the tokenizer, and is saved with it; None leaves it.

    Raises:
        ValueError: If there is no tokenizer, if it knows more tokens than the model, or if it has
            nothing to end or pad a row with.
    """
    tokenizer = processing_class
    if tokenizer is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        if not name:
            raise ValueError(
                "There is no tokenizer: the model was not loaded from a name, so its tokenizer "
                "cannot be found. Pass one as processing_class."
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError(
                f"{name} holds a model but no tokenizer: what was found there knows nothing but "
                f"{', '.join(tokenizer.all_special_tokens)}. Pass one as processing_class."
            )
    require_tokenizer(tokenizer, "processing_class")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if stop_token is not None:
        find_stop_token(tokenizer, stop_token)
        tokenizer.eos_token = stop_token
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no eos token, so nothing would end a response. Set "
            "tokenizer.eos_token, or stop_token to one of its tokens."
        )
    if tokenizer.pad_token is None:
        # Masks go by position, so padding with the eos token hides no response.
        tokenizer.pad_token = tokenizer.eos_token
    weight = getattr(find_embeddings(model), "weight", None)
    num_embeddings = weight.shape[0] if isinstance(weight, Tensor) else 0
    # ZeRO-3 leaves empty shards in place of parameters, which say nothing of the vocabulary.
    if 0 < num_embeddings < len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens but the model embeds only "
            f"{num_embeddings:,}, so some ids would have no embedding. Call "
            "model.resize_token_embeddings(len(tokenizer)), or use the model's own tokenizer."
        )
    return tokenizer


def stop_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, stop_token: str | None
) -> frozenset[int]:
    """The tokens at which inference stops: the tokenizer's eos token and those of generation.

    With an explicit stop token it is the only one.
    """
    stops = {tokenizer.eos_token_id}
    generation_config = getattr(model, "generation_config", None)
    if stop_token is None and generation_config is not None:
        own = generation_config.eos_token_id
        stops |= set(own) if isinstance(own, list) else {own}
    # A config may name tokens of another tokenizer, which this one never makes.
    return frozenset(stop for stop in stops if stop is not None and stop < len(tokenizer))


def last_position(model: PreTrainedModel | PeftModel) -> int | None:
    """How many positions a model has, where there are none beyond them; else None."""
    config = find_text_config(model)
    has_last = all(getattr(config, name, None) is None for name in _ROTARY_SETTINGS)
    own: int | None = getattr(config, "max_position_embeddings", None)
    return own if has_last else None


def limit_length(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel, max_length: int | None
) -> int | None:
    """Longest row in tokens: as asked, else as long as the tokenizer and the model allow.

    Raises:
        ValueError: If more is asked than the model has positions.
    """
    own = getattr(find_text_config(model), "max_position_embeddings", None)
    limit = max_row_length(tokenizer, max_length)
    if max_length is not None and own is not None and max_length > own:
        problem = f"max_length is {max_length:,}, but the model was made for {own:,} positions"
        if last_position(model) is not None:
            raise ValueError(
                f"{problem} and has none beyond them. Set max_length to {own} or less, or choose a "
                "model with a longer context."
            )
        logger.warning("%s: it may do badly on rows that are longer.", problem)
    if max_length is not None or own is None:
        return limit
    return own if limit is None else min(own, limit)
