"""What every process of a test of resuming runs.

The folder holds a model and a tokenizer.
"""

import gc
import os
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.batches.microbatches import Microbatches

TIMES = ("runtime", "samples_per_second", "steps_per_second")


def make_rows(num_rows: int = 16) -> Dataset:
    """Rows of 4 to 15 tokens; each three begin with the same prompt."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(num_rows):
        prompt = [10 + number // 3] * 3
        response = torch.randint(3, 300, (1 + 5 * number % 12,), generator=generator).tolist()
        mask = [0] * len(prompt) + [1] * len(response)
        rows.append({"input_ids": prompt + response, "response_mask": mask})
    return Dataset.from_list(rows)


def make_stream(num_shards: int, num_rows: int) -> Any:
    return make_rows(num_rows).to_iterable_dataset(num_shards).shuffle(seed=1, buffer_size=3)


class Recorder(MaskedSFTTrainer):
    """Keeps the rows of every optimizer step, and dies where it is told to."""

    dies_in: tuple[str, int, int] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: dict[int, list[list[int]]] = {}

    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        self._die("get_batch_samples")
        parts = [p for b in batches for p in (b if isinstance(b, Microbatches) else [b])]
        if parts:
            self.steps[self.state.global_step + 1] = [
                ids[mask == 1].tolist()
                for part in parts
                for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
            ]
        return batches, count

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._die("_save_optimizer_and_scheduler")
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._die("_save_rng_state")
        super()._save_rng_state(output_dir)

    def _die(self, where: str) -> None:
        if self.dies_in == (where, self.args.process_index, self.state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: Path,
    name: str,
    resume: Any = None,
    num_shards: int | None = None,
    num_rows: int = 16,
    dropout: float = 0.0,
    dies_in: tuple[str, int, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    own: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 4}
    own |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer = Recorder(
        AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float64, attention_dropout=dropout
        ),
        MaskedSFTConfig(
            output_dir=str(folder / name),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **{**own, **settings},
        ),
        train_dataset=make_rows() if num_shards is None else make_stream(num_shards, num_rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    trainer.dies_in = dies_in
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: weight.numpy() for name, weight in trainer.model.state_dict().items()}
    states = trainer.optimizer.state_dict()["state"]
    return {
        "steps": trainer.steps,
        "weights": weights,
        "states": {
            (number, name): torch.as_tensor(value).numpy()
            for number, state in states.items()
            for name, value in state.items()
        },
        "scheduler": trainer.lr_scheduler.state_dict(),
        "logs": [
            {key: value for key, value in record.items() if not key.endswith(TIMES)}
            for record in trainer.state.log_history
        ],
    }


def run_all(folder: Path, runs: list[dict[str, Any]]) -> list[Any]:
    """Runs one after the other; gives what is wrong with those that are refused."""
    # Every training looks for garbage; what was made by imports is none.
    gc.freeze()
    found: list[Any] = []
    for each in runs:
        try:
            found.append(run(folder, **each))
        except ValueError as error:
            found.append(str(error))
    return found
