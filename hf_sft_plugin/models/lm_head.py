"""Steps 6 and 7 of the walk on a real model: its body runs as it is, its LM head gives the loss.

The model is called as always, through whatever Accelerate and PEFT wrapped around it, so their
hooks see an ordinary forward pass. Only while it runs, its LM head answers with the summed loss of
the response positions instead of the logits of all positions. Nothing on the model is changed for
good.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sft_plugin.batches.response_batch import ResponseBatch
from hf_sft_plugin.loss.fused_head import HeadLoss, full_head_loss
from hf_sft_plugin.loss.head import head_loss
from hf_sft_plugin.loss.linear_head import is_plain_linear
from hf_sft_plugin.loss.logit_tile import LogitTransform
from hf_sft_plugin.loss.masked_loss import widest_float
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.token_stats import TokenStats
from hf_sft_plugin.models.adapters import adapter_state
from hf_sft_plugin.models.embeddings import shared_gradient
from hf_sft_plugin.models.model_interface import (
    find_aux_loss,
    find_lm_head,
    find_logits,
    find_text_config,
    run_model,
    same_random_numbers,
)

logger = logging.getLogger(__name__)

_RESULT_KEY = "response_result"


class ResponseResult(NamedTuple):
    """What one forward pass gives for the N response positions of a batch.

    Attributes:
        loss: Scalar, sum of weight * loss of the token.
        token_losses: `(N,)`, the loss of each token without its weight, detached.
        stats: Detached statistics of shape `(N,)`, in row-major order of the positions.
        aux_loss: The router loss of a mixture-of-experts model, where it computes one.
    """

    loss: Tensor
    token_losses: Tensor
    stats: TokenStats
    aux_loss: Tensor | None


def forward_full(
    model: nn.Module, batch: ResponseBatch, objective: LossObjective
) -> tuple[ResponseResult, Any]:
    """The reference: the model's own logits at all positions, then the loss at response positions.

    Args:
        model: The model as Accelerate prepared it.
        batch: What it reads, and what the loss needs.
        objective: The loss of one token.

    Returns:
        The result, and the model's own outputs with the logits.
    """
    outputs = run_model(model, batch.model_inputs)
    every = find_logits(outputs, batch.model_inputs.get("input_ids"))
    logits = _choose(every, batch)
    answer = full_head_loss(logits, *_chosen_targets(batch, batch.targets.device), objective)
    answer = _on_device(answer, batch.targets.device)
    return ResponseResult(*answer, find_aux_loss(outputs)), outputs


def _choose(values: Tensor, batch: ResponseBatch) -> Tensor:
    """What a model says at the trained positions of a batch, in their order."""
    places = batch.places
    index = batch.positions if places is None else places.index_select(0, batch.positions)
    # The last layers of a model that is spread over devices are not where the batch is.
    index = index.to(values.device)
    if places is not None:
        return values[0].index_select(0, index)
    # Virtual tokens of a prompt-learning adapter come first and have no labels.
    return values[:, -batch.targets.shape[1] :].flatten(0, 1).index_select(0, index)


def _on_device(answer: HeadLoss, device: torch.device) -> HeadLoss:
    loss, token_losses, stats = answer
    return HeadLoss(
        loss.to(device), token_losses.to(device), TokenStats(*(stat.to(device) for stat in stats))
    )


def _chosen_targets(batch: ResponseBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The targets at the trained positions, and their weights."""
    targets, weights = (
        tensor.flatten().index_select(0, batch.positions).to(device)
        for tensor in (batch.targets, batch.weights)
    )
    return targets, weights


