"""Whatever the model: loss and gradient are those of its rows, run by the model one at a time.

The reference knows nothing of the package: each row goes through the model by itself, its full
logits are taken, labels are shifted, and the sum is divided by the number of trained tokens. What
models do in float32 by their own will is done in float64, so that nothing but the order of sums is
left to differ.
"""

from collections import UserList
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from transformers import DataCollatorWithFlattening, Trainer

from hf_sft_plugin import MaskedLossMixin

Make = Callable[..., Any]
Row = tuple[Tensor, int]
INVOCATION = 11
SHORT_WAY, ANY_HEAD = "3 products over", "a tile of logits at a time"
FROZEN_HEAD = "2 products over response rows"
NO_PADDING = "per-document SDPA, no padding, shared prompts once"


class Float64(TorchFunctionMode):
    """What is cast to float32, stays in float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        if function is torch.Tensor.to:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Constants that models and adapters make when they are built are float64 as well."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""


def make_rows() -> list[Row]:
    """Tokens and the number of those that are not trained; four rows begin alike."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> Tensor:
        return torch.randint(20, 290, (count,), generator=generator)

    prompt = draw(11)
    rows = [
        (torch.cat([prompt[: 8 + n % 2], draw(c)]), 8 + n % 2) for n, c in enumerate((5, 9, 13))
    ]
    rows += [(torch.cat([prompt[:8], draw(2)]), 8), (draw(6), 3), (draw(23), 3)]
    for ids, _ in rows:
        ids[2] = INVOCATION
    return rows


ROWS = make_rows()
NUM_TRAINED = sum(len(ids) - count for ids, count in ROWS)


def labels_of(row: Row) -> Tensor:
    ids, num_prompt = row
    return ids.masked_fill(torch.arange(len(ids)) < num_prompt, -100)


