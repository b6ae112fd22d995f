"""Attention over documents that stand one after another, and the switch to it.

Registered with transformers under a name of its own, without a mask function of that name, so that
models build no mask. The lengths of the documents come with the forward pass, as a list: on a GPU a
tensor would have to be read, and each layer would wait for it.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

IMPLEMENTATION = "document_attention"
# Queries of a sliding window at a time, at least: shorter blocks are all overhead.
_MIN_BLOCK = 256


@torch.compiler.disable
def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    document_contexts: Sequence[Sequence[int]] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself, and to those that it goes on from.

    Args:
        module: The layer that asks.
        query: `(1, H, T, d)`, the heads of all T tokens.
        key: `(1, K, T, d)`; H is a multiple of K.
        value: `(1, K, T, e)`.
        attention_mask: Left aside: the lengths say which tokens see each other.
        dropout: Share of attention weights that are set to 0.
        scaling: What scores are multiplied with; None is one over the square root of d.
        sliding_window: Tokens that a token sees, itself included; None is all before it.
        softcap: Scores are bounded by this, smoothly.
        s_aux: `(H,)`, scores of the attention sinks.
        position_bias: Must be None: scores that depend on positions are not provided for.
        document_lengths: Lengths of the documents, in order; their sum is T.
        cu_seq_lens_q: The same as running totals from 0, int32, on the device of the query.
        document_contexts: For each document those that it goes on from; None where none does.
        others: Of `SharedPrompts.model_inputs`, where documents go on from others.

    Returns:
        `(1, T, H, e)`, and None in place of the attention weights.

    Raises:
        ValueError: If it is asked for what it cannot do exactly.
    """
    lengths = _read_lengths(module, query, key, document_lengths, position_bias)
    assert cu_seq_lens_q is not None, "it comes together with the lengths"
    dtype = value.dtype
    query, key, value = _in_one_dtype(query, key, value)
    longest = max(lengths), others.get("max_length_k") or max(lengths)
    window = sliding_window if sliding_window and sliding_window < longest[1] else None
    is_plain = softcap is None and s_aux is None
    if is_plain and _takes_varlen(query, value, dropout):
        boundaries = cu_seq_lens_q, others.get("cu_seq_lens_k", cu_seq_lens_q)
        seen = others.get("key_index"), boundaries, longest
        return _attend_varlen(query, key, value, *seen, scaling, window), None
    plainly = partial(_attend_plainly, softcap=softcap, sinks=s_aux)
    attend = partial(_attend_fused if is_plain else plainly, scaling=scaling, dropout=dropout)
    documents = lengths, [*(document_contexts or [[]] * len(lengths))]
    output = _attend_per_document(query, key, value, *documents, window, attend)
    return output.to(dtype), None


AttentionInterface.register(IMPLEMENTATION, document_attention)


def _read_lengths(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    document_lengths: Sequence[int] | None,
    position_bias: Tensor | None,
) -> list[int]:
    """Raises where the documents cannot be told apart, or scores are not only those of tokens.

    Returns:
        The lengths of the documents.
    """
    name, num_tokens = type(module).__name__, query.shape[2]
    if document_lengths is None:
        raise ValueError(
            f"{name} was run without the lengths of its documents, while training without padding. "
            "Set padding_free to 'off' where a model is run in other ways within the same backward "
            "pass."
        )
    lengths = [*document_lengths]
    if sum(lengths) != num_tokens or key.shape[2] != num_tokens or len(query) != 1:
        raise ValueError(
            f"{name} attends from {len(query)} x {num_tokens} to {key.shape[2]} tokens, but the "
            f"documents have {sum(lengths)} together."
        )
    if position_bias is not None:
        raise ValueError(f"{name} adds a bias of positions to its scores.")
    return lengths


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """The dtype of autocast, which casts rotated heads one by one; on a CPU at least float32.

    There the backward pass in bfloat16 takes two to three times as long as that in float32.
    """
    device = tensors[0].device.type
    dtype = tensors[0].dtype
    if device == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    elif torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in tensors]


def _takes_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's kernel for documents of varying length can be used."""
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0
        and head_size == value.shape[-1]
        and head_size % 8 == 0
        and head_size <= 256
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_index: Tensor | None,
    boundaries: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    if key_index is not None:
        key, value = (tensor.index_select(2, key_index) for tensor in (key, value))
    # Where there are more keys than queries, the queries belong to the last of them.
    # Loaded here, so that nobody waits for it who has no GPU.
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    output = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        *boundaries,
        *longest,
        scale=scaling,
        # The token itself is not counted.
        window_size=(-1 if window is None else window - 1, 0),
        **_group_options(attend),
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


