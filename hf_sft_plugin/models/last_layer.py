"""The last decoder layer, where it can be left out at positions whose prediction is not trained.

Its keys and values are seen by later positions, so they are worked out everywhere. Its queries, the
output projection of its attention and its MLP serve the prediction at their own position alone. So
these modules run at trained positions only, and put zeros elsewhere, which nothing reads.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sft_plugin.batches.fixed_shape import FixedShapeMixin
from hf_sft_plugin.batches.response_batch import ResponseBatch
from hf_sft_plugin.models.adapters import adapter_state
from hf_sft_plugin.models.attention_probe import end_to_end, probe_rows
from hf_sft_plugin.models.float64_run import (
    MODEL_ERRORS,
    TOLERANCE,
    in_float64,
    largest_error,
)
from hf_sft_plugin.models.lm_head import replaced_forward
from hf_sft_plugin.models.model_interface import is_compiled, same_random_numbers

# Children of a decoder layer that work on each position by itself, by their names in transformers.
_PART_NAMES = ("q_proj", "o_proj", "mlp", "feed_forward")
# Of the 19 tokens of the probe: some of each of its rows, not all of any.
_PROBED = (2, 4, 6, 8, 11, 12, 13, 17)


class LastLayer:
    """The last decoder layer of a model, and whether it may run at some positions only.

    Args:
        model: The model, unwrapped from Accelerate.
        problem: Why it may not, where that is known already.
    """

    def __init__(self, model: nn.Module, problem: str | None = None) -> None:
        self._model = model
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._layer = layers[-1] if layers else None
        self._parts = [] if self._layer is None else list(_find_parts(self._layer))
        if not self._parts:
            problem = problem or "no layer with parts of known names was found"
        self._problem = problem
        self._is_proven = False

    @property
    def problem(self) -> str | None:
        """Why it runs everywhere, as far as is known; None where it need not."""
        is_checkpointed = self._layer is not None and self._layer.gradient_checkpointing
        if self._problem is None and is_checkpointed:
            return "gradient checkpointing runs it again"
        return self._problem

    @property
    def summary(self) -> str:
        """One line for the user."""
        problem = self.problem
        return "at trained positions" if problem is None else f"everywhere, because {problem}"

    def prove(self) -> bool:
        """Whether it may run at some positions only; runs a few tokens when first asked."""
        if self.problem is None and not self._is_proven:
            self._problem = find_problem(self._model, self)
            self._is_proven = True
        return self.problem is None

    def train(self) -> None:
        """Sets it to training mode, which a probe of the whole model is not in."""
        assert self._layer is not None, "else there is a problem, and nothing to try"
        self._layer.train()

    @contextmanager
    def running_at(
        self, places: Tensor, num_tokens: int, fill: float = 0.0, are_distinct: bool = True
    ) -> Iterator[list[nn.Module]]:
        """Runs the parts of the layer at some positions only, for a forward pass of one row.

        Args:
            places: `(N,)`, the positions.
            num_tokens: T, tokens of the row.
            fill: What the parts give at other positions.
            are_distinct: Whether no position occurs twice.

        Returns:
            The parts that have run; the list grows as the model runs.
        """
        source, target = (places, places) if are_distinct else _each_once(places, num_tokens)
        num_slots = num_tokens + (not are_distinct)
        calls: list[nn.Module] = []

        def run_at_places(part: nn.Module) -> Callable[..., Tensor]:
            own = part.forward

            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                output: Tensor = own(hidden_states.index_select(1, source), *args, **kwargs)
                calls.append(part)
                everywhere = output.new_full((1, num_slots, *output.shape[2:]), fill)
                everywhere = everywhere.index_copy_(1, target, output)
                return everywhere if are_distinct else everywhere.narrow(1, 0, num_tokens)

            return forward

        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(replaced_forward(part, run_at_places(part)))
            yield calls

    def has_run_once(self, calls: list[nn.Module]) -> bool:
        """Whether each of the parts was called, and none twice."""
        return sorted(map(id, calls)) == sorted(map(id, self._parts))


def _find_parts(module: nn.Module) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if name in _PART_NAMES:
            yield child
        else:
            yield from _find_parts(child)


def _each_once(places: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions in order, and the same with those that come again moved behind the row.

    What is read at a position that was written twice would give its gradient to both.
    """
    ordered = places.sort().values
    comes_again = pad(ordered[1:] == ordered[:-1], (1, 0))
    # The count lives on the device; reading it would wait for the GPU.
    return ordered, ordered.masked_fill(comes_again, num_tokens)


