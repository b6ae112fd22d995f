"""The proof that rows of a model can go without padding: a few documents of a handful of tokens.

They are run in a padded batch as ever, and end to end. The logits have to be the same; nothing of
one document may reach another; and every mask that the model asks for has to be causal, in a window
of the size that its layer asks for, at the lengths that training will meet as well.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from hf_sft_plugin.training.attention import IMPLEMENTATION, document_attention
from hf_sft_plugin.training.response_batch import find_layout
from hf_sft_plugin.training.shared_prompts import find_shared_prompts

# What a model may raise that is run in a way it was not made for.
MODEL_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_PROBE = "document_attention_probe"
_OURS = (IMPLEMENTATION, _PROBE)
# Tensors that layers may hand on: what `document_attention` takes, or need not know.
_KNOWN_TENSORS = frozenset(
    ("cu_seq_lens_q", "cu_seq_lens_k", "key_index", "position_ids", "s_aux", "position_bias")
)
# Documents of the probe; the one in the middle is disturbed, and the others must not notice.
_LENGTHS = (6, 4, 9)
_DISTURBED = slice(6, 10)
# Largest relative difference between the logits of a token with and without padding.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_OF_HALVES = 5e-2
# Positions up to which masks are looked at, where a model names no limit of its own.
_NUM_POSITIONS = 2**17
_MAX_POSITIONS = 2**20


class AttentionSwitch:
    """Runs a model with another attention implementation, and gives back its own.

    Args:
        model: The model, unwrapped from Accelerate.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = [getattr(module, "config", None) for module in model.modules()]
        found = {id(c): c for c in configs if isinstance(c, PreTrainedConfig)}
        self._configs = list(found.values())
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
            if config._attn_implementation in _OURS:
                config._attn_implementation_internal = own

    def _set(self, name: str) -> None:
        for index, config in enumerate(self._configs):
            # It may have been changed in between.
            if config._attn_implementation not in _OURS:
                self._own[index] = config._attn_implementation
            # Not by the property, which would set the configs inside this one as well.
            config._attn_implementation_internal = name


class _UnsupportedError(Exception):
    """A model attends in a way that allows no proof."""


