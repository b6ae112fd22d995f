"""Checks of a step's forward pass: documents are apart, and the fused head gives true numbers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_sft_plugin.batches.host_facts import find_layout, tensors_of
from hf_sft_plugin.loss.token_stats import shift_labels
from hf_sft_plugin.models.float64_run import TOLERANCE, in_float64
from hf_sft_plugin.models.lm_head import replaced_forward
from hf_sft_plugin.models.model_interface import find_lm_head
from hf_sft_plugin.types import IGNORE_INDEX
from hf_sft_plugin.verification.checks import VerificationCheck, not_run
from hf_sft_plugin.verification.first_step import FirstStep

DOCUMENT_CHECKS = ("other documents", "changed token", "padding")
HEAD_CHECKS = ("log-probabilities", "entropies")
# Rows of the sample, tokens of each, and how many of them come before the first that is trained.
_SAMPLE = 4, 32, 8
# Smaller errors float64 has itself.
_FINEST = 1e-12
# Documents in which a token that can be changed is looked for.
_NUM_TRIED = 8

_ON_DOCUMENTS = (
    "What is read in one document, or later in its own, changes what is predicted: the model would "
    "learn from what inference does not show it. Set padding_free to 'off' and packing to false; "
    "if it stays, the model mixes the rows of a batch, as batch normalization does, or its mask "
    "is not causal."
)
_ON_BLINDNESS = (
    "The prediction at a token does not depend on that token, so this check could not see a leak, "
    "and the model does not see what it reads. Look at its embeddings, and at what stands between "
    "the collator and the model."
)
_ON_PADDING = (
    "What stands in the padding changes what is predicted. Give the model an attention_mask, pad "
    "on the right, and look at how the model uses the mask."
)
_ON_HEAD = (
    "The fused head errs more than the model's own logits do, so the loss is not the one of this "
    "model: it does something to its logits that a test run did not show. Set fused_head to 'off'."
)


class _Change(NamedTuple):
    """One token of a micro-batch in the place of another.

    Attributes:
        ids: `(B, S)`, with it.
        position: Where, in the flattened ids.
    """

    ids: Tensor
    position: int


def check_documents(step: FirstStep) -> list[VerificationCheck]:
    """Changes a token, then the padding, and looks at which predictions move.

    Where some do, the unchanged rows run once more, for what moves by itself. Every process runs
    as many passes, whatever its rows are.

    Args:
        step: While it is `undone`.
    """
    part = max(step.microbatches, key=lambda each: len(each["labels"]))
    plain = tensors_of(part)
    ids = part["input_ids"]
    targets = shift_labels(part["labels"]).flatten()
    positions = (targets != IGNORE_INDEX).nonzero().flatten().cpu()
    documents = find_documents(plain)
    change = _find_change(plain, positions, documents)
    mask = part.get("attention_mask")
    is_padding = torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask == 0
    padded = ids.where(~is_padding, ids.flatten()[0])
    # Whichever token is there now.
    padded = torch.where(is_padding & (padded == ids), ids.max(), padded)

    def predictions(ids: Tensor) -> Tensor:
        changed = part if ids is part["input_ids"] else {**plain, "input_ids": ids}
        stats = step.forward(changed).stats
        return torch.stack([stats.log_probs, stats.token_entropy]).cpu()

    before = predictions(ids)
    after = predictions(ids if change is None else change.ids)
    with_other_padding = predictions(padded)
    may_move = torch.zeros(len(positions), dtype=torch.bool)
    if change is not None:
        is_own = documents[positions] == documents[change.position]
        may_move = is_own & (positions >= change.position)
    moves = _moves(before, after, with_other_padding, may_move)
    bound = 0.0
    if any(step.on_processes(any(moves))):
        bound = 2 * _largest_move(before, predictions(ids))
    has_experts = any("expert" in name for name, _ in step.unwrapped.named_modules())
    if has_experts and any(step.on_processes(any(moves))):
        # Experts multiply the tokens that chose them, and round by how many these are. A prediction
        # that moves in float64, too, depends on what was changed.
        with in_float64(step.unwrapped):
            before, after, with_other_padding, again = (
                predictions(each)
                for each in (ids, ids if change is None else change.ids, padded, ids)
            )
        moves = _moves(before, after, with_other_padding, may_move)
        bound = TOLERANCE + 2 * _largest_move(before, again)
    checks = _judge_change(before != after, may_move, positions, documents, change, moves[0], bound)
    if not len(positions) or not is_padding.any():
        reason = "no token of these rows is trained" if is_padding.any() else "there is none"
        return [*checks, not_run(DOCUMENT_CHECKS[2], reason)]
    note = f"nats that {len(positions):,} predictions move by with other tokens in the padding"
    return [*checks, VerificationCheck(DOCUMENT_CHECKS[2], moves[1], bound, note, _ON_PADDING)]


def find_documents(batch: Mapping[str, Any]) -> Tensor:
    """The number of the document that each position of a batch is of, flattened; -1 is padding."""
    num_rows, width = batch["input_ids"].shape
    layout = find_layout(batch)
    if layout is None:
        return torch.arange(num_rows).repeat_interleave(width)
    numbers = torch.full((num_rows * width,), -1)
    lengths = torch.tensor(layout.document_lengths)
    numbers[layout.index] = torch.arange(len(lengths)).repeat_interleave(lengths)
    return numbers


def _find_change(batch: Mapping[str, Any], positions: Tensor, documents: Tensor) -> _Change | None:
    """A change in the first document that allows one: what rows share has to stay as it is."""
    ids = batch["input_ids"]
    sharing = _sharing(batch)
    of_trained = documents[positions]
    for number in of_trained.unique()[:_NUM_TRIED].tolist():
        own = positions[of_trained == number]
        # Some of its predictions are before it, some after it.
        position = int(own[len(own) // 2])
        token = int(ids.flatten()[position])
        for other in ids.flatten().unique().tolist()[-3:]:
            changed = ids.clone()
            changed.view(-1)[position] = other
            if other != token and _sharing({**batch, "input_ids": changed}) == sharing:
                return _Change(changed, position)
    return None


def _sharing(batch: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    layout = find_layout(batch, share_prompts=True)
    if layout is None or layout.shared is None:
        return None
    return layout.shared.document_lengths, layout.shared.index.tolist()


def _judge_change(
    has_moved: Tensor,
    may_move: Tensor,
    positions: Tensor,
    documents: Tensor,
    change: _Change | None,
    largest: float,
    bound: float,
) -> list[VerificationCheck]:
    names = DOCUMENT_CHECKS[:2]
    if change is None:
        reason = "no token of these rows is trained, or none can be changed alone"
        return [not_run(name, reason) for name in names]
    num_documents = len(documents[documents >= 0].unique())
    note = (
        f"nats that {int((~may_move).sum()):,} predictions move by when a token changes: those of "
        f"{num_documents - 1} other documents, and of its own before it"
    )
    has_moved = has_moved.any(0)
    seen = f"{int(has_moved[may_move].sum())} of {int(may_move.sum())} from it on move"
    note_on_own = f"predictions at it that stay; {seen}"
    is_blind = not has_moved[positions == change.position].any()
    return [
        VerificationCheck(names[0], largest, bound, note, _ON_DOCUMENTS),
        VerificationCheck(names[1], float(is_blind), 0, note_on_own, _ON_BLINDNESS),
    ]


def _moves(
    before: Tensor, after: Tensor, with_other_padding: Tensor, may_move: Tensor
) -> tuple[float, float]:
    """How far predictions move that a changed token must not reach, and with other padding."""
    left = before[:, ~may_move], after[:, ~may_move]
    return _largest_move(*left), _largest_move(before, with_other_padding)


def _largest_move(before: Tensor, after: Tensor) -> float:
    """In nats; infinite where one is no number and the other is."""
    is_same = (before == after) | (before.isnan() & after.isnan())
    moves = (after - before).abs().nan_to_num(nan=torch.inf).where(~is_same, 0)
    return float(moves.max()) if moves.numel() else 0.0


def check_head(step: FirstStep) -> list[VerificationCheck]:
    """Holds the fused head and the model's own logits to float64, on the same hidden states.

    Args:
        step: While it is `undone`.
    """
    sample = sample_rows(step.microbatches)
    chooser, head = step.trainer._head, find_lm_head(step.unwrapped)
    fused = step.forward(sample).stats
    with chooser.full_logits():
        reference = step.forward(sample).stats
        with nullcontext() if head is None else _logits_in_float64(head):
            truth = step.forward(sample).stats
    if chooser.choice is None:
        return [not_run(name, "the loss is made from the full logits") for name in HEAD_CHECKS]
    rounding = max(torch.finfo(step.dtype).eps, _FINEST)
    return [
        _judge_head(name, rounding, *values)
        for name, *values in zip(
            HEAD_CHECKS,
            *((stats.log_probs, stats.token_entropy) for stats in (fused, reference, truth)),
            strict=True,
        )
    ]


@contextmanager
def _logits_in_float64(head: nn.Module) -> Iterator[None]:
    own = head.forward
    with in_float64(head), replaced_forward(head, lambda hidden: own(hidden.double())):
        yield


def _judge_head(
    name: str, rounding: float, fused: Tensor, reference: Tensor, truth: Tensor
) -> VerificationCheck:
    truth = truth.double()
    found, allowed = (float((x - truth).square().mean().sqrt()) for x in (fused, reference))
    bound = 2 * allowed + rounding * max(1.0, float(truth.square().mean().sqrt()))
    note = f"nats off float64 at {len(truth)} positions; full logits are {allowed:.1e} off"
    return VerificationCheck(name, found, bound, note, _ON_HEAD)


def sample_rows(parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A few rows of micro-batches, cut to the tokens around the first that is trained.

    Rows of which nothing is trained are trained whole: here only the numbers are looked at.
    """
    num_rows, length, _ = _SAMPLE
    pieces = [piece for part in parts for piece in _pieces(part)]
    chosen = [p for p in pieces if (p["labels"][1:] != IGNORE_INDEX).any()][:num_rows]
    if not chosen:
        chosen = [{**piece, "labels": piece["input_ids"]} for piece in pieces[:num_rows]]
    fill = {"labels": IGNORE_INDEX}
    return {
        name: torch.stack(
            [pad(p[name], (0, length - len(p[name])), value=fill.get(name, 0)) for p in chosen]
        )
        for name in chosen[0]
    }


def _pieces(part: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    _, length, num_before = _SAMPLE
    ids = part["input_ids"]
    # Positions count from the beginning of the row, which may be cut off.
    names = [
        name
        for name, value in part.items()
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "position_ids"
    ]
    values = {name: part[name] for name in names}
    values.setdefault("attention_mask", torch.ones_like(ids))
    for row in range(len(ids)):
        of_row = {name: value[row] for name, value in values.items()}
        trained = (of_row["labels"][1:] != IGNORE_INDEX).nonzero()
        start = max(0, int(trained[0]) - num_before) if len(trained) else 0
        yield {name: value[start : start + length] for name, value in of_row.items()}
