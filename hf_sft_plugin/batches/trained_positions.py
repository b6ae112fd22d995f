"""Which predictions of a batch are trained: found on the host, where the batch is made.

Of a batch on a GPU their number could only be known by waiting for it, in every micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sft_plugin.loss.token_stats import shift_labels
from hf_sft_plugin.types import IGNORE_INDEX

# The name under which a batch carries its `TrainedPositions`.
TRAINED_POSITIONS = "trained_positions"


@dataclass(frozen=True)
class TrainedPositions:
    """The N predictions of a batch whose targets are trained, in row-major order.

    Attributes:
        shape: B and S of the batch.
        on_host: `(N,)`, their positions in the flattened batch; stays on the host.
        index: The same on the device of the batch.
    """

    shape: tuple[int, int]
    on_host: NDArray[np.int64]
    index: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TrainedPositions":
        """A copy on a device; Accelerate calls this on what a batch holds."""
        return self._with_index(lambda index: index.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TrainedPositions":
        """A copy that the device can fetch by itself; data loaders call this."""
        return self._with_index(Tensor.pin_memory)

    def rows(self) -> list[NDArray[np.int64]]:
        """The trained positions of each row, counted within the row."""
        num_rows, width = self.shape
        edges = np.searchsorted(self.on_host, np.arange(1, num_rows) * width)
        return [columns % width for columns in np.split(self.on_host, edges)]

    def _with_index(self, change: Callable[[Tensor], Tensor]) -> "TrainedPositions":
        return replace(self, index=change(self.index))


def find_trained_positions(labels: Tensor) -> TrainedPositions:
    """Finds the predictions that are trained.

    Args:
        labels: `(B, S)`, unshifted, with IGNORE_INDEX where nothing is trained.

    Examples:
        >>> found = find_trained_positions(torch.tensor([[-100, 6, 7], [-100, -100, 9]]))
        >>> found.index.tolist(), [row.tolist() for row in found.rows()]
        ([0, 1, 4], [[0, 1], [1]])
    """
    is_trained = shift_labels(labels) != IGNORE_INDEX
    on_host = np.flatnonzero(is_trained.cpu().numpy())
    shape = (labels.shape[0], labels.shape[1])
    return TrainedPositions(shape, on_host, torch.from_numpy(on_host))


def positions_of_rows(rows: Sequence[NDArray[np.int64]], width: int) -> TrainedPositions:
    """The trained positions of a batch of `width` columns, made of those of its rows."""
    on_host = np.concatenate([number * width + columns for number, columns in enumerate(rows)])
    return TrainedPositions((len(rows), width), on_host, torch.from_numpy(on_host))