class _Witness:
    """Stands between a model and `document_attention`, and keeps what is asked for."""

    def __init__(self) -> None:
        self.dtype = torch.float64
        self._masks: list[tuple[Tensor, Callable[..., Tensor]]] = []
        self._calls: list[tuple[Tensor | None, int | None]] = []
        AttentionInterface.register(_PROBE, self._attend)
        AttentionMaskInterface.register(_PROBE, self._make_mask)

    def _make_mask(self, **arguments: Any) -> Tensor:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = sdpa_mask(**{**arguments, **skips})
        assert mask is not None, "it is only left out where that is allowed"
        self._masks.append((mask, arguments["mask_function"]))
        return mask

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if options.get("document_lengths") is None:
            raise _UnsupportedError("its layers do not hand on what the model is told")
        # Such as the blocks that a query sees, of which short rows have too few to leave any out.
        tensors = {name for name, value in options.items() if isinstance(value, Tensor)}
        if unknown := tensors - _KNOWN_TENSORS:
            raise _UnsupportedError(f"its layers attend by {', '.join(sorted(unknown))} as well")
        self._calls.append((attention_mask, options.get("sliding_window")))
        self.dtype = min(self.dtype, value.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        return document_attention(module, query, key, value, attention_mask, **options)

    def problem(self, num_positions: int) -> str | None:
        """What `document_attention` would do otherwise than the model's masks say, if anything."""
        if not self._calls:
            return "its layers do not attend through the interface of transformers"
        for mask, window in self._calls:
            predicate = next((p for known, p in self._masks if known is mask), None)
            if mask is None or predicate is None:
                return "its layers do not use the masks of transformers as they are"
            if not _is_causal(predicate, window, num_positions, mask.device):
                size = "without a window" if window is None else f"in a window of {window} tokens"
                return f"it has a layer whose mask is not the causal one {size}"
        return None


def _is_causal(
    predicate: Callable[..., Tensor], window: int | None, num_positions: int, device: torch.device
) -> bool:
    # A window is as wide in each row; chunks and prefixes are not.
    rows = torch.tensor([0, num_positions // 2, num_positions - 1], device=device).unsqueeze(-1)
    columns = torch.arange(num_positions, device=device)
    expected = columns <= rows
    if window is not None:
        expected &= columns > rows - window
    zero = torch.zeros((), dtype=torch.long, device=device)
    return bool((predicate(zero, zero, rows, columns) == expected).all())


def find_problem(
    wrapped: nn.Module,
    model: nn.Module,
    switch: AttentionSwitch | None,
    shares_prompts: bool = False,
) -> str | None:
    """Why rows of a model have to be padded, or cannot share prompts; None where they need not.

    Args:
        wrapped: The model as Accelerate prepared it.
        model: The same model, unwrapped from Accelerate.
        switch: Where `document_attention` would be used; None where the model's own attention.
        shares_prompts: Asks about prompts that are shared, where rows need no padding.
    """
    was_training = wrapped.training
    wrapped.eval()
    try:
        # Compiling would take longer than the probe, for shapes that do not come again.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if shares_prompts:
                return _run_probe_of_sharing(wrapped, model, switch)
            return _run_probe(wrapped, model, switch)
    except _UnsupportedError as error:
        return str(error)
    except MODEL_ERRORS as error:
        return f"a run without padding failed ({type(error).__name__}: {error})"
    finally:
        wrapped.train(was_training)


def _run_probe(wrapped: nn.Module, model: nn.Module, switch: AttentionSwitch | None) -> str | None:
    unwrapped = cast(Any, model)
    config = unwrapped.config.get_text_config()
    rows = probe_rows(config.vocab_size, unwrapped.device)

    def logits(batch: Mapping[str, Any], implementation: str | None = None) -> Tensor:
        set_or_not = switch.set_to(implementation) if switch and implementation else nullcontext()
        with set_or_not:
            return wrapped(**batch, use_cache=False).logits

    tolerance = None
    if switch is not None:
        # A single document: its masks can be asked about positions that it does not have.
        witness = _Witness()
        logits(end_to_end(rows[-1:]), _PROBE)
        limit = getattr(config, "max_position_embeddings", None) or _NUM_POSITIONS
        problem = witness.problem(min(limit, _MAX_POSITIONS))
        if problem is not None:
            return problem
        tolerance = _TOLERANCES.get(witness.dtype)
    flat = logits(end_to_end(rows), IMPLEMENTATION)[0]
    if flat.isnan().any():
        return "its logits are NaN from the start, so that leaks would go unseen"
    with _disturbance(unwrapped.get_input_embeddings(), _DISTURBED):
        disturbed = logits(end_to_end(rows), IMPLEMENTATION)[0]
    others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    others[_DISTURBED] = False
    if disturbed[~others].isfinite().any():
        return "its embeddings cannot be disturbed, so that leaks would go unseen"
    # Whatever is computed from NaN is NaN, however little it counts. Only kernels that multiply
    # what they mask by 0 are judged by the tokens: not a bit may change with those of another.
    is_apart = bool(disturbed[others].isfinite().all())
    if switch is None:
        changed = logits(end_to_end([rows[0], rows[1].flip(0), rows[2]]))[0]
        is_apart = is_apart or torch.equal(changed[others], flat[others])
    if not is_apart:
        return "tokens of one row reach another, as in recurrent or convolutional layers"
    padded_rows = logits(_padded(rows))
    padded = torch.cat([row[: len(ids)] for row, ids in zip(padded_rows, rows, strict=True)])
    error, noise = largest_error(flat, padded), 0.0
    if tolerance is None:
        # In half precision padding itself changes results, as where experts are chosen.
        alone = torch.cat([logits({"input_ids": ids.unsqueeze(0)})[0] for ids in rows])
        error, noise = largest_error(flat, alone), largest_error(padded, alone)
    bound = (tolerance or _TOLERANCE_OF_HALVES) + 2 * noise
    if not error <= bound:
        return f"without padding its logits differ by {error:.1e}, and {bound:.1e} is rounding"
    return None


def _run_probe_of_sharing(
    wrapped: nn.Module, model: nn.Module, switch: AttentionSwitch | None
) -> str | None:
    """The same with two rows that begin alike, and end in more tokens than that and in fewer."""
    assert switch is not None, "nothing else attends to documents that go on from others"
    unwrapped = cast(Any, model)
    prompt, one, other = probe_rows(unwrapped.config.get_text_config().vocab_size, unwrapped.device)
    rows = [torch.cat([prompt, ending]) for ending in (one, other)]
    shared = find_shared_prompts([row.cpu().numpy().astype(np.int64) for row in rows], at_least=1)
    assert shared is not None, "they begin alike"
    shared = shared.with_tensors(lambda tensor: tensor.to(prompt.device))
    ids = torch.cat(rows)[shared.index].unsqueeze(0)
    witness = _Witness()
    with switch.set_to(_PROBE):
        wrapped(**end_to_end(rows[:1]), use_cache=False)
    dtype = witness.dtype
    alone = [wrapped(input_ids=row.unsqueeze(0), use_cache=False) for row in rows]
    if any(getattr(output, "aux_loss", None) is not None for output in alone):
        return "the loss of its router counts every token that runs"
    expected = torch.cat([output.logits[0] for output in alone])
    padded_rows = wrapped(**_padded(rows), use_cache=False).logits
    padded = torch.cat([row[: len(ids)] for row, ids in zip(padded_rows, rows, strict=True)])
    inputs = {"input_ids": ids, "use_cache": False, **shared.model_inputs()}
    last = slice(ids.shape[1] - shared.document_lengths[-1], ids.shape[1])
    with switch.set_to(IMPLEMENTATION):
        flat = wrapped(**inputs).logits[0]
        with _disturbance(unwrapped.get_input_embeddings(), last):
            disturbed = wrapped(**inputs).logits[0]
    if disturbed[last].isfinite().any() or not disturbed[: last.start].isfinite().all():
        return "tokens of one response reach another"
    error = largest_error(flat[shared.places], expected)
    bound = tolerance_of(dtype) + 2 * largest_error(padded, expected)
    if not error <= bound:
        return f"its logits then differ by {error:.1e}, and {bound:.1e} is rounding"
    return None


def probe_rows(vocab_size: int, device: torch.device) -> list[Tensor]:
    """The documents of the probe."""
    ids = (torch.arange(sum(_LENGTHS), device=device) * 7 + 3) % vocab_size
    return list(ids.split(list(_LENGTHS)))


def _padded(rows: list[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def end_to_end(rows: list[Tensor]) -> dict[str, Any]:
    """What a model reads of documents without padding."""
    batch = _padded(rows)
    layout = find_layout(batch)
    assert layout is not None, "rows padded on the right have one"
    layout = layout.to(batch["input_ids"].device)
    return {"input_ids": layout.flatten(batch["input_ids"]), **layout.model_inputs()}


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference that rounding explains, for values of this dtype."""
    return _TOLERANCES.get(dtype, _TOLERANCE_OF_HALVES)


def largest_error(logits: Tensor, reference: Tensor) -> float:
    """The largest relative difference between the logits of a token, `(N, V)`."""
    # A head that begins with zeros gives no size to compare with.
    sizes = reference.norm(dim=-1).clamp(min=torch.finfo(reference.dtype).tiny)
    errors = (logits - reference).norm(dim=-1) / sizes
    return errors.max().item()


@contextmanager
def _disturbance(embeddings: nn.Module, where: slice) -> Iterator[None]:
    """Makes NaN of what is read at some positions, for a while."""

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, where] = torch.nan
        return output

    hook = embeddings.register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()
