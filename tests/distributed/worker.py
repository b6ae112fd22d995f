"""What every process of a distributed test runs.

The folder holds a model, a tokenizer and the datasets `train` and `eval`. For each of the settings
a trainer takes its steps and evaluates.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer


class GradientKeeper(TrainerCallback):
    """Keeps the gradient of the last optimizer step."""

    gradient: torch.Tensor

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten() for p in kwargs["model"].parameters()]
        self.gradient = torch.cat(grads).double()


class CollectiveCounter(TrainerCallback):
    """Counts what processes ask each other during a training, gradients left aside."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier")

    def __init__(self) -> None:
        self.count = 0
        self.own = {name: getattr(torch.distributed, name) for name in self.NAMES}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for name, own in self.own.items():
            setattr(torch.distributed, name, partial(self._call, own))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for name, own in self.own.items():
            setattr(torch.distributed, name, own)

    def _call(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return own(*args, **kwargs)


def run(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    keeper, collectives = GradientKeeper(), CollectiveCounter()
    trainer = MaskedSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64),
        MaskedSFTConfig(
            output_dir=str(folder / "run"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_grad_norm=0.0,
            **settings,
        ),
        train_dataset=load_from_disk(folder / "train"),
        eval_dataset=load_from_disk(folder / "eval"),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[keeper, collectives],
    )
    trainer.train()
    return {
        "num_processes": trainer.accelerator.num_processes,
        "log": trainer.state.log_history[0],
        "metrics": trainer.evaluate(),
        "num_collectives": collectives.count,
        "gradient": keeper.gradient.tolist(),
        "responses": trainer.responses,
    }


def run_all(folder: Path, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs all settings, one after the other."""
    return [run(folder, each) for each in settings]
