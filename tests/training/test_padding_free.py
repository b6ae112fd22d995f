"""Training and evaluation without padding, against the same with padding."""

from collections import UserList
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    LossNormalization,
    MaskedLossMixin,
    MaskedSFTConfig,
)
from hf_sft_plugin.batches.host_facts import facts_of

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
# Rows are longer than the windows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {**EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 1.0},
    "gpt_oss": {**EXPERTS, "sliding_window": 8},
    "gpt2": {"n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
}
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-6)]
Make = Callable[..., Any]


def make_rows() -> list[dict[str, Any]]:
    """Twelve rows of 3 to 44 tokens from three sources, one of them without a response."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for number in range(12):
        num_prompt, num_response = 2 + number % 5, 1 + (number * 17) % 40
        length = num_prompt + num_response
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        mask = [0] * num_prompt + [int(number != 4)] * num_response
        rows.append({"input_ids": ids, "response_mask": mask, "source": f"s{number % 3}"})
    return rows


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.by_name = {name: p.grad.double() for name, p in named if p.grad is not None}


class Rows(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own: it keeps no records, which would take most of the time here."""


class Run:
    """One optimizer step and one evaluation."""

    def __init__(self, model: Any, tokenizer: Any, args: MaskedSFTConfig) -> None:
        gradients = Gradients()
        torch.manual_seed(7)
        self.trainer = OwnTrainer(
            model,
            args,
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Rows(make_rows()),
            eval_dataset=Dataset.from_list(make_rows()),
            callbacks=[gradients],
        )
        self.trainer.padding_free = args.padding_free
        self.trainer.fused_head = args.fused_head
        self.trainer.loss_normalization = LossNormalization(args.loss_normalization)
        self.trainer.normalize_constant = args.normalize_constant or 1.0
        self.trainer.train()
        self.gradients = gradients.by_name
        self.log = dict(self.trainer.state.log_history[0])
        evaluated = self.trainer.evaluate()
        speed = ("runtime", "per_second")
        self.evaluation = {k: v for k, v in evaluated.items() if not k.endswith(speed)}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_equal_runs(found: Run, expected: Run, bound: float) -> None:
    for ours, theirs in ((found.log, expected.log), (found.evaluation, expected.evaluation)):
        # Routers work in float32, whatever the dtype of the model.
        bounds = {name: max(bound, 1e-6) if "aux_loss" in name else bound for name in theirs}
        assert ours == {
            name: pytest.approx(value, rel=bounds[name], abs=bounds[name])
            for name, value in theirs.items()
        }
    assert found.gradients.keys() == expected.gradients.keys()
    is_gemma = "gemma" in expected.trainer.model.config.model_type
    # Gemma sums the gradients of its norms in float32, whatever the dtype of the model.
    norms = [name for name in expected.gradients if is_gemma and "norm" in name]
    others = [name for name in expected.gradients if name not in norms]
    for names, limit in ((others, bound), (norms, 1e-6)):
        if names:
            ours, theirs = (
                torch.cat([run.gradients[name].flatten() for name in names])
                for run in (found, expected)
            )
            assert relative(ours, theirs) < limit


@pytest.fixture
def run(model_factory: Make, tokenizer: Any, make_config: Make) -> Callable[..., Run]:
    def train(
        model_type: str,
        padding_free: str,
        dtype: torch.dtype = torch.float32,
        split: tuple[int, int] = (4, 3),
        adapter: LoraConfig | None = None,
        **settings: Any,
    ) -> Run:
        args = make_config(
            per_device_train_batch_size=split[0],
            gradient_accumulation_steps=split[1],
            per_device_eval_batch_size=5,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            padding_free=padding_free,
            **settings,
        )
        model = model_factory(model_type, **FAMILIES[model_type]).to(dtype)
        if adapter is not None:
            torch.manual_seed(5)
            model = get_peft_model(model, adapter)
        return Run(model, tokenizer, args)

    return train


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
def test_gradient_loss_and_metrics_are_those_of_padded_rows(
    model_type: str, dtype: torch.dtype, bound: float, run: Callable[..., Run]
) -> None:
    assert_equal_runs(run(model_type, "on", dtype), run(model_type, "off", dtype), bound)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("with_adapter", [False, True], ids=["full", "LoRA"])
