"""The training loop never waits for a number: law 10.

On a CPU nothing has to be waited for. What would wait on a GPU is an operation whose result the
host has to know: a number that is read, or a shape that depends on values.
"""

import traceback
from collections import Counter, UserList
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedLossMixin, MaskedSFTConfig
from hf_sft_plugin.batches.data_loaders import CollatorWithFacts

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Methods that copy to the host without an operation that a CPU would notice.
COPYING = ("cpu", "tolist")
NUM_STEPS, NUM_MICROBATCHES = 2, 4


class Waits(TorchDispatchMode):
    """Counts what would wait, by where it was called from: the innermost file not of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        frame = next(f for f in reversed(frames) if f.filename != __file__)
        self.places[f"{Path(frame.filename).name}, {frame.name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = args[1] if name in INDEXING else ()
        if name in WAITING or any(i is not None and i.dtype == torch.bool for i in masks):
            self.note()
        return func(*args, **(kwargs or {}))


class FromStepToStep(TrainerCallback):
    """Does something from the beginning of the third step to the end of the fourth."""

    def __init__(self, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        self.begin, self.end = begin, end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 + NUM_STEPS:
            self.end()


class Rows(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""


def make_rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(64):
        ids = torch.randint(3, 300, (5 + number % 7,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


@pytest.fixture
def count_waits(
    tokenizer: Any, model_factory: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> Callable[..., Counter[str]]:
    def count(cls: type[Trainer], **settings: Any) -> Counter[str]:
        is_ours = cls is OwnTrainer
        settings = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_steps": 2 + NUM_STEPS,
            "logging_steps": 100,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": NUM_MICROBATCHES,
            **settings,
        }
        collator = DataCollatorForPromptResponse if is_ours else DataCollatorForSeq2Seq
        trainer = cls(
            model_factory("llama"),
            (MaskedSFTConfig if is_ours else TrainingArguments)(**settings),
            data_collator=collator(tokenizer),
            train_dataset=Rows(make_rows()),
        )
        for name in ("padding_free", "fused_head", "shared_prompts", "max_tokens_per_microbatch"):
            if is_ours:
                setattr(trainer, name, getattr(trainer.args, name))
        waits = Waits()
        is_counting = [False]

        def begin() -> None:
            is_counting[0] = True
            waits.__enter__()

        def end() -> None:
            waits.__exit__(None, None, None)
            is_counting[0] = False

        def watch(owner: Any, name: str, is_copy: bool) -> None:
            own = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                if is_copy and is_counting[0]:
                    waits.note()
                was_counting, is_counting[0] = is_counting[0], False
                try:
                    return own(*args, **kwargs)
                finally:
                    is_counting[0] = was_counting

            monkeypatch.setattr(owner, name, call)

        for name in COPYING:
            watch(torch.Tensor, name, is_copy=True)
        # Batches are made on the host.
        watch(CollatorWithFacts, "__call__", is_copy=False)
        trainer.add_callback(FromStepToStep(begin, end))
        trainer.train()
        monkeypatch.undo()
        return waits.places

    return count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True},
        {"fused_head": "off"},
        {"shared_prompts": "off"},
        {"max_tokens_per_microbatch": 30},
        {"loss_normalization": "example", "gradient_checkpointing": True},
        {"z_loss_coef": 1e-4, "entropy_coef": 0.1, "label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_nothing_waits_between_two_logs(
    settings: dict[str, Any], count_waits: Callable[..., Counter[str]]
) -> None:
    found = count_waits(OwnTrainer, **settings)
    # Asks about a tensor on a CPU, and about no other.
    del found["linear_head.py, backward"]
    assert not found


def test_padded_rows_wait_where_the_mask_of_transformers_does_and_the_trainers_filter_is_off(
    count_waits: Callable[..., Counter[str]],
) -> None:
    """Without padding there is no mask; the filter of the plain Trainer is the other wait."""
    num_microbatches = NUM_STEPS * NUM_MICROBATCHES
    mask = {"masking_utils.py, _ignore_causal_mask_sdpa": 2 * num_microbatches}
    plain = count_waits(Trainer)
    assert plain == {**mask, "trainer.py, _run_epoch": 2 * num_microbatches}
    as_they_come = {"padding_free": "off", "max_tokens_per_microbatch": None}
    ours = count_waits(OwnTrainer, **as_they_come, logging_nan_inf_filter=True)
    del ours["linear_head.py, backward"]
    assert ours == mask


def test_a_batch_that_came_without_its_positions_is_what_waits(
    count_waits: Callable[..., Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter sees what it is there for."""
    monkeypatch.setattr(CollatorWithFacts, "__call__", lambda self, rows: self.collate(rows))
    found = count_waits(OwnTrainer)
    expected = ("find_layout", "find_trained_positions")
    assert found.keys() >= {f"host_facts.py, {name}" for name in expected}