class FusedHead:
    """Runs a model so that its logits are never held all at once.

    Args:
        model: The model that owns the head, unwrapped from Accelerate but not from PEFT.
        transform: What the model does to the output of its head, as `find_transform` measured it.
    """

    def __init__(self, model: nn.Module, transform: LogitTransform) -> None:
        lm_head = find_lm_head(model)
        assert lm_head is not None, "find_transform gave a transformation, so there is a head"
        self.model = model
        self.lm_head = lm_head
        self.transform = transform
        # What is known about a sharded head while it is whole.
        self._summary: str | None = None

    @property
    def summary(self) -> str:
        """One line for the user."""
        return self._summary or self._summarize(self.lm_head.forward)

    def _summarize(self, own_forward: Callable[..., Any]) -> str:
        weight = getattr(self.lm_head, "weight", None)
        if isinstance(weight, Tensor):
            like_hidden = weight.new_empty(0, weight.shape[-1])
            if is_plain_linear(self.lm_head, own_forward, like_hidden):
                return f"{3 if weight.requires_grad else 2} products over response rows"
        return "a tile of logits at a time, response rows only"

    def forward(
        self,
        model: nn.Module,
        batch: ResponseBatch,
        objective: LossObjective,
        read: Callable[[Tensor, Callable[[Tensor], Tensor]], None] | None = None,
    ) -> ResponseResult:
        """Like `forward_full`, within rounding, in memory that does not grow with the batch.

        Where `read` is given, it is called with the hidden states of all positions, `(B, S, D)`,
        and what makes logits of some of them.
        """
        own_forward = self.lm_head.forward
        answers: list[HeadLoss] = []

        # The compiler of the model would compile the tiles anew for every number of rows.
        @torch.compiler.disable
        def answer_with_loss(hidden_states: Tensor) -> Tensor:
            self._summary = self._summary or self._summarize(own_forward)
            answer = head_loss(
                self.lm_head,
                _choose(hidden_states, batch),
                *_chosen_targets(batch, hidden_states.device),
                transform=self.transform,
                objective=objective,
                forward=own_forward,
                weight=self._weight_of(handed_on),
            )
            answers.append(answer)
            if read is not None:
                read(hidden_states, lambda some: self.transform(own_forward(some)))
            return answer.loss

        with (
            self._collected_losses() as losses,
            shared_gradient(model, self.model, self.lm_head) as handed_on,
            replaced_forward(self.lm_head, answer_with_loss),
        ):
            returned = run_model(model, batch.model_inputs)[_RESULT_KEY]
        (answer,) = (_on_device(answer, batch.targets.device) for answer in answers)
        # FSDP2 rounds outputs, after it put its hooks on what they were.
        loss, aux_loss = (
            own if own is None or own.dtype != value.dtype else value.to(own.device)
            for own, value in zip((answer.loss, losses[1]), returned, strict=True)
        )
        return ResponseResult(loss, answer.token_losses, answer.stats, aux_loss)

    def _weight_of(self, handed_on: list[Tensor]) -> Tensor | None:
        """What the embedding handed on, where the head has not been widened meanwhile."""
        head: Any = self.lm_head
        is_same = bool(handed_on) and handed_on[0].dtype == head.weight.dtype
        return handed_on[0] if is_same else None

    @contextmanager
    def _collected_losses(self) -> Iterator[list[Any]]:
        """The loss as it leaves the head, and that of a router, in a forward pass."""
        losses: list[Any] = []

        @torch.compiler.disable
        def take_loss(_: nn.Module, __: Any, loss: Tensor) -> Tensor:
            losses.append(loss)
            # The model goes on with this as if it were logits; whatever it computes is discarded.
            return loss.new_zeros(1, 1, 1)

        def attach_result(_: nn.Module, __: Any, outputs: Any) -> dict[str, Any]:
            losses.append(find_aux_loss(outputs))
            # Wrappers such as DDP look at the outputs to find what the gradient will reach.
            return {_RESULT_KEY: tuple(losses)}

        # After those of an engine, which prepares its weights when it meets the gradient.
        take = self.lm_head.register_forward_hook(take_loss)
        attach = self.model.register_forward_hook(attach_result, prepend=True)
        try:
            yield losses
        finally:
            take.remove()
            attach.remove()


class HeadChooser:
    """Chooses how a model's logits become a loss, once for each model.

    Attributes:
        choice: The fused head that was chosen last; None takes the full logits.
    """

    def __init__(self) -> None:
        self.choice: FusedHead | None = None
        self._asked: tuple[Any, ...] | None = None

    @property
    def summary(self) -> str | None:
        """One line for the user; None before the first choice."""
        if self._asked is None:
            return None
        return "full logits" if self.choice is None else self.choice.summary

    @contextmanager
    def full_logits(self) -> Iterator[None]:
        """Takes the full logits for a while, whatever was chosen."""
        choice, self.choice = self.choice, None
        try:
            yield
        finally:
            self.choice = choice

    def choose(
        self, wrapped: nn.Module, model: nn.Module, inputs: Mapping[str, Any], fused_head: str
    ) -> FusedHead | None:
        """The fused head, where the model allows one.

        Args:
            wrapped: The model as Accelerate prepared it.
            model: The same model, unwrapped from Accelerate.
            inputs: A batch to try it with.
            fused_head: `auto`, `on` or `off`; see `MaskedSFTConfig`.

        Raises:
            ValueError: If it is `on`, and the model needs its full logits.
        """
        # An adapter may have been put around the head since.
        asked = model, find_lm_head(model), adapter_state(model), fused_head
        if self._asked == asked:
            return self.choice
        self._asked, self.choice = asked, None
        if fused_head == "off":
            return None
        transform = find_transform(wrapped, model, inputs)
        if transform is not None:
            self.choice = FusedHead(model, transform)
            return self.choice
        name = type(model).__name__
        problem = f"The logits of {name} are not those of its LM head, scaled or soft-capped as its"
        problem += " config says, so the loss needs the full logits"
        if find_lm_head(model) is None:
            problem = f"{name} does not say which module is its LM head (get_output_embeddings), so"
            problem += " the loss needs the full logits"
        if fused_head == "on":
            raise ValueError(f"{problem}. Set fused_head to 'auto' to allow that.")
        logger.warning("%s: memory grows with batch size times vocabulary.", problem)
        return None


