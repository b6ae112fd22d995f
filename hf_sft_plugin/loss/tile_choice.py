"""Who works on a tile of logits, and how large it is, by device."""

import importlib
import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from hf_sft_plugin.loss.logit_tile import LogitTile, LogitTransform, RowValues
from hf_sft_plugin.loss.objective import LossObjective

logger = logging.getLogger(__name__)

# Bytes of a tile: as large as the products need to run at full speed, and where memory is short,
# a share of what is free. Fewer than the least are not worth their launches.
_CPU_BYTES = 184 * 2**20
_MOST_BYTES = 2**30
_LEAST_BYTES = 2**26
_SHARE_OF_FREE = 8


def choose_tile(device: torch.device, dtype: torch.dtype) -> type[LogitTile]:
    """Triton's kernels for a CUDA device where they run, else plain torch.

    Whether they run is tried, once for each device of a process, on a tile of two rows: they need
    Triton, a C compiler and a GPU that is not too old. The reason why not is logged.

    Args:
        device: Where the logits are.
        dtype: Theirs; float64 is always plain torch.
    """
    if device.type != "cuda" or dtype == torch.float64:
        return LogitTile
    return _fastest_tile(device)


def tile_bytes(device: torch.device) -> int:
    """How many bytes of logits are held at a time, however many rows there are.

    On a CUDA device at most an eighth of what is free, as a power of two, so that small differences
    in memory do not change the order of sums. It is asked once in a process: the size stays the
    same, and nothing has to wait for the answer.
    """
    return _CPU_BYTES if device.type == "cpu" else _accelerator_bytes(device)


@cache
def _accelerator_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _MOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds, but does not use, is free as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share = 2 ** max(0, (free // _SHARE_OF_FREE).bit_length() - 1)
    return min(_MOST_BYTES, max(_LEAST_BYTES, share))


@cache
def _fastest_tile(device: torch.device) -> type[LogitTile]:
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "The statistics of the LM head on %s are worked out in plain torch, which takes more "
            'passes over the logits, because Triton is not installed: pip install "hf_sft_plugin'
            '[triton]"',
            device,
        )
        return LogitTile
    try:
        # Loaded here, so that nobody waits for Triton who has no use for it.
        tile = importlib.import_module("hf_sft_plugin.loss.triton_tile").TritonTile
        found, expected = _try_tile(tile, device), _try_tile(LogitTile, device)
    except Exception as error:  # whatever compilers, linkers and drivers raise
        problem = f"{type(error).__name__}: {error}"
    else:
        if torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            return tile
        problem = f"of a tile that is known they made {found.tolist()}, not {expected.tolist()}"
    logger.warning(
        "The statistics of the LM head on %s are worked out in plain torch, which takes more "
        "passes over the logits, because Triton's kernels do not run there: %s",
        device,
        problem,
    )
    return LogitTile


def _try_tile(tile: type[LogitTile], device: torch.device) -> Tensor:
    """Gradients and values of two rows."""
    rows = [[0.0, 1.0, -2.0], [3.0, 0.5, 0.0]]
    logits = torch.tensor(rows, device=device, dtype=torch.float32)
    targets = torch.tensor([1, 2], device=device)
    values = RowValues.empty(2, like=logits, dtype=logits.dtype)
    work = tile(None, LogitTransform(), LossObjective(), logits.dtype, True, None)
    work.consume(logits, targets, torch.ones_like(logits[:, 0]), values)
    return torch.cat([logits.flatten(), *values])
