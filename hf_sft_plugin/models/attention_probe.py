"""The proof that rows of a model can go without padding: a few documents of a handful of tokens.

They run in a padded batch and end to end.

- Nothing of one document may reach another: NaN in one may not show up in any other.
- Every mask that the model asks for has to be causal, in a window of the size that its layer asks
  for, at the lengths that training will meet as well.
- In float64 both ways have to give the same logits. There rounding is far smaller than any real
  difference, whatever the precision that the model trains in.
- In the precision of training, rows end to end may be no further from the float64 logits than
  padded rows are.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_sft_plugin.batches.host_facts import find_layout
from hf_sft_plugin.batches.shared_prompts import find_shared_prompts
from hf_sft_plugin.models.attention import IMPLEMENTATION, AttentionSwitch, document_attention
from hf_sft_plugin.models.float64_run import (
    MODEL_ERRORS,
    TOLERANCE,
    in_float64,
    largest_error,
    typical_error,
)
from hf_sft_plugin.models.model_interface import same_random_numbers

logger = logging.getLogger(__name__)

_PROBE = "document_attention_probe"
# Tensors that layers may hand on: what `document_attention` takes, or need not know.
_KNOWN_TENSORS = frozenset(
    ("cu_seq_lens_q", "cu_seq_lens_k", "key_index", "position_ids", "s_aux", "position_bias")
)
# Documents of the probe; the one in the middle is disturbed, and the others must not notice.
_LENGTHS = (6, 4, 9)
_DISTURBED = slice(6, 10)
# How much further from the truth than padded rows a few tokens may be by chance.
_CHANCE = 4.0
# Positions up to which masks are looked at, where a model names no limit of its own.
_NUM_POSITIONS = 2**17
_MAX_POSITIONS = 2**20


class _UnsupportedError(Exception):
    """A model attends in a way that allows no proof."""


class _Witness:
    """Stands between a model and `document_attention`, and keeps what is asked for."""

    def __init__(self) -> None:
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


class _Probe(NamedTuple):
    """Documents in the two ways of running them.

    Attributes:
        rows: The tokens of each, a tensor of shape `(length,)`.
        inputs: What a model reads of them without padding.
        places: Where the tokens of the rows are in it, one row after another.
        disturbed: Positions in it, all tokens of one document.
        leak: What it means if NaN there reaches others.
        way: How these inputs run, for a message.
    """

    rows: list[Tensor]
    inputs: dict[str, Any]
    places: Tensor
    disturbed: slice
    leak: str
    way: str


def find_problem(
    wrapped: nn.Module,
    model: nn.Module,
    switch: AttentionSwitch | None,
    shares_prompts: bool = False,
) -> str | None:
    """Why rows of a model have to be padded, or cannot share prompts; None where they need not.

    Random numbers come out as if nothing had run.

    Args:
        wrapped: The model as Accelerate prepared it.
        model: The same model, unwrapped from Accelerate.
        switch: Where `document_attention` would be used; None where the model's own attention.
        shares_prompts: Asks about prompts that are shared, where rows need no padding.
    """
    was_training = wrapped.training
    wrapped.eval()
    device = next(model.parameters()).device
    try:
        # Compiling would take longer than the probe, for shapes that do not come again.
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eagerly, same_random_numbers(device):
            run = _Runs(wrapped, model, switch)
            if shares_prompts:
                return run.problem_of_sharing()
            return run.problem()
    except _UnsupportedError as error:
        return str(error)
    except MODEL_ERRORS as error:
        return f"a run without padding failed ({type(error).__name__}: {error})"
    finally:
        wrapped.train(was_training)


class _Runs:
    """The runs of a probe; `find_problem` has the arguments."""

    def __init__(
        self, wrapped: nn.Module, model: nn.Module, switch: AttentionSwitch | None
    ) -> None:
        self._wrapped, self._switch = wrapped, switch
        self._model = cast(Any, model)
        self._config = self._model.config.get_text_config()
        device = next(model.parameters()).device
        self._rows = probe_rows(self._config.vocab_size, device)

    def problem(self) -> str | None:
        """Why rows have to be padded."""
        if self._switch is not None:
            # A single document: its masks can be asked about positions that it does not have.
            witness = _Witness()
            self._logits(end_to_end(self._rows[-1:]), _PROBE)
            limit = getattr(self._config, "max_position_embeddings", None) or _NUM_POSITIONS
            problem = witness.problem(min(limit, _MAX_POSITIONS))
            if problem is not None:
                return problem
        inputs = end_to_end(self._rows)
        places = torch.arange(sum(_LENGTHS), device=self._rows[0].device)
        leak = "tokens of one row reach another, as in recurrent or convolutional layers"
        return self._compare(
            _Probe(self._rows, inputs, places, _DISTURBED, leak, "without padding")
        )

    def problem_of_sharing(self) -> str | None:
        """Why two rows that begin alike cannot share that; they end in more tokens and in fewer."""
        assert self._switch is not None, "nothing else attends to documents that go on from others"
        prompt, one, other = self._rows
        rows = [torch.cat([prompt, ending]) for ending in (one, other)]
        alone = self._wrapped(input_ids=rows[0].unsqueeze(0), use_cache=False)
        if getattr(alone, "aux_loss", None) is not None:
            return "the loss of its router counts every token that runs"
        shared = find_shared_prompts([row.cpu().numpy().astype(np.int64) for row in rows], 1)
        assert shared is not None, "they begin alike"
        shared = shared.with_tensors(lambda tensor: tensor.to(prompt.device))
        inputs = {
            "input_ids": torch.cat(rows)[shared.index].unsqueeze(0),
            **shared.model_inputs(),
        }
        end = sum(shared.document_lengths)
        disturbed = slice(end - shared.document_lengths[-1], end)
        leak = "tokens of one response reach another"
        return self._compare(
            _Probe(rows, inputs, shared.places, disturbed, leak, "with shared prompts")
        )

    def _compare(self, probe: _Probe) -> str | None:
        flat = self._logits(probe.inputs, IMPLEMENTATION)
        if flat.isnan().any():
            return "its logits are NaN from the start, so that leaks would go unseen"
        problem = self._find_leak(probe, flat)
        if problem is not None:
            return problem
        is_exact = self._switch is not None
        try:
            truth, problem = self._compare_in_float64(probe)
        except MODEL_ERRORS as error:
            # Such as weights of which each process holds a part, or kernels of one dtype.
            logger.info("Nothing runs in float64 (%s: %s).", type(error).__name__, error)
            truth, is_exact = self._alone(probe.rows), False
        if problem is not None or flat.dtype == truth.dtype == torch.float64:
            return problem
        lengths = [len(row) for row in probe.rows]
        padded = self._padded(probe.rows)
        measures: list[Callable[[Tensor, Tensor], float]] = [
            partial(typical_error, lengths=lengths)
        ]
        if not is_exact:
            # No other run looked at every token.
            measures.append(largest_error)
        for measure in measures:
            found, allowed = (measure(logits, truth) for logits in (flat[probe.places], padded))
            if not found <= _CHANCE * allowed + torch.finfo(flat.dtype).eps:
                return f"{probe.way} its logits err by {found:.1e}, in padded rows by {allowed:.1e}"
        return None

    def _find_leak(self, probe: _Probe, flat: Tensor) -> str | None:
        with _disturbance(self._model.get_input_embeddings(), probe.disturbed):
            disturbed = self._logits(probe.inputs, IMPLEMENTATION)
        others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        others[probe.disturbed] = False
        if disturbed[~others].isfinite().any():
            return "its embeddings cannot be disturbed, so that leaks would go unseen"
        # Whatever is computed from NaN is NaN, however little it counts.
        if disturbed[others].isfinite().all():
            return None
        if self._switch is None:
            # Kernels that multiply what they mask by 0 are judged by the tokens: not a bit may
            # change with those of another row.
            one, other, last = probe.rows
            changed = self._logits(end_to_end([one, other.flip(0), last]))
            if torch.equal(changed[others], flat[others]):
                return None
        return probe.leak

    def _compare_in_float64(self, probe: _Probe) -> tuple[Tensor, str | None]:
        """The logits of the rows, and how those without padding differ; None where they do not."""
        # Unwrapped, for processes may need different numbers of these runs.
        with in_float64(self._model), self._unwrapped():
            if self._switch is None:
                # Flash attention has no float64.
                with AttentionSwitch(self._model).set_to("eager"):
                    return self._padded(probe.rows), None
            truth = self._padded(probe.rows)
            flat = self._logits(probe.inputs, IMPLEMENTATION)[probe.places]
            error, bound = largest_error(flat, truth), TOLERANCE
            if not error <= bound:
                # Padding, too, may change what a model gives, and kernels that know no float64
                # round by how many rows they are given.
                truth, twice = self._alone(probe.rows), self._alone(probe.rows, times=2)
                error, bound = largest_error(flat, truth), bound + 2 * largest_error(twice, truth)
        if error <= bound:
            return truth, None
        return truth, f"{probe.way} its logits differ by {error:.1e}, and {bound:.1e} is rounding"

    @contextmanager
    def _unwrapped(self) -> Iterator[None]:
        wrapped, self._wrapped = self._wrapped, self._model
        try:
            yield
        finally:
            self._wrapped = wrapped

    def _logits(self, inputs: Mapping[str, Any], implementation: str | None = None) -> Tensor:
        """`(T, V)`, of a single row."""
        is_set: AbstractContextManager[None] = nullcontext()
        if self._switch is not None and implementation is not None:
            is_set = self._switch.set_to(implementation)
        with is_set:
            logits: Tensor = self._wrapped(**inputs, use_cache=False).logits[0]
        return logits

    def _padded(self, rows: list[Tensor]) -> Tensor:
        logits = self._wrapped(**_padded(rows), use_cache=False).logits
        return torch.cat([of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)])

    def _alone(self, rows: list[Tensor], times: int = 1) -> Tensor:
        return torch.cat([self._logits({"input_ids": row.repeat(times, 1)}) for row in rows])


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