def collate(rows: list[Row]) -> dict[str, Tensor]:
    ids = [row[0] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(list(map(labels_of, rows)), batch_first=True, padding_value=-100),
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
    model.zero_grad()
    return found


def rows_alone(model: Any) -> tuple[float, dict[str, Tensor]]:
    """The reference."""
    total = 0.0
    for ids, num_prompt in ROWS:
        mask = torch.ones_like(ids)[None]
        logits = model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]
        # Virtual tokens come first.
        log_probs = torch.log_softmax(logits[-len(ids) : -1], dim=-1)
        picked = log_probs.gather(-1, ids[1:, None])[num_prompt - 1 :]
        loss = -picked.sum() / NUM_TRAINED
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def through_trainer(
    trainer: OwnTrainer, batches: list[dict[str, Any]]
) -> tuple[float, dict[str, Tensor]]:
    model: Any = trainer.model
    total, count = 0.0, torch.tensor(float(NUM_TRAINED))
    for batch in batches:
        loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def assert_equal(found: tuple[float, Any], expected: tuple[float, Any]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    whole = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # Of what must be 0, as for the bias of keys, rounding leaves something.
        scale = max(gradient.norm(), 1e-4 * whole)
        assert (found[1][name] - gradient).norm() < 1e-12 * scale, name


@pytest.fixture
def make_trainer(make_config: Make) -> Make:
    def make(model: Any, padding_free: str = "auto", **settings: Any) -> OwnTrainer:
        trainer = OwnTrainer(model.train(), make_config(), train_dataset=UserList([1]))
        trainer.padding_free = padding_free
        for name, value in settings.items():
            setattr(trainer, name, value)
        return trainer

    return make


@pytest.fixture
def check(make_trainer: Make) -> Make:
    """Whole, in two parts, and padded in three parts, against the rows alone; how it went."""

    def run(model: Any, is_trained_everywhere: bool = True) -> dict[str, str]:
        with Float64():
            expected = rows_alone(model.train())
            assert not is_trained_everywhere or all(x.any() for x in expected[1].values())
            trainer = make_trainer(model)
            for size in (6, 3):
                parts = [collate(ROWS[start : start + size]) for start in range(0, 6, size)]
                assert_equal(through_trainer(trainer, parts), expected)
            padded = make_trainer(model, "off")
            parts = [collate(ROWS[start : start + 2]) for start in (0, 2, 4)]
            assert_equal(through_trainer(padded, parts), expected)
        speed = trainer.describe_speed()
        assert padded.describe_speed()["head"] == speed["head"]
        return speed

    return run


def disturb(model: Any) -> Any:
    """Adapters begin without an effect, norms with ones; neither would show an error."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.1 * noise)
    return model


def build(model_factory: Make, *args: Any, **fields: Any) -> Any:
    with float64_by_default():
        return disturb(model_factory(*args, **fields).double())


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
MIXES = "padded, because tokens of one row reach another"
# Each head, each kind of layer, and what is said of them.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gemma2": (
        "gemma2",
        {
            **WINDOWS,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 3.0,
            # Older versions of transformers take SDPA, which drops the cap of attention.
            "attn_implementation": "eager",
        },
        NO_PADDING,
        SHORT_WAY,
    ),
    "gemma3": ("gemma3_text", {**WINDOWS, "final_logit_softcapping": 5.0}, NO_PADDING, SHORT_WAY),
    "granite": ("granite", {"logits_scaling": 4.0}, NO_PADDING, SHORT_WAY),
    "granite with experts": (
        "granitemoe",
        {**EXPERTS, "logits_scaling": 4.0},
        NO_PADDING,
        SHORT_WAY,
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}, NO_PADDING, SHORT_WAY),
    "cohere2": ("cohere2", {**WINDOWS, "logit_scale": 0.25}, NO_PADDING, SHORT_WAY),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.5}, NO_PADDING, SHORT_WAY),
    "falcon-h1": (
        "falcon_h1",
        {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "key_multiplier": 0.5},
        MIXES,
        SHORT_WAY,
    ),
    "minicpm3": (
        "minicpm3",
        {
            "num_key_value_heads": 4,
            "head_dim": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "dim_model_base": 8,
            "scale_emb": 4,
        },
        NO_PADDING,
        SHORT_WAY,
    ),
    "recurrent gemma": (
        "recurrent_gemma",
        {"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8},
        MIXES,
        SHORT_WAY,
    ),
    "phi, a biased head": ("phi", {"tie_word_embeddings": False}, NO_PADDING, SHORT_WAY),
    "gpt-oss": ("gpt_oss", {**EXPERTS, **WINDOWS}, NO_PADDING, SHORT_WAY),
    "bart's decoder": (
        "bart",
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        "padded, because without padding its logits differ",
        SHORT_WAY,
    ),
    # As many blocks as the rows of the probe have, and fewer than those here.
    "minimax m3, sparse blocks": (
        "minimax_m3_vl_text",
        {
            "layer_types": ["minimax_m3_sparse", "full_attention"],
            "index_block_size": 16,
            "index_topk_blocks": 1,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
        "padded, because its layers attend by block_indices as well",
        SHORT_WAY,
    ),
    "more logits than tokens": ("qwen3", {"vocab_size": 337}, NO_PADDING, SHORT_WAY),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_train_as_their_rows_alone(
    name: str, model_factory: Make, check: Make
) -> None:
    model_type, fields, attention, head = ARCHITECTURES[name]
    # Not all experts are asked by rows that are this few.
    speed = check(build(model_factory, model_type, **NO_DROPOUT, **fields), False)
    assert speed["attention"].startswith(attention)
    assert speed["head"].startswith(head)


NO_DROPOUT = {"dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VIRTUAL = "padded, because the adapter puts virtual tokens before every row"


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": LAYERS, **settings})


def prompt(kind: type[PeftConfig], **settings: Any) -> PeftConfig:
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)


WITH_HEAD = {"target_modules": [*LAYERS, "lm_head"]}
SAVED = {"modules_to_save": ["lm_head", "embed_tokens"]}
TOKENS = [INVOCATION, *ROWS[5][0][6:9].tolist()]
# Whether the model is tied, the adapter, how rows are attended to, and the way of the head.
ADAPTERS: dict[str, tuple[bool, PeftConfig, str, str]] = {
    "all-linear": (True, lora(target_modules="all-linear"), NO_PADDING, FROZEN_HEAD),
    "head": (False, lora(**WITH_HEAD), NO_PADDING, ANY_HEAD),
    "tied head": (True, lora(**WITH_HEAD), NO_PADDING, ANY_HEAD),
    "tied head and embedding": (
        True,
        lora(**WITH_HEAD, ensure_weight_tying=True),
        NO_PADDING,
        ANY_HEAD,
    ),
    "embedding": (
        True,
        lora(target_modules=[*LAYERS, "embed_tokens"]),
        NO_PADDING,
        FROZEN_HEAD,
    ),
    "dora": (True, lora(use_dora=True), NO_PADDING, FROZEN_HEAD),
    "dora with head": (False, lora(use_dora=True, **WITH_HEAD), NO_PADDING, ANY_HEAD),
    "rslora with head": (False, lora(use_rslora=True, **WITH_HEAD), NO_PADDING, ANY_HEAD),
    "saved modules": (False, lora(**SAVED), NO_PADDING, ANY_HEAD),
    "saved modules, tied": (True, lora(**SAVED), NO_PADDING, ANY_HEAD),
    "saved modules, kept tied": (
        True,
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        NO_PADDING,
        ANY_HEAD,
    ),
    "tokens": (False, lora(trainable_token_indices=TOKENS), NO_PADDING, FROZEN_HEAD),
    "tokens, tied": (True, lora(trainable_token_indices=TOKENS), NO_PADDING, ANY_HEAD),
    "tokens alone, tied": (
        True,
        TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=TOKENS),
        NO_PADDING,
        ANY_HEAD,
    ),
    "ia3": (
        False,
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj", "lm_head"],
            feedforward_modules=["down_proj"],
        ),
        NO_PADDING,
        ANY_HEAD,
    ),
    "prompt tuning": (True, prompt(PromptTuningConfig), VIRTUAL, FROZEN_HEAD),
    "prefix tuning": (True, prompt(PrefixTuningConfig), VIRTUAL, FROZEN_HEAD),
    "projected prefix": (
        True,
        prompt(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=16),
        VIRTUAL,
        FROZEN_HEAD,
    ),
    "p-tuning": (
        True,
        prompt(PromptEncoderConfig, encoder_hidden_size=16),
        VIRTUAL,
        FROZEN_HEAD,
    ),
    "invoked": (
        True,
        lora(alora_invocation_tokens=[INVOCATION]),
        "padded, because the adapter begins where its invocation tokens are in a row",
        FROZEN_HEAD,
    ),
    "invoked, with head": (
        False,
        lora(alora_invocation_tokens=[INVOCATION], **WITH_HEAD),
        "padded, because the adapter begins where its invocation tokens are in a row",
        "full logits",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapters_train_as_their_rows_alone(name: str, model_factory: Make, check: Make) -> None:
    is_tied, config, attention, head = ADAPTERS[name]
    with float64_by_default():
        base = model_factory(tie_word_embeddings=is_tied)
        model = disturb(get_peft_model(base, config).double())
    speed = check(model)
    assert speed["attention"] == attention
    assert speed["head"].startswith(head)
    assert ("last layer" in speed) == (attention == NO_PADDING)


@pytest.fixture
def two_adapters(model_factory: Make) -> Any:
    """An adapter on all layers, and one that has the head as well."""
    with float64_by_default():
        model = get_peft_model(model_factory(), lora())
        model.add_adapter("second", lora(r=2, target_modules=["q_proj", "lm_head"]))
    model = model.double()
    for name in ("default", "second"):
        model.set_adapter(name)
        disturb(model)
    return model


@pytest.mark.parametrize("active", ["default", "second", ["default", "second"]], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_of_several_adapters_those_are_trained_that_are_active(
    active: Any, two_adapters: Any, check: Make
) -> None:
    two_adapters.base_model.set_adapter(active)
    trained = [name for name, p in two_adapters.named_parameters() if p.requires_grad]
    names = [active] if isinstance(active, str) else active
    assert all(any(f".{name}." in one for name in names) for one in trained)
    assert check(two_adapters)["head"].startswith(ANY_HEAD)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_that_comes_later_or_is_switched_is_noticed(
    model_factory: Make, make_trainer: Make
) -> None:
    """What was chosen for the model as it was would leave the new adapter of the head aside."""
    with float64_by_default():
        model = disturb(get_peft_model(model_factory(), lora()).double())
    trainer = make_trainer(model)
    batch = [collate(ROWS)]
    with Float64():
        assert_equal(through_trainer(trainer, batch), rows_alone(model))
        assert trainer.describe_speed()["head"] == FROZEN_HEAD
        with float64_by_default():
            model.add_adapter("head", lora(**WITH_HEAD))
            invoked = lora(alora_invocation_tokens=[INVOCATION], **WITH_HEAD)
            model.add_adapter("invoked", invoked)
        for name in ("head", "invoked", "default"):
            model.set_adapter(name)
            disturb(model.double())
            assert_equal(through_trainer(trainer, batch), rows_alone(model))
            speed = trainer.describe_speed()
            assert speed["attention"].startswith("padded") == (name == "invoked")
            assert speed["head"].startswith("full logits" if name == "invoked" else ANY_HEAD)


def wrap_mixed(model: Any) -> Any:
    mixed = PeftMixedModel(model, lora())
    mixed.add_adapter("b", LoHaConfig(target_modules=["q_proj"], r=2))
    mixed.set_adapter(["default", "b"])
    return mixed


def wrap_native(model: Any) -> Any:
    model.add_adapter(lora())
    return model


@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize("wrap", [wrap_mixed, wrap_native, lambda m: PeftModel(m, lora())])
def test_adapters_that_are_there_already_train_as_their_rows_alone(
    wrap: Callable[[Any], Any], model_factory: Make, check: Make
) -> None:
    with float64_by_default():
        model = disturb(wrap(model_factory()).double())
    assert check(model)["head"] == FROZEN_HEAD


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_dropout_of_an_adapter_draws_what_it_draws_on_full_logits(
    model_factory: Make, make_trainer: Make
) -> None:
    with float64_by_default():
        model = disturb(get_peft_model(model_factory(), lora(lora_dropout=0.3)).double())
    batch = collate(ROWS)
    trainer = make_trainer(model, "off")
    trainer.compute_loss(model, batch)
    torch.manual_seed(5)
    found = through_trainer(trainer, [batch])
    torch.manual_seed(5)
    logits = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / NUM_TRAINED
    loss.backward()
    assert_equal(found, (loss.item(), gradients(model)))
    trainer = make_trainer(model)
    through_trainer(trainer, [batch])
    speed = trainer.describe_speed()
    assert speed["attention"] == NO_PADDING
    assert speed["last layer"] == "everywhere, because it draws random numbers, as for dropout"


class Int8Head(nn.Module):
    """Integers and a scale for each token, as quantized layers have them."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        scales = head.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((head.weight.detach() / scales).to(torch.int8), False)
        self.register_buffer("scales", scales)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ (self.weight * self.scales).to(hidden_states.dtype).T


class CooledHead(nn.Linear):
    """A linear layer by its class, and not by what it does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(super().forward(hidden_states)) * 2


def cool(head: nn.Linear) -> nn.Module:
    cooled = CooledHead(*head.weight.T.shape, bias=False)
    cooled.weight = nn.Parameter(head.weight.detach())
    return cooled


@pytest.mark.parametrize("change", [Int8Head, cool])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_heads_that_are_no_plain_linear_layer_are_called_as_they_are(
    change: Callable[[nn.Linear], nn.Module],
    has_adapter: bool,
    model_factory: Make,
    check: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.fused_head._TILE_SIZE", 7 * 300)
    with float64_by_default():
        model = model_factory(tie_word_embeddings=False).double()
        model.lm_head = change(model.lm_head)
        if has_adapter:
            model = get_peft_model(model, lora())
    speed = check(disturb(model))
    assert speed["head"] == "a tile of logits at a time, response rows only"


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [
        *((name, kind) for name in ("mistral", "gemma3_text") for kind in ("sdpa", "eager")),
        ("gpt_oss", "eager"),
        ("mistral", "flex_attention"),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_documents_in_one_row_train_as_rows_alone(
    model_type: str, implementation: str, model_factory: Make, make_trainer: Make
) -> None:
    """In windows shorter than the documents, whatever else a collator says of them."""
    fields = {"sliding_window": 8} if model_type == "mistral" else WINDOWS
    experts = EXPERTS if model_type == "gpt_oss" else {}
    model = build(model_factory, model_type, head_dim=16, **fields, **experts).train()
    features = [{"input_ids": x[0].tolist(), "labels": labels_of(x).tolist()} for x in ROWS]
    with Float64():
        model.set_attn_implementation("eager")
        expected = rows_alone(model)
        # On a CPU flex attention has no gradient of its own.
        model.set_attn_implementation(implementation)
        trainer = make_trainer(model)
        for extras in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
            batch = DataCollatorWithFlattening(**extras)(features)
            assert_equal(through_trainer(trainer, [batch]), expected)
        assert_equal(through_trainer(trainer, [collate(ROWS)]), expected)
    assert trainer.describe_speed()["attention"] == NO_PADDING
    assert model.config._attn_implementation == implementation


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize(
    ("implementation", "dtype", "bound"),
    [("flash_attention_2", torch.bfloat16, 5e-2), ("flex_attention", torch.float32, 1e-4)],
)
def test_documents_in_one_row_train_as_rows_alone_on_a_gpu(
    implementation: str, dtype: torch.dtype, bound: float, window: int | None, model_factory: Make
) -> None:
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    fields = {"sliding_window": window, "hidden_size": 64, "head_dim": 16}
    model = disturb(model_factory("mistral", **fields)).cuda().train()
    trainer = OwnTrainer(model, train_dataset=UserList([1]))
    features = [{"input_ids": x[0].tolist(), "labels": labels_of(x).tolist()} for x in ROWS]
    batches = [collate(ROWS), DataCollatorWithFlattening()(features)]
    alone = [{"input_ids": x[0][None].cuda(), "labels": labels_of(x)[None].cuda()} for x in ROWS]
    trainer.padding_free = "off"
    expected = through_trainer(trainer, alone)
    trainer.padding_free = "on"
    model.to(dtype).set_attn_implementation(implementation)
    for batch in batches:
        found = through_trainer(trainer, [{k: x.cuda() for k, x in batch.items()}])
        assert trainer.describe_speed()["attention"] == f"{implementation}, no padding"
        assert found[0] == pytest.approx(expected[0], rel=bound)
        ours, theirs = (
            torch.cat([g.flatten().float() for g in x[1].values()]) for x in (found, expected)
        )
        assert (ours - theirs).norm() < bound * theirs.norm()