def find_problem(model: nn.Module, last_layer: LastLayer) -> str | None:
    """Why the last layer has to run everywhere; None where it need not.

    A few tokens run with NaN in place of all that would be left out: whatever is computed from it
    is NaN, so finite logits depend on none of it. In float64 they have to be those of a run
    everywhere, too. Random numbers come out as if nothing had run.

    Args:
        model: The model, unwrapped from Accelerate, with the attention of training.
        last_layer: Its last layer.
    """
    was_training = model.training
    try:
        with torch.no_grad(), same_random_numbers(next(model.parameters()).device):
            model.eval()
            # Dropout is only seen while training. That of other layers stays as it is.
            last_layer.train()
            return _run_probe(model, last_layer)
    except MODEL_ERRORS as error:
        return f"a run at a few positions failed ({type(error).__name__}: {error})"
    finally:
        model.train(was_training)


def _run_probe(model: nn.Module, last_layer: LastLayer) -> str | None:
    unwrapped = cast(Any, model)
    device = next(model.parameters()).device
    rows = probe_rows(unwrapped.config.get_text_config().vocab_size, device)
    batch = end_to_end(rows)
    places = torch.tensor(_PROBED, device=device)

    def run_at_places() -> Tensor:
        with last_layer.running_at(places, batch["input_ids"].shape[1], fill=torch.nan) as calls:
            logits: Tensor = model(**batch, use_cache=False).logits[0, places]
        return logits if last_layer.has_run_once(calls) else logits[:0]

    before = _random_states(device)
    outputs = model(**batch, use_cache=False)
    if any(not torch.equal(*states) for states in zip(before, _random_states(device), strict=True)):
        return "it draws random numbers, as for dropout"
    if getattr(outputs, "aux_loss", None) is not None:
        return "the loss of its router counts every token"
    found = run_at_places()
    if not len(found):
        return "the model does not run each of its parts once"
    if not found.isfinite().all():
        return "other positions see more of it than keys and values"
    with in_float64(model):
        truth = model(**batch, use_cache=False).logits[0]
        error = largest_error(run_at_places(), truth[places])
    if not error <= TOLERANCE:
        return f"logits then differ by {error:.1e}, and {TOLERANCE:.1e} is rounding"
    return None


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


class LastLayerMixin(FixedShapeMixin):
    """Lets a trainer run the last layer at trained positions only.

    Attributes:
        trained_positions_only: `auto` or `off`; see `MaskedSFTConfig`.
    """

    trained_positions_only: str = "auto"
    _last_layer: LastLayer | None = None
    _last_layer_of: tuple[Any, ...] | None = None

    @property
    def last_layer_summary(self) -> str | None:
        """Where the last layer runs, in a few words; None where that is not known yet."""
        if self._last_layer is not None:
            return self._last_layer.summary
        problem = self._known_problem(self.model_wrapped)
        return problem and f"everywhere, because {problem}"

    @contextmanager
    def run_last_layer(self, model: nn.Module, batch: ResponseBatch | None) -> Iterator[None]:
        """Runs the last layer as little as it may, for a forward pass.

        Args:
            model: The model, unwrapped from Accelerate.
            batch: As `without_padding` gave it; None where rows are padded.
        """
        if batch is None:
            yield
            return
        asked = model, adapter_state(model), self.trained_positions_only
        if self._last_layer_of != asked:
            self._last_layer = LastLayer(model, self._known_problem(model))
            self._last_layer_of = asked
        assert self._last_layer is not None, "it comes with the model"
        # Experts, for one, cannot be relied on to take no token at all.
        if not len(batch.positions) or not self._last_layer.prove():
            yield
            return
        places, num_tokens = batch.positions, batch.model_inputs["input_ids"].shape[1]
        if batch.places is not None:
            places = batch.places.index_select(0, places)
        with self._last_layer.running_at(places, num_tokens, are_distinct=batch.places is None):
            yield

    def _known_problem(self, model: nn.Module) -> str | None:
        if self.trained_positions_only == "off":
            return "trained_positions_only is 'off'"
        if self.length_multiple is not None:
            return "pad_to_multiple_of asks for one shape"
        engine = self.accelerator.distributed_type
        if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return f"{engine.value} looks after its weights"
        if is_compiled(model) or is_compiled(self.model_wrapped):
            return "the model is compiled"
        return None