class NanNow(TrainerCallback):
    """Spoils the embedding of one token before a step."""

    def __init__(self, step: int, token: int) -> None:
        self.step, self.token = step, token

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            weight = kwargs["model"].get_input_embeddings().weight
            self.own = weight.data[self.token].clone()
            weight.data[self.token] = torch.nan

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model = kwargs["model"]
            model.get_input_embeddings().weight.data[self.token] = self.own
            model.zero_grad()


@pytest.mark.parametrize("padding_free", ["on", "off"])
def test_losses_that_are_not_finite_are_counted_once_per_log_and_left_out_of_it(
    padding_free: str,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    """Attention multiplies what it masks by 0, so a row that reads the token is lost as a whole."""
    spoilt = {"input_ids": [7, 8, 299, 9, 10, 11], "labels": [-100, 8, 299, 9, 10, 11]}
    others = [row for row in make_rows() if 299 not in row["input_ids"]][:6]
    rows = [*others, spoilt, spoilt]

    def train(rows: list[dict[str, Any]], *callbacks: TrainerCallback) -> list[dict[str, float]]:
        trainer = OwnTrainer(
            model_factory("llama", tie_word_embeddings=False).double(),
            make_config(
                max_steps=2,
                logging_steps=1,
                learning_rate=0.0,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
            ),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Rows(rows),
            callbacks=[*callbacks],
        )
        trainer.padding_free = padding_free
        trainer.train()
        return trainer.state.log_history

    first, second, summary = train(rows, NanNow(step=0, token=299))
    assert first["num_nonfinite_losses"] == 2 * 5
    assert "num_nonfinite_losses" not in second
    assert summary["train_num_nonfinite_losses"] == 2 * 5
    untrained = {**spoilt, "labels": [-100] * 6}
    expected = train([*others, untrained, untrained])[0]
    for key in ("loss", "token_entropy", "token_accuracy"):
        assert first[key] == pytest.approx(expected[key], rel=1e-12)
    plain = train(rows)
    for key in ("num_response_tokens", "num_tokens"):
        assert first[key] == plain[0][key]
    assert second["loss"] == pytest.approx(plain[1]["loss"], rel=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_microbatch": 30}], ids=str)
def test_nothing_waits_for_a_gpu(
    settings: dict[str, Any], tokenizer: Any, model_factory: Callable[..., Any], tmp_path: Path
) -> None:
    args = MaskedSFTConfig(
        output_dir=str(tmp_path),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=True,
        max_steps=2 + NUM_STEPS,
        logging_steps=100,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=NUM_MICROBATCHES,
        **settings,
    )
    trainer = OwnTrainer(
        model_factory("llama"),
        args,
        data_collator=DataCollatorForPromptResponse(tokenizer),
        train_dataset=Rows(make_rows()),
    )
    trainer.max_tokens_per_microbatch = args.max_tokens_per_microbatch
    set_mode = torch.cuda.set_sync_debug_mode
    try:
        trainer.add_callback(FromStepToStep(lambda: set_mode("error"), lambda: set_mode("default")))
        trainer.train()
    finally:
        set_mode("default")
    assert trainer.state.global_step == 2 + NUM_STEPS