def test_gradient_checkpointing_and_adapters_change_nothing(
    model_type: str, use_reentrant: bool, with_adapter: bool, run: Callable[..., Run]
) -> None:
    adapter = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    options = {
        "dtype": torch.float64,
        "adapter": adapter if with_adapter else None,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    assert_equal_runs(run(model_type, "on", **options), run(model_type, "off", **options), 1e-12)


@pytest.mark.parametrize("normalization", ["example", "constant"])
@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_every_normalization_and_both_heads_take_rows_without_padding(
    normalization: str, fused_head: str, run: Callable[..., Run]
) -> None:
    options = {
        "dtype": torch.float64,
        "loss_normalization": normalization,
        "normalize_constant": 50.0 if normalization == "constant" else None,
        "fused_head": fused_head,
    }
    assert_equal_runs(run("qwen3", "on", **options), run("qwen3", "off", **options), 1e-12)


def test_activations_may_wait_elsewhere_for_the_backward_pass(run: Callable[..., Run]) -> None:
    kept = run("qwen3", "on", dtype=torch.float64)
    with torch.autograd.graph.save_on_cpu():
        assert_equal_runs(run("qwen3", "on", dtype=torch.float64), kept, 1e-12)


@pytest.fixture
def make_trainer(model: Any, tokenizer: Any, make_config: Make) -> Callable[..., OwnTrainer]:
    def make(padding_free: str = "auto", cls: type[OwnTrainer] = OwnTrainer, **given: Any) -> Any:
        settings = given.pop("settings", {})
        arguments = {
            "model": model,
            "args": make_config(per_device_train_batch_size=4, **settings),
            "data_collator": DataCollatorForPromptResponse(tokenizer),
            "train_dataset": Rows(make_rows()),
            "eval_dataset": Rows(make_rows()),
            **given,
        }
        trainer = cls(**arguments)
        trainer.padding_free = padding_free
        return trainer

    return make


class Seen:
    """The shapes of what a model reads, and with which attention."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.masks: list[Any] = []
        self.lengths: list[Any] = []
        self.implementations: list[str] = []
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: Any, args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.masks.append(kwargs.get("attention_mask"))
        self.lengths.append(kwargs.get("document_lengths"))
        self.implementations.append(model.config._attn_implementation)


def test_the_model_reads_one_row_of_all_tokens_and_nothing_else(
    make_trainer: Callable[..., OwnTrainer], model: Any
) -> None:
    trainer = make_trainer(settings={"max_steps": 3})
    trainer.compute_loss(model, trainer.data_collator(make_rows()[:1]))
    seen = Seen(model)
    trainer.train()
    num_tokens = [len(row["input_ids"]) for row in make_rows()]
    assert sum(shape[1] for shape in seen.shapes) == sum(num_tokens)
    assert [shape[0] for shape in seen.shapes] == [1] * 3
    assert sorted(length for lengths in seen.lengths for length in lengths) == sorted(num_tokens)
    assert seen.masks == [None] * 3
    assert set(seen.implementations) == {"document_attention"}
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_would_mix_rows_is_padded_with_the_reason_said_once(
    make_trainer: Callable[..., OwnTrainer],
    model_factory: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    runs = {}
    for padding_free in ("auto", "off"):
        model = model_factory("lfm2", **fields)
        seen = Seen(model)
        trainer = make_trainer(padding_free, model=model)
        trainer.train()
        trainer.evaluate()
        runs[padding_free] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert seen.shapes[-1][0] > 1
    assert runs["auto"] == runs["off"]
    warnings = [r.getMessage() for r in caplog.records if "padded" in r.getMessage()]
    assert warnings == [
        "Rows are padded, because tokens of one row reach another, as in recurrent or "
        "convolutional layers."
    ]
    with pytest.raises(ValueError, match=r"padding_free is 'on', but rows have to be padded, beca"):
        make_trainer("on", model=model).train()


def test_an_adapter_with_virtual_tokens_trains_as_before(
    make_trainer: Callable[..., OwnTrainer], model_factory: Make
) -> None:
    losses = []
    for padding_free in ("auto", "off"):
        torch.manual_seed(0)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        trainer = make_trainer(padding_free, model=get_peft_model(model_factory(), config))
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


def test_any_collator_will_do_whichever_side_it_pads(
    make_trainer: Callable[..., OwnTrainer], tokenizer: Any, model_factory: Make
) -> None:
    rows = Rows({"input_ids": row["input_ids"], "labels": _labels(row)} for row in make_rows())
    losses = {}
    for side, padding_free in (("right", "off"), ("right", "on"), ("left", "on")):
        tokenizer.padding_side = side
        model = model_factory().double()
        trainer = make_trainer(
            padding_free,
            model=model,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=16),
            eval_dataset=rows,
        )
        seen = Seen(model)
        losses[side, padding_free] = trainer.evaluate()["eval_loss"]
        assert (seen.shapes[-1][0] == 1) == (padding_free == "on")
    assert losses["right", "on"] == pytest.approx(losses["right", "off"], rel=1e-12)
    assert losses["left", "on"] == pytest.approx(losses["right", "off"], rel=1e-12)


def _labels(row: dict[str, Any]) -> list[int]:
    pairs = zip(row["input_ids"], row["response_mask"], strict=True)
    return [token if trained else -100 for token, trained in pairs]


def test_rows_that_are_never_padded_stay_as_they_are(
    make_trainer: Callable[..., OwnTrainer], model: Any
) -> None:
    ids = torch.randint(0, 300, (3, 8))
    seen = Seen(model)
    make_trainer("on").compute_loss(model, {"input_ids": ids, "labels": ids}).backward()
    assert seen.shapes[-1] == (3, 8)
    assert seen.implementations[-1] == "sdpa"


def test_predictions_and_outputs_have_a_row_for_each_row(
    make_trainer: Callable[..., OwnTrainer], model: Any
) -> None:
    settings = {"per_device_eval_batch_size": 12}
    padded, flat = (make_trainer(mode, settings=settings) for mode in ("off", "on"))
    expected, found = (trainer.predict(Rows(make_rows())) for trainer in (padded, flat))
    assert found.predictions.shape == (12, 44)
    assert (found.predictions == expected.predictions).all()
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-6)
    batch = flat.data_collator(make_rows())
    loss, outputs = flat.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == (12, 44)
    assert loss.item() == pytest.approx(flat.compute_loss(model, batch).item(), rel=1e-6)


def test_a_model_can_generate_and_be_saved_in_the_middle_of_a_run(
    make_trainer: Callable[..., OwnTrainer], model: Any, tmp_path: Any
) -> None:
    texts = []

    class InTheMiddle(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            prompts = {
                "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
                "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            }
            texts.append(model.generate(**prompts, max_new_tokens=3, do_sample=False).shape)
            model.save_pretrained(tmp_path)

    settings = {"gradient_checkpointing": True, "learning_rate": 1e-3}
    make_trainer("on", settings=settings, callbacks=[InTheMiddle()]).train()
    assert texts == [(2, 6)] * 2
    assert "document_attention" not in (tmp_path / "config.json").read_text()
    assert model.config._attn_implementation == "sdpa"


def penalty(model: Any, inputs: Any) -> Tensor:
    """Of all logits, from a padded forward pass."""
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**asked).logits
    return logits.square().mean()


class WithPenalty(OwnTrainer):
    """Runs the model once more for a term of its own."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) + penalty(model, inputs)


class WithPenaltyFirst(OwnTrainer):
    """The same, before the loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return penalty(model, inputs) + super().compute_loss(model, inputs, *args, **kwargs)


CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@pytest.mark.parametrize(
    ("cls", "settings"), [(WithPenalty, {}), (WithPenalty, CHECKPOINTING), (WithPenaltyFirst, {})]
)
def test_other_forward_passes_of_the_same_step_are_the_models_own(
    cls: type[OwnTrainer],
    settings: dict[str, Any],
    make_trainer: Callable[..., OwnTrainer],
    model_factory: Make,
) -> None:
    losses = []
    for padding_free in ("on", "off"):
        options = {**settings, "learning_rate": 1e-2, "logging_steps": 2}
        trainer = make_trainer(padding_free, cls=cls, model=model_factory(), settings=options)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_layers_that_are_run_again_with_another_attention_are_refused(
    make_trainer: Callable[..., OwnTrainer], model: Any
) -> None:
    with pytest.raises(ValueError, match="Set padding_free to 'off' where a model is run in other"):
        make_trainer("on", cls=WithPenaltyFirst, settings=CHECKPOINTING).train()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dispatches", "mode", "is_expected"),
    [(False, "auto", True), (False, "off", False), (True, "auto", False)],
)
def test_batches_bring_their_layout_where_one_process_does_not_make_them_for_all(
    dispatches: bool, mode: str, is_expected: bool, make_trainer: Callable[..., OwnTrainer]
) -> None:
    settings = {"accelerator_config": {"dispatch_batches": dispatches}}
    trainer = make_trainer(mode, settings=settings)
    if dispatches:
        trainer.train_dataset = Stream()
    own = trainer.data_collator
    batch = next(iter(trainer.get_train_dataloader()))
    assert (facts_of(batch).layout is not None) == is_expected
    assert trainer.data_collator is own


class Stream(IterableDataset[Any]):
    """Rows one after another."""

    def __iter__(self) -> Any:
        return iter(make_rows())
