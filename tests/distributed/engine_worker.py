"""What every process of a test of an engine runs: optimizer steps under it, one case after another.

A case is a dict: `engine`, `model` (fields of its config), `settings` (of the trainer), `rows`.
"""

import os
import tempfile
from collections import UserList
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback

from hf_sft_plugin import MaskedLossMixin, MaskedSFTConfig

FIELDS = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def build_model(fields: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    """The same model on every process, and where the reference is worked out."""
    fields = {**FIELDS, **fields}
    lora = fields.pop("lora", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(dtype)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **lora)).to(dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    return model


class Rows(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows that begin with the tokens of a prompt, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    shape = len(rows), width
    ids = torch.zeros(shape, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full(shape, -100)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        mask[number, :length] = 1
        labels[number, row["num_prompt"] : length] = ids[number, row["num_prompt"] : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Watch(TrainerCallback):
    """Keeps the gradient of every optimizer step, and counts forward passes."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor | None]] = []
        self.num_forward_passes = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._count)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if PartialState().distributed_type != DistributedType.DEEPSPEED:
            self.keep(kwargs["model"], lambda p: p.grad)

    def keep(self, model: nn.Module, get: Callable[[Tensor], Tensor | None]) -> None:
        named = model.named_parameters()
        self.gradients.append({_bare(n): _whole(get(p)) for n, p in named if p.requires_grad})

    def _count(self, *_: Any) -> None:
        self.num_forward_passes += torch.is_grad_enabled()


class EngineTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own, whose gradients are watched."""

    def __init__(self, *args: Any, watch: Watch, **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[watch], **kwargs)
        self.watch = watch

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:
            # Its step is taken, and the gradient gone, before callbacks hear of it.
            engine, get = prepared[0], import_module("deepspeed.utils").safe_get_full_grad
            step = engine.step
            engine.step = lambda: (self.watch.keep(engine.module, get), step())
        return prepared


def _bare(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def _whole(grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).double().clone()


# What `accelerate launch` puts into the environment.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


@contextmanager
def engine(name: str) -> Iterator[Any]:
    """The environment of an engine, and what has Accelerate choose it on a CPU too."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    before = dict(os.environ)
    if name == "fsdp2":
        os.environ |= FSDP2
    if name.startswith("zero"):
        os.environ |= {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": name[-1]}

    def choose() -> None:
        if name == "fsdp2":
            # All that follows from it is what runs on GPUs.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    try:
        yield choose
    finally:
        os.environ.clear()
        os.environ |= before


def train(case: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one case.

    Returns:
        Gradients of all steps, trained weights, log lines, and what ran how often.
    """
    watch = Watch()
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, **case.get("settings", {})}
    own = {n: settings.pop(n) for n in ("fused_head", "max_tokens_per_microbatch") if n in settings}
    with tempfile.TemporaryDirectory() as folder, engine(case["engine"]) as choose:
        config = MaskedSFTConfig(
            output_dir=folder,
            # With it, Accelerate does not choose DeepSpeed.
            use_cpu=not case["engine"].startswith("zero"),
            ddp_backend="gloo",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            **settings,
        )
        choose()
        trainer = EngineTrainer(
            build_model(case.get("model", {}), case.get("dtype", torch.float64)),
            config,
            data_collator=collate,
            train_dataset=Rows(case["rows"]),
            watch=watch,
        )
        for name, value in own.items():
            setattr(trainer, name, value)
        trainer.train()
        return {
            "engine": trainer.accelerator.distributed_type.value,
            "wrapper": type(trainer.model_wrapped).__name__,
            "gradients": watch.gradients,
            "logs": trainer.state.log_history[: settings["max_steps"]],
            "num_forward_passes": watch.num_forward_passes,
            "speed": trainer.describe_speed(),
        }


def train_all(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs all cases, one after the other, in one process group."""
    return [train(case) for case in cases]
