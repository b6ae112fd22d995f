"""`torch_compile` of the model's body: once, for batches of all sizes.

The LM head, which works on as many rows as are trained, and the attention of each document are left
out of it; see `FusedHead` and `document_attention`.
"""

from accelerate import Accelerator
from accelerate.utils import DynamoBackend


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
