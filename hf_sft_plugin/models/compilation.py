"""`torch_compile` of the model's body: once, for batches of all sizes.

The LM head, which works on as many rows as are trained, and the attention of each document are left
out of it; see `FusedHead` and `document_attention`.
"""

from accelerate import Accelerator
from accelerate.utils import DynamoBackend, is_compiled_module
from torch import nn


def compile_for_all_sizes(accelerator: Accelerator) -> None:
    """Has a model compiled for batches of any size from the first one on.

    Rows that are not padded make a batch of another size at every step. By itself `torch.compile`
    compiles for the size of the first, and for any size when the second comes. What the user has
    chosen (`ACCELERATE_DYNAMO_USE_DYNAMIC`) stays.

    Args:
        accelerator: Compiles the model when it prepares it, where it was asked to.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO and plugin.dynamic is None:
        plugin.dynamic = True


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has been applied to a model or to any part of it."""
    # Both ways: a wrapper around a module, and a call of its own on the module.
    return any(
        is_compiled_module(module) or module._compiled_call_impl is not None
        for module in model.modules()
    )