@cache
def _group_options(attend: Callable[..., Any]) -> dict[str, bool]:
    """What the kernel has to be told where there are fewer heads of keys than of queries."""
    # Torch 2.11 finds it out by itself. Looked up once: every layer asks.
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}


def _attend_per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    contexts: Sequence[Sequence[int]],
    window: int | None,
    attend: Callable[..., Tensor],
) -> Tensor:
    # One split and one concatenation: the gradient of a slice would be as long as all documents.
    # Along the tokens first: their gradients are then in the order in which the layer made them.
    queries, keys, values = (
        [part.transpose(1, 2) for part in tensor.transpose(1, 2).split(list(lengths), dim=1)]
        for tensor in map(_in_order_of_heads, (query, key, value))
    )
    outputs = []
    # Autocast would undo the choice of `_in_one_dtype`.
    with torch.autocast(query.device.type, enabled=False):
        for own, context in enumerate(contexts):
            seen = [*context, own]
            k, v = (
                torch.cat([parts[number] for number in seen], dim=2) if context else parts[own]
                for parts in (keys, values)
            )
            blocks = _attend_in_blocks(queries[own], k, v, window, attend)
            outputs += [block.transpose(1, 2) for block in blocks]
    return torch.cat(outputs, dim=1)


def _in_order_of_heads(tensor: Tensor) -> Tensor:
    """The rows of a head one after another, where a cache would otherwise hold few of them.

    Layers leave the heads of a token side by side. From one token to the next it is then often a
    power of two of bytes, and all rows of a head compete for the same few places of the cache.
    """
    return tensor.contiguous() if tensor.device.type == "cpu" else tensor


def _attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, attend: Callable[..., Tensor]
) -> list[Tensor]:
    """One document; in a sliding window, blocks of queries with the keys that they reach.

    Queries belong to the last of the keys; before them are those of the document's context.
    """
    length, num_keys = query.shape[2], key.shape[2]
    num_before = num_keys - length
    size = length
    if window is None or num_keys <= window:
        if num_before == 0:
            return [attend(query, key, value, allowed=None)]
        if num_before <= length:
            # A triangle is cheaper than a masked rectangle, even with queries that nobody asked.
            query = F.pad(query, (0, 0, num_before, 0))
            return [attend(query, key, value, allowed=None)[:, :, num_before:]]
        window = num_keys
    else:
        size = max(window, _MIN_BLOCK)
    outputs = []
    for start in range(num_before, num_keys, size):
        end, first = min(start + size, num_keys), max(0, start - window + 1)
        rows = torch.arange(start, end, device=query.device).unsqueeze(-1)
        columns = torch.arange(first, end, device=query.device)
        allowed = (columns <= rows) & (columns > rows - window)
        asked, seen = slice(start - num_before, end - num_before), slice(first, end)
        part = query[:, :, asked], key[:, :, seen], value[:, :, seen]
        outputs.append(attend(*part, allowed=allowed))
    return outputs


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=allowed is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Step by step, for scores that the fused kernels of torch cannot make."""
    num_groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        # A place to look at, beside the tokens, where there is nothing to see.
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=dtype)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, dropout) @ value


class AttentionSwitch:
    """Runs a model with another attention implementation, and gives back its own.

    Args:
        model: The model, unwrapped from Accelerate.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = [getattr(module, "config", None) for module in model.modules()]
        found = {id(c): c for c in configs if isinstance(c, PreTrainedConfig)}
        self._configs = list(found.values())
        self._names = {IMPLEMENTATION}
        self._own = [config._attn_implementation for config in self._configs]

    @contextmanager
    def set_to(self, name: str) -> Iterator[None]:
        """Sets the implementation for a while."""
        self._set(name)
        try:
            yield
        finally:
            self.give_back()

    def set_until_gradients_are_there(self) -> None:
        """Sets `document_attention` up to the end of the backward pass that is going on."""
        self._set(IMPLEMENTATION)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self.give_back)

    def give_back(self) -> None:
        """Sets what the model came with."""
        for config, own in zip(self._configs, self._own, strict=True):
            if config._attn_implementation in self._names:
                config._attn_implementation_internal = own

    def _set(self, name: str) -> None:
        self._names.add(name)
        for index, config in enumerate(self._configs):
            # It may have been changed in between.
            if config._attn_implementation not in self._names:
                self._own[index] = config._attn_implementation
            # Not by the property, which would set the configs inside this one as well.
            config._attn_implementation_internal = name
