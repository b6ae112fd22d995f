"""The first optimizer step of a run, which can be run again and again without consequences."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.training_args import OptimizerNames

from hf_sft_plugin.batches.microbatches import Microbatches, in_one_list, remember_tensors
from hf_sft_plugin.loss.totals import WindowedTotals
from hf_sft_plugin.models.lm_head import ResponseResult
from hf_sft_plugin.models.model_interface import same_random_numbers
from hf_sft_plugin.verification.checks import working_dtype
from hf_sft_plugin.verification.run_state import (
    OptimizerState,
    local_part,
    on_host,
    without_dropout,
)

# These optimizers change weights in the backward pass.
_OWN_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)


class FirstStep:
    """The rows of an optimizer step, and the ways in which it is run.

    Args:
        trainer: A `Trainer` with `MaskedLossMixin` that is about to train.
        batches: As `get_batch_samples` made them of these rows; they are copied.
        num_items: The global divisor that came with them.

    Attributes:
        model: As Accelerate prepared it.
        unwrapped: The same without what Accelerate put around it.
        trained: The parameters that are trained, by name.
        batches: The copies.
        num_forward: Forward passes so far.
        num_backward: Forward and backward passes so far.
        seconds: What the first gradient took; None before it.
        weights: The trained weights as they are outside, on the host, while `undone` lasts.
    """

    def __init__(self, trainer: Any, batches: Sequence[Any], num_items: Any) -> None:
        self.trainer = trainer
        self.model: nn.Module = trainer.model_wrapped
        self.unwrapped: Any = trainer.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        modules: list[Any] = [m for m in self.unwrapped.modules() if isinstance(m, FSDPModule)]
        self._sharded_modules = modules
        self._gathered_modules = [
            m for m in modules if any(not isinstance(p, DTensor) for p in m.parameters())
        ]
        # What was gathered for a forward pass hides the parameters that are trained.
        self._gather([])
        named = self.unwrapped.named_parameters()
        self.trained = {name: p for name, p in named if p.requires_grad}
        self.batches = [_copy(batch) for batch in batches]
        remember_tensors(self.batches)
        self.num_items = num_items
        self.dtype = working_dtype(trainer.accelerator, self.unwrapped)
        self.num_forward = self.num_backward = 0
        self.seconds: float | None = None
        self.weights: dict[str, Tensor] = {}

    @property
    def microbatches(self) -> list[Any]:
        """What runs at a time."""
        return in_one_list(self.batches)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold different parts of a tensor."""
        engine = self.trainer.accelerator.distributed_type
        is_tensor_of_all = any(isinstance(p, DTensor) for p in self.trained.values())
        return engine == DistributedType.FSDP or is_tensor_of_all

    @property
    def backward_problem(self) -> str | None:
        """Why no backward pass can be tried; None where it can."""
        if self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return "DeepSpeed counts the backward passes of a step itself"
        name = OptimizerNames(self.trainer.args.optim).value
        if name in _OWN_BACKWARD or name.endswith("layerwise"):
            return f"the optimizer {name} changes weights in the backward pass"
        return None

    def forward(self, microbatch: Mapping[str, Any]) -> ResponseResult:
        """What training works out for a micro-batch, without gradients."""
        self.num_forward += 1
        # Compiling for passes without gradients would take longer than they do; `gradients` runs
        # what training has compiled.
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eagerly, self.trainer.compute_loss_context_manager():
            inputs = self.trainer._prepare_inputs(dict(microbatch))
            result: ResponseResult = self.trainer.probe_loss(self.model, inputs)[0]
        return result

    def gradients(self, batches: Sequence[Any]) -> dict[str, Tensor | None]:
        """Runs batches as one optimizer step does, up to its gradient, which it takes away."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        trainer._num_microbatches = len(in_one_list(batches))
        trainer.current_gradient_accumulation_steps = len(batches)
        self.num_backward += trainer._num_microbatches
        start = time.perf_counter()
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            accelerator.gradient_state._set_sync_gradients(is_last)
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                # A loss may take labels out of its batch, so it gets one of its own.
                trainer.training_step(self.model, _copy(batch, shares=True), self.num_items)
        found: dict[str, Tensor | None] = {}
        for name, parameter in self.trained.items():
            grad = parameter.grad
            # Engines may keep gradients in buffers that they use again.
            found[name] = None if grad is None else grad.detach().clone()
            parameter.grad = None
        self.seconds = self.seconds or time.perf_counter() - start
        return found

    def random_state(self) -> list[Tensor]:
        """Where the random numbers of torch are."""
        device = self.trainer.args.device
        states = [torch.get_rng_state()]
        if device.type != "cpu":
            states.append(torch.get_device_module(device).get_rng_state())
        return states

    def _gather(self, gathered: Sequence[Any]) -> None:
        """Has FSDP hold the weights of these modules whole, and those of others in parts."""
        for module in self._sharded_modules:
            module.reshard()
        for module in gathered:
            module.unshard()

    def on_processes(self, number: int) -> list[int]:
        """A number as every process has it."""
        accelerator = self.trainer.accelerator
        numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
        return [int(each) for each in numbers]

    def sum_of_shards(self, sums: Tensor) -> Tensor:
        """Sums over all parts of tensors, of sums over those of this process."""
        if not self.is_sharded:
            return sums
        on_device = sums.to(self.trainer.args.device)
        summed: Tensor = self.trainer.accelerator.reduce(on_device, reduction="sum")
        return summed.cpu()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Puts everything back at the end that running the step has changed.

        That is weights, buffers, gradients, optimizer, loss scaler, random numbers, what the
        trainer has counted, and the dropout that is left out meanwhile.
        """
        trainer = self.trainer
        attributes = dict(vars(trainer))
        modes = {module: module.training for module in self.model.modules()}
        grads = {p: p.grad for p in self.trained.values()}
        buffers = [(b, local_part(b).clone()) for b in self.unwrapped.buffers()]
        scaler = trainer.accelerator.scaler
        scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
        is_synced = trainer.accelerator.sync_gradients
        optimizer = None
        if self.backward_problem is None and trainer.optimizer is not None:
            optimizer = OptimizerState(trainer.optimizer)
            self.weights = {name: on_host(p) for name, p in self.trained.items()}
        trainer._train_totals = WindowedTotals()
        for parameter in grads:
            parameter.grad = None
        # Models are loaded in evaluation mode.
        self.model.train()
        try:
            with same_random_numbers(self.trainer.args.device), without_dropout(self.model):
                yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    local_part(self.trained[name]).copy_(weight)
                for buffer, value in buffers:
                    local_part(buffer).copy_(value)
            self.weights = {}
            self._gather(self._gathered_modules)
            if optimizer is not None:
                optimizer.put_back()
            if scaler is not None:
                scaler.load_state_dict(scale)
            for parameter, grad in grads.items():
                parameter.grad = grad
            for module, mode in modes.items():
                module.training = mode
            trainer.accelerator.gradient_state._set_sync_gradients(is_synced)
            vars(trainer).clear()
            vars(trainer).update(attributes)


def _copy(batch: Any, shares: bool = False) -> Any:
    """A batch of its own, with the same tensors or with copies of them."""
    if isinstance(batch, Microbatches):
        return Microbatches([_copy(part, shares) for part in batch])
    copied = copy.copy(batch)
    if not shares:
        for name, value in batch.items():
            copied[name] = value.clone() if isinstance(value, Tensor) else value
    return copied
