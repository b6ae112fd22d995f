"""What every process of a test of an engine runs: optimizer steps under it, one case after another.

A case is a dict: `engine`, `model` (fields of its config), `settings` (of the trainer), `rows`.
"""

import os
import tempfile
from collections import UserList
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

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


LEARNING_RATE = 0.5


def build_model(fields: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    """The same model on every process, and where the reference is worked out."""
    fields = {**FIELDS, **fields}
    lora = fields.pop("lora", None)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    if lora is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **lora))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


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
        self.are_sharded: list[bool] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._count)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if PartialState().distributed_type != DistributedType.DEEPSPEED:
            self.keep(kwargs["model"], lambda p: p.grad)

    def keep(self, model: nn.Module, get: Callable[[Tensor], Tensor | None]) -> None:
        named = list(model.named_parameters())
        both = [t for _, p in named for t in (p, p.grad) if t is not None]
        self.are_sharded.append(all(isinstance(t, DTensor) for t in both))
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


def launch_environment(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` puts into the environment of a script."""
    parser = launch_command_parser()
    path = Path(__file__).parents[2] / "recipes" / "accelerate" / f"{config}.yaml"
    args = parser.parse_args(["--config_file", str(path), "--main_process_port", "0", "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    prepare = prepare_deepspeed_cmd_env if args.use_deepspeed else prepare_multi_gpu_env
    made = prepare(args)
    environment = made[1] if args.use_deepspeed else made
    return {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}


@contextmanager
def engine(name: str, precision: str) -> Iterator[Callable[[], None]]:
    """The environment of an engine; calling what it gives has Accelerate choose it on a CPU too."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    unset_hf_deepspeed_config()
    before = dict(os.environ)
    os.environ |= {**launch_environment(name), "ACCELERATE_MIXED_PRECISION": precision}
    os.environ["DS_ACCELERATOR"] = "cpu"

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
    name, precision = case["engine"], case.get("precision", "no")
    with tempfile.TemporaryDirectory() as folder, engine(name, precision) as choose:
        # Before DeepSpeed is chosen, which takes weights apart as they are made.
        model = build_model(case["model"], case.get("dtype", torch.float64))
        config = MaskedSFTConfig(
            output_dir=folder,
            # With it, Accelerate does not choose DeepSpeed.
            use_cpu=not name.startswith("zero"),
            ddp_backend="gloo",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=case.get("learning_rate", LEARNING_RATE),
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            **settings,
        )
        choose()
        trainer = EngineTrainer(
            model,
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
            "are_sharded": watch.are_sharded,
            "num_forward_passes": watch.num_forward_passes,
            "speed": trainer.describe_speed(),
        }


def train_all(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs all cases, one after the other, in one process group."""
    return [train(case) for case in cases]
