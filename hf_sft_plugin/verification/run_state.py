"""What a run changes besides its weights, and how it is put back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd

from hf_sft_plugin.models.model_interface import same_random_numbers

# What is in the names of shares and sizes that make a model random, as in `attention_dropout`.
_RANDOM = ("drop", "jitter", "noise")


class OptimizerState:
    """What an optimizer holds at some time, on the host.

    Args:
        optimizer: As Accelerate prepared it, or not.
    """

    def __init__(self, optimizer: Any) -> None:
        # Accelerate's wrapper carries the optimizer it wraps.
        self._wrappers = [optimizer]
        while hasattr(self._wrappers[-1], "optimizer"):
            self._wrappers.append(self._wrappers[-1].optimizer)
        self._optimizer: Any = self._wrappers[-1]
        self._attributes = [dict(vars(each)) for each in self._wrappers]
        self._groups = [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in self._optimizer.param_groups
        ]
        self._states = {
            parameter: {
                name: on_host(value) if isinstance(value, Tensor) else copy.deepcopy(value)
                for name, value in state.items()
            }
            for parameter, state in self._optimizer.state.items()
        }

    def put_back(self) -> None:
        """Gives the optimizer what it held."""
        for each, attributes in zip(self._wrappers, self._attributes, strict=True):
            vars(each).clear()
            vars(each).update(attributes)
        for group, own in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in group.keys() - own.keys() - {"params"}:
                del group[name]
            group.update(own)
        state = self._optimizer.state
        for parameter in list(state):
            if parameter not in self._states:
                del state[parameter]
                continue
            known = self._states[parameter]
            for name in state[parameter].keys() - known.keys():
                del state[parameter][name]
            for name, value in known.items():
                if isinstance(value, Tensor):
                    local_part(state[parameter][name]).copy_(value)
                else:
                    state[parameter][name] = value


@contextmanager
def training_undone(trainer: Any) -> Iterator[None]:
    """Lets a training begin, without callbacks, and puts everything back that this changes.

    Only what Accelerate and the Trainer put around the model stays, as between two trainings.

    Args:
        trainer: Any `Trainer` that is not training.
    """
    attributes, handler = dict(vars(trainer)), trainer.callback_handler
    of_handler = dict(vars(handler))
    is_evaluated = trainer.args.eval_on_start
    gradient_state = trainer.accelerator.gradient_state
    loaders = list(gradient_state.dataloader_references)
    optimizer = None if trainer.optimizer is None else OptimizerState(trainer.optimizer)
    handler.callbacks = []
    trainer.args.eval_on_start = False
    try:
        with same_random_numbers(trainer.args.device):
            yield
    finally:
        if optimizer is not None:
            optimizer.put_back()
        gradient_state.dataloader_references = loaders
        trainer.args.eval_on_start = is_evaluated
        vars(handler).clear()
        vars(handler).update(of_handler)
        for module in trainer.model.modules():
            # The next optimizer is made of what it finds.
            if isinstance(module, FSDPModule):
                module.reshard()
        around = {name: getattr(trainer, name) for name in ("model", "model_wrapped")}
        vars(trainer).clear()
        vars(trainer).update({**attributes, **around})


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_host(tensor: Tensor) -> Tensor:
    """A copy of the part of a tensor that this process holds, in the memory of the host."""
    return local_part(tensor.detach()).to("cpu", copy=True)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Takes the randomness out of a model that stays in training mode."""
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name, value in vars(module).items():
            is_share = name == "p" and isinstance(module, _DropoutNd)
            is_random = is_share or any(word in name for word in _RANDOM)
            if is_random and isinstance(value, float) and value:
                changed.append((module, name, value))
    for module, name, _ in changed:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
