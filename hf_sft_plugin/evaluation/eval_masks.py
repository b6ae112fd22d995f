"""Figures over several masks from one forward pass of an evaluation."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sft_plugin.batches.host_facts import with_facts
from hf_sft_plugin.batches.response_batch import ResponseBatch, split_batch
from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.loss.token_stats import TokenStats
from hf_sft_plugin.loss.totals import NUM_TOTALS, Totals, row_totals
from hf_sft_plugin.models.lm_head import ResponseResult
from hf_sft_plugin.tokens.eval_masks import EVAL_MASK_BITS, missing_column
from hf_sft_plugin.types import IGNORE_INDEX

logger = logging.getLogger(__name__)


def split_by_mask(
    inputs: Mapping[str, Any],
    normalization: LossNormalization,
    masks: Sequence[str],
    trained_mask: str,
) -> tuple[ResponseBatch, list[ResponseBatch]]:
    """Takes a batch apart once for all masks that are asked for, and once for each.

    Args:
        inputs: A batch; has `eval_masks` where labels and tokens do not tell all masks.
        normalization: That of training.
        masks: Some of `response`, `last_response` and `all`.
        trained_mask: The one of which the labels are.

    Returns:
        The batch whose targets are those of any mask, for the forward pass; and one for the labels
        as they are, followed by one for each mask. Weights are those of training, and 1 for tokens
        that are not trained.

    Raises:
        ValueError: If the batch does not say which tokens belong to a mask.
    """
    if normalization == LossNormalization.CONSTANT:
        # That divisor belongs to an optimizer step; an evaluation has a mean per token.
        normalization = LossNormalization.TOKEN
    own = split_batch(inputs, normalization)
    if not masks:
        return own, [own]
    labels = [_labels(inputs, name, trained_mask) for name in masks]
    union = torch.stack([inputs["labels"], *labels]).amax(0)
    whole, *parts = (_relabel(inputs, each, normalization) for each in (union, *labels))
    return whole, [own, *parts]


def _labels(inputs: Mapping[str, Any], name: str, trained_mask: str) -> Tensor:
    """Unshifted labels of the tokens of a mask; a token that nothing comes before has none."""
    ids: Tensor = inputs["input_ids"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    is_token = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
    belongs = is_token.clone()
    belongs[:, 1:] &= is_token[:, :-1]
    if positions is not None and positions.shape == ids.shape:
        belongs &= positions > 0
    marks = inputs.get("eval_masks")
    if name == trained_mask:
        belongs = inputs["labels"] != IGNORE_INDEX
    elif name != "all":
        if marks is None:
            raise missing_column([name], "The rows of this evaluation")
        belongs &= (marks & EVAL_MASK_BITS[name]) > 0
    return ids.where(belongs, IGNORE_INDEX)


def _relabel(
    inputs: Mapping[str, Any], labels: Tensor, normalization: LossNormalization
) -> ResponseBatch:
    batch = with_facts(inputs, trained=None, found_in=None)
    batch["labels"] = labels
    weights = inputs.get("loss_weights")
    if weights is not None:
        batch["loss_weights"] = weights.where(inputs["labels"] != IGNORE_INDEX, 1)
    return split_batch(batch, normalization)


def totals_by_mask(
    whole: ResponseBatch, parts: Sequence[ResponseBatch], result: ResponseResult
) -> Tensor:
    """Sums what one forward pass found, for each row and mask.

    Args:
        whole: What was run.
        parts: The masks; their positions are among those of `whole`.
        result: What came of it.

    Returns:
        `(B, M * 10)`: for each of M masks the columns of `row_totals`.
    """
    totals = []
    for part in parts:
        index = torch.searchsorted(whole.positions, part.positions)
        stats = TokenStats(*(values.index_select(0, index) for values in result.stats))
        losses = result.token_losses.index_select(0, index)
        of_rows = part.weights, part.divisors, part.num_tokens
        aux_loss = result.aux_loss
        totals.append(row_totals(losses, stats, part.positions, *of_rows, aux_loss=aux_loss))
    return torch.cat(totals, dim=-1)


def figures_by_mask(
    rows: Tensor, masks: Sequence[str], taken: Collection[str] = ()
) -> dict[str, float]:
    """The figures of an evaluation over each mask that was asked for.

    Args:
        rows: Totals of all rows, `(N, M * 10)`; the first 10 columns are not of these masks.
        masks: M - 1 names.
        taken: Names of other figures. Those of a source of rows that is called like a mask give
            way to it, with a warning.

    Returns:
        `<mask>_loss`, `<mask>_token_entropy`, `<mask>_token_accuracy`, `<mask>_perplexity` and
        `<mask>_num_tokens`, the number of its tokens; nothing for a mask without a token.
    """
    sums = rows.sum(0).split(NUM_TOTALS)[1:]
    figures: dict[str, float] = {}
    for name, values in zip(masks, sums, strict=True):
        totals = Totals(*values.tolist())
        means = totals.means()
        if means:
            count = round(totals.num_response_tokens)
            means |= {"perplexity": totals.perplexity(), "num_tokens": count}
        figures |= {f"{name}_{key}": value for key, value in means.items()}
    if not figures.keys().isdisjoint(taken):
        logger.warning(
            "A source of rows is called like one of the masks %s, whose figures take the place of "
            "its own. Give the source another name to see both.",
            ", ".join(masks),
        )
    return figures
