"""Evaluation by the loss: sums over all rows, whatever the batch size and the processes."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import EvalLoopOutput

from hf_sft_plugin.batches.host_facts import facts_of, tensors_of
from hf_sft_plugin.batches.padding_rows import (
    gather_in_order,
    gather_own_rows,
    num_own_rows,
    outside_of_loaders,
    rows_of_dataset,
)
from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.evaluation.eval_masks import figures_by_mask, split_by_mask, totals_by_mask
from hf_sft_plugin.evaluation.prediction import make_reader, prediction_steps
from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.totals import NUM_TOTALS, Totals
from hf_sft_plugin.shards.dataset import ShardDataset
from hf_sft_plugin.types import RowError


class MaskedEvaluationMixin(TrainerBase):
    """Gives a `Trainer` an evaluation with exact figures; see `MaskedLossMixin`.

    Attributes:
        loss_normalization: See `MaskedLossMixin`.
        eval_masks: See `MaskedSFTConfig`.
        trained_mask: The one of these masks that the labels have.
    """

    loss_normalization: LossNormalization = LossNormalization.TOKEN
    eval_masks: Sequence[str] = ()
    trained_mask: str = "response"
    _num_own_rows = 0
    # Steps 6 and 7 of the walk.
    _forward: Callable[..., Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eval_rows: list[Tensor] = []

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Any, Tensor | None]:
        """Adds a batch to the totals of the evaluation.

        Returns:
            None for the loss, which `evaluation_loop` makes of the totals. Unless
            `prediction_loss_only`: the most probable token of each position, `(B, S)`, or what
            `preprocess_logits_for_metrics` makes of the logits of some rows; and the labels.
        """
        known = self._prepare_inputs(inputs)
        if facts_of(known).found_in is None:
            # Then it is not known whether the batch was changed since.
            known = tensors_of(known)
        masks = self.eval_masks, self.trained_mask
        batch, parts = split_by_mask(known, self.loss_normalization, *masks)
        labels = parts[0].labels
        reader = None if prediction_loss_only else make_reader(self, labels)
        with torch.no_grad(), self.compute_loss_context_manager():
            result, _ = self._forward(model, batch, LossObjective(), False, reader)
        self._num_own_rows = num_own_rows(inputs, self.accelerator)
        self._eval_rows.append(totals_by_mask(batch, parts, result)[: self._num_own_rows])
        return (None, None, None) if reader is None else (None, reader.predictions, labels)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, with metrics made of sums over all rows, whatever the batch size.

        Raises:
            ValueError: If no row of the dataset has a response token.
        """
        self._eval_rows = []
        if self.accelerator.num_processes > 1:
            self.gather_function = self._gather_own_rows
        prefix = kwargs.get("metric_key_prefix", "eval")
        try:
            with prediction_steps(self), outside_of_loaders(self.accelerator):
                output: EvalLoopOutput = super().evaluation_loop(
                    dataloader, description, *args, **kwargs
                )
        except RowError as error:
            error.args = (f"{prefix} data: {error}",)
            raise
        found = gather_in_order(self._eval_rows, self.accelerator)
        rows = torch.cat(found or [torch.zeros(1, NUM_TOTALS)])
        own = rows[:, :NUM_TOTALS]
        totals = Totals(*own.sum(0).tolist())
        if not totals.means():
            raise ValueError(
                f"No row of the {description.lower()} data has a response token, so there is "
                "nothing to measure. Check its response_mask or labels."
            )
        means = totals.means() | totals.aux_loss_mean()
        metrics = {**means, "perplexity": totals.perplexity(), **totals.counts()}
        # Any iterable of batches is a loader, too.
        dataset = rows_of_dataset(getattr(dataloader, "dataset", None))
        metrics |= means_by_source(own, dataset, self._get_eval_sampler)
        metrics |= figures_by_mask(rows, self.eval_masks, metrics)
        prefixed = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**prefixed, **(output.metrics or {})})

    def _gather_own_rows(self, tensors: Any) -> Any:
        return gather_own_rows(tensors, self._num_own_rows, self.accelerator)


def means_by_source(
    rows: Tensor, dataset: Any, get_sampler: Callable[[Any], Any]
) -> dict[str, float]:
    """The means of an evaluation for each source of its rows.

    Args:
        rows: Totals of each row, `(N, 10)`, in the order of evaluation.
        dataset: What was evaluated; has a length and a column `source`, or nothing is returned. A
            `ShardDataset` has `sources`.
        get_sampler: Says in which order the Trainer evaluates a dataset.

    Returns:
        `<source>_loss`, `<source>_token_entropy` and so on, for two sources or more.
    """
    if isinstance(dataset, ShardDataset):
        column = dataset.sources
    else:
        columns = getattr(dataset, "column_names", None) or ()
        # Which row of a stream has which source is not kept.
        has_source = isinstance(dataset, Sized) and "source" in columns
        column = dataset["source"] if has_source else None
    if column is None:
        return {}
    sampler = get_sampler(dataset)
    if len(rows) != len(dataset) or not isinstance(sampler, SequentialSampler | None):
        return {}
    sources = [str(source) for source in column]
    names = sorted(set(sources))
    if len(names) == 1:
        return {}
    index = torch.tensor([names.index(source) for source in sources], device=rows.device)
    sums = rows.new_zeros(len(names), rows.shape[1]).index_add_(0, index, rows)
    return {
        f"{name}_{key}": value
        for name, totals in zip(names, sums.tolist(), strict=True)
        for key, value in Totals(*totals).means().items()
    }
