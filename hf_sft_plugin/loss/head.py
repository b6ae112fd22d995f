"""Step 7 of the walk for any LM head: the shortest way that is exact for it."""

from collections.abc import Callable

from torch import Tensor, nn

from hf_sft_plugin.loss.fused_head import HeadLoss, fused_head_loss
from hf_sft_plugin.loss.linear_head import is_plain_linear, linear_head_loss
from hf_sft_plugin.loss.logit_tile import LogitTransform
from hf_sft_plugin.loss.objective import LossObjective


def head_loss(
    head: nn.Module,
    hidden_states: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    transform: LogitTransform | None = None,
    objective: LossObjective | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    weight: Tensor | None = None,
) -> HeadLoss:
    """The summed loss of what an LM head predicts, without its logits ever being held all at once.

    The gradients are worked out together with the loss, so it can be differentiated once, and only
    as the sum that it is: weights come in, not out. A plain linear layer takes three matrix
    products over the rows (two where its weight is frozen); any other module is called as it is, a
    tile of rows at a time.

    Args:
        head: The LM head, for example `model.get_output_embeddings()`.
        hidden_states: `(N, D)`, of the positions that are trained.
        targets: `(N,)`, int64: the token that follows each of them.
        weights: `(N,)`, what each row's loss is multiplied with, such as one over the number of
            rows in the whole batch.
        transform: What the model does to the logits; None: nothing.
        objective: The loss of a token; None: the negative log-likelihood.
        forward: The forward of the head, where something else stands in its place for the moment.
        weight: Stands for that of a plain linear head, where its gradient goes another way.

    Returns:
        The loss, the losses of the rows, and their log-probabilities, entropies and hits.

    Raises:
        RuntimeError: If `weights` require a gradient, or under a transformation of `torch.func`; in
            the backward pass with `create_graph=True`.
    """
    forward = forward or head.forward
    transform = transform or LogitTransform()
    objective = objective or LossObjective()
    if is_plain_linear(head, forward, hidden_states):
        tensors = head.weight if weight is None else weight, head.bias
        return linear_head_loss(hidden_states, targets, weights, *tensors, transform, objective)
    parameters = list(head.parameters())
    return fused_head_loss(
        hidden_states,
        targets,
        weights,
        head=lambda rows: transform(forward(rows)),
        parameters=[p for p in parameters if p.requires_grad],
        # Only sets the rows of a tile; a module may hide its parameters.
        vocab_size=max((len(p) for p in parameters if p.dim()), default=2**17),
        objective=objective,
    )
