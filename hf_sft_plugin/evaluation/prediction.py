"""What metrics of a user's own get to see of the logits, which are never there all at once."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import concatenate, find_batch_size
from torch import Tensor

from hf_sft_plugin.batches.microbatches import remember_tensors

# Logits held at a time, as in `fused_head.py`; of one row there may be more.
_TILE_SIZE = 2**24
Reduce = Callable[[Tensor, Tensor], Any]


class LogitReader:
    """Makes predictions of the logits of a batch, a few rows at a time.

    Args:
        labels: `(B, S)`.
        reduce: As `preprocess_logits_for_metrics` of a `Trainer`: takes logits `(b, S, V)` and
            labels `(b, S)` of some rows. None takes the most probable token.

    Attributes:
        predictions: Of all rows, once the logits were read.
    """

    def __init__(self, labels: Tensor, reduce: Reduce | None) -> None:
        self.labels = labels
        self.reduce = reduce
        self.predictions: Any = None

    def __call__(self, hidden_states: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Reads the logits of all rows.

        Args:
            hidden_states: `(B, S, D)`; virtual tokens, which have no labels, may come first.
            head: Makes the logits of some rows.

        Raises:
            ValueError: If `reduce` does not give something for each row.
        """
        hidden, labels = hidden_states[:, -self.labels.shape[1] :], self.labels
        if self.reduce is None:
            # Each position is by itself.
            hidden, labels = hidden.flatten(0, 1).unsqueeze(1), labels.reshape(-1, 1)
        size_of_row = head(hidden[:1, :1]).shape[-1] * hidden.shape[1]
        num_rows = max(1, _TILE_SIZE // size_of_row)
        parts = [
            self._predict(head(rows), of_rows)
            for rows, of_rows in zip(hidden.split(num_rows), labels.split(num_rows), strict=True)
        ]
        self.predictions = concatenate(parts)
        if self.reduce is None:
            self.predictions = self.predictions.view_as(self.labels)

    def _predict(self, logits: Tensor, labels: Tensor) -> Any:
        if self.reduce is None:
            return logits.argmax(-1)
        predictions = self.reduce(logits, labels)
        if find_batch_size(predictions) != len(labels):
            raise ValueError(
                f"preprocess_logits_for_metrics was given {len(labels)} rows, and what it returned "
                "does not begin with a dimension of as many. It sees a few rows at a time, because "
                "the logits of a whole batch are never held; return something for each row."
            )
        return predictions


class _ReducedOnce:
    """Stands for `preprocess_logits_for_metrics` where `LogitReader` may have called it already."""

    def __init__(self, own: Reduce | None) -> None:
        self.own = own
        self.is_done = False

    def __call__(self, logits: Any, labels: Tensor) -> Any:
        is_done, self.is_done = self.is_done, False
        return logits if is_done or self.own is None else self.own(logits, labels)


def make_reader(trainer: Any, labels: Tensor) -> LogitReader:
    """A reader that does what `preprocess_logits_for_metrics` would, which is then not called."""
    reduce = trainer.preprocess_logits_for_metrics
    if not isinstance(reduce, _ReducedOnce):
        return LogitReader(labels, reduce)
    reduce.is_done = True
    return LogitReader(labels, reduce.own)


@contextmanager
def prediction_steps(trainer: Any) -> Iterator[None]:
    """Around an evaluation loop: what comes before and after each `prediction_step`.

    Before it, a batch remembers in which tensors its trained positions were found, because a
    subclass may change them on the way. After it, logits that were read are not reduced again.
    """
    step, own = trainer.prediction_step, trainer.preprocess_logits_for_metrics

    def remember_first(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, MutableMapping):
            remember_tensors([inputs])
        return step(model, inputs, *args, **kwargs)

    trainer.prediction_step = remember_first
    trainer.preprocess_logits_for_metrics = _ReducedOnce(own)
    try:
        yield
    finally:
        del trainer.prediction_step
        trainer.preprocess_logits_for_metrics = own