def find_transform(
    wrapped: nn.Module, model: nn.Module, inputs: Mapping[str, Any]
) -> LogitTransform | None:
    """Measures what a model does to the output of its LM head: nothing, a scaling or a soft cap.

    One row is run, with a head that answers with known values. Each transformation that the model's
    config can stand for is compared with what the model makes of them. The values are large and of
    both signs: on logits near zero a soft cap changes nothing, and on zeros no scaling does. They
    are float64, so that rounding hides nothing, whatever the precision that the model trains in.

    Args:
        wrapped: The model as Accelerate prepared it.
        model: The same model, unwrapped from Accelerate.
        inputs: A batch; its first row is used.

    Returns:
        The transformation, or None where no known one fits or several different ones do, or where
        the logits do not come from an LM head that is told nothing but hidden states.
    """
    lm_head = find_lm_head(model)
    if lm_head is None:
        return None
    head = lm_head.forward
    planted: list[Tensor] = []
    are_told: list[Any] = []

    def answer_with_known_values(hidden_states: Tensor, **told: Any) -> Tensor:
        # Of what a head is told about rows, a tile of positions would not know its part.
        are_told.extend(told)
        # One position of the real head tells the size of the vocabulary and the device.
        planted.append(_known_logits(like=head(hidden_states[..., -1:, :], **told)))
        # A copy, because a model may scale its logits in place.
        return planted[-1].clone()

    was_training = wrapped.training
    try:
        wrapped.eval()
        replaced = replaced_forward(lm_head, answer_with_known_values)
        # Compiling would take longer than the run, for a shape that does not come again.
        device = next(wrapped.parameters()).device
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eagerly, replaced, same_random_numbers(device):
            logits = find_logits(run_model(wrapped, _first_row(inputs)))
    finally:
        wrapped.train(was_training)
    if are_told or len(planted) != 1 or planted[0].shape != logits.shape:
        return None
    fits: list[tuple[LogitTransform, Tensor]] = []
    for transform in _candidates(model):
        expected = transform(planted[0]).to(logits.dtype)
        if torch.allclose(expected, logits, rtol=1e-5, atol=1e-6):
            fits.append((transform, expected))
    # A scaling by 1 is the identity, and no matter; what differs at all must not be guessed.
    if not fits or not all(torch.equal(expected, fits[0][1]) for _, expected in fits):
        return None
    return fits[0][0]


def _first_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first row of a batch, without padding behind it.

    That may be rounded up to more than a model has positions, where rows are laid end to end.
    """
    row = {k: value[:1] if isinstance(value, Tensor) else value for k, value in inputs.items()}
    mask = row.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.any():
        return row
    end = int(mask[0].nonzero().max()) + 1
    is_per_token = {k: isinstance(v, Tensor) and v.shape == mask.shape for k, v in row.items()}
    return {k: value[:, :end] if is_per_token[k] else value for k, value in row.items()}


def _known_logits(like: Tensor) -> Tensor:
    """Spread values of both signs, whose mean is not 0 so that a model which uses it is noticed."""
    values = torch.linspace(
        -50, 70, like.shape[-1], dtype=widest_float(like.device), device=like.device
    )
    return values.expand_as(like)


def _candidates(model: nn.Module) -> Iterator[LogitTransform]:
    config = find_text_config(model)
    yield LogitTransform()
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale:
            yield LogitTransform(multiplier=scale)
            yield LogitTransform(divisor=scale)
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        cap = getattr(config, name, None)
        if cap:
            yield LogitTransform(softcap=cap)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module instance another forward for a while."""
    # Accelerate and others leave a forward of their own on the instance; it has to come back.
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own
