"""Rows that begin alike run what they have in common once, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_step import Gradients, OwnTrainer, Rows, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedSFTConfig
from hf_sft_plugin.batches.host_facts import find_layout
from hf_sft_plugin.batches.shared_prompts import bundle_rows, find_shared_prompts
from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.models.attention_choice import choose_attention

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
# Prompts and responses are longer than the windows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": EXPERTS,
    "gpt2": {"n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
Make = Callable[..., Any]
FEW_WORDS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@given(st.lists(FEW_WORDS, min_size=1, max_size=12), st.integers(1, 4))
def test_every_token_is_run_by_one_with_the_same_past(rows: list[list[int]], at_least: int) -> None:
    documents = [np.array(row) for row in rows]
    shared = find_shared_prompts(documents, at_least)
    everything = [token for row in rows for token in row]
    if shared is None:
        pairs = [(a, b) for n, a in enumerate(rows) for b in rows[:n]]
        assert all(a[:at_least] != b[:at_least] or len(a[:at_least]) < at_least for a, b in pairs)
        return
    assert len(shared.index) < len(everything)
    assert sum(shared.document_lengths) == len(shared.index) == len(set(shared.index.tolist()))
    ran = [everything[index] for index in shared.index]
    keys = shared.key_index.split(shared.key_boundaries.diff().tolist())
    pieces = torch.arange(len(ran)).split(shared.document_lengths)
    places = iter(shared.places.tolist())
    assert shared.max_length_k == max(map(len, keys))
    for row in rows:
        for position in range(len(row)):
            place = next(places)
            number = next(n for n, piece in enumerate(pieces) if place in piece)
            own, context = pieces[number], shared.document_contexts[number]
            joined = torch.cat([*(pieces[n] for n in context), own])
            assert torch.equal(joined, keys[number])
            assert all(before < number for before in context)
            past = joined[joined.tolist().index(place) + 1 - position - 1 : position + 1]
            assert [ran[key] for key in past] == row[: position + 1]
            assert shared.position_ids[0, place] == position


@pytest.mark.parametrize(
    ("rows", "num_tokens", "contexts"),
    [
        # Two responses; a word that both begin with is not worth a piece.
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 9, 9]], 3 + 2 + 2 + 2, [[], [0], [0], [0]]),
        # The turns of a conversation.
        ([[1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5, 6]], 6, [[], [0], [0, 1]]),
        # The same row again.
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3]], 3, [[]]),
        ([[7, 1], [1, 2, 3], [1, 2, 4]], 2 + 2 + 1 + 1, [[], [], [0], [0]]),
    ],
)
def test_rows_part_where_it_is_worth_it(
    rows: list[list[int]], num_tokens: int, contexts: list[list[int]]
) -> None:
    shared = find_shared_prompts([np.array(row) for row in rows], at_least=2)
    assert shared is not None
    assert len(shared.index) == num_tokens
    assert shared.document_contexts == contexts


@given(st.lists(FEW_WORDS, min_size=1, max_size=12), st.integers(1, 60))
def test_bundles_hold_every_row_once_within_the_budget(
    starts: list[list[int]], max_tokens: int
) -> None:
    rows = [np.repeat(start, 7) for start in starts]
    bundles, costs = bundle_rows(rows, max_tokens)
    assert sorted(row for bundle in bundles for row in bundle) == list(range(len(rows)))
    for bundle, cost in zip(bundles, costs, strict=True):
        shared = find_shared_prompts([rows[row] for row in bundle])
        lengths = [len(rows[row]) for row in bundle]
        assert cost == (sum(lengths) if shared is None else len(shared.index))
        assert cost <= max(max_tokens, max(lengths))
        assert shared is not None or len(bundle) == 1


class Keeper(Gradients):
    """Keeps gradients, and how many tokens ran."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.num_read = 0
        self.parts = 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: Tensor) -> None:
        # Trials of the model leave no graph.
        if module.training and torch.is_grad_enabled():
            self.num_read += inputs[0].numel()
            self.parts += 1


def row(prompt: list[int], response: list[int], weight: float = 1.0) -> dict[str, Any]:
    mask = [0] * len(prompt) + [1] * len(response)
    return {
        "input_ids": prompt + response,
        "response_mask": mask,
        "loss_weights": [weight * each for each in mask],
    }


def make_rows() -> list[dict[str, Any]]:
    """Twelve rows of which ten begin like others, in no order."""
    long, short, other = tokens(1, 40), tokens(2, 1), tokens(3, 18)
    turns = [tokens(seed, 20) for seed in (4, 5, 6, 7)]
    return [
        row(long, tokens(10, 12)),
        row(short, tokens(11, 30)),
        row(turns[0], turns[1]),
        row(other, tokens(12, 50)),
        # Context here is trained in the row before.
        row(turns[0] + turns[1] + turns[2], turns[3]),
        row(long, tokens(13, 5), weight=0.25),
        row(short, tokens(14, 25)),
        row(long, tokens(15, 55)),
        row(other, tokens(16, 3)),
        # The same row again, and one that is trained from elsewhere on.
        row(long, tokens(10, 12)),
        row(long, tokens(10, 12), weight=3.0),
        row(long + tokens(10, 12)[:6], [*tokens(10, 12)[6:], 5]),
    ]


@pytest.fixture
def train(
    model_factory: Make, tokenizer: Any, make_config: Make, widen: Callable[[Any], None]
) -> Callable[..., Any]:
    def run(
        model_type: str = "qwen3",
        shared_prompts: str = "auto",
        dtype: torch.dtype = torch.float64,
        adapter: LoraConfig | None = None,
        rows: list[dict[str, Any]] | None = None,
        fields: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[OwnTrainer, Keeper]:
        fused_head = settings.pop("fused_head", "on")
        padding_free = settings.pop("padding_free", "on")
        normalization = settings.pop("loss_normalization", "token")
        max_tokens = settings.pop("max_tokens_per_microbatch", None)
        args: MaskedSFTConfig = make_config(
            **{
                "per_device_train_batch_size": 12,
                "max_steps": 1,
                "learning_rate": 0.0,
                "max_grad_norm": 0.0,
                "train_sampling_strategy": "sequential",
                **settings,
            }
        )
        model = model_factory(model_type, **(FAMILIES[model_type] | (fields or {}))).to(dtype)
        if dtype == torch.float64:
            widen(model)
        if adapter is not None:
            torch.manual_seed(5)
            model = get_peft_model(model, adapter)
        keeper = Keeper(model)
        trainer = OwnTrainer(
            model,
            args,
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Rows(make_rows() if rows is None else rows),
            eval_dataset=Rows(make_rows()),
            callbacks=[keeper],
        )
        trainer.fused_head, trainer.padding_free = fused_head, padding_free
        trainer.shared_prompts = shared_prompts
        trainer.loss_normalization = LossNormalization(normalization)
        trainer.max_tokens_per_microbatch = max_tokens
        trainer.train()
        return trainer, keeper

    return run


def assert_equal_runs(found: Any, expected: Any, bound: float, saves: bool = True) -> None:
    logs, theirs = (trainer.state.log_history[0] for trainer, _ in (found, expected))
    assert logs == pytest.approx(theirs, rel=bound, abs=bound)
    ours, others = found[1], expected[1]
    assert (ours.num_read < others.num_read) == saves
    gradient, truth = ours.values[-1], others.values[-1]
    assert (gradient - truth).norm() < bound * truth.norm()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gradient_loss_and_metrics_are_those_of_separate_rows(
    model_type: str, dtype: torch.dtype, bound: float, train: Callable[..., Any]
) -> None:
    runs = [train(model_type, how, dtype) for how in ("auto", "off")]
    assert_equal_runs(*runs, bound)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "settings",
    [
        {"fused_head": "off"},
        {"loss_normalization": "example"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "adapter": LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False),
        },
    ],
    ids=["full logits", "examples", "accumulation", "smoothing", "checkpointing", "LoRA"],
)
def test_it_goes_with_everything_else(
    model_type: str, settings: dict[str, Any], train: Callable[..., Any]
) -> None:
    # Layers that run again in the backward pass are out of reach of `widen`.
    is_double = "gradient_checkpointing" not in settings
    settings = {"dtype": torch.float64 if is_double else torch.float32, **settings}
    runs = [train(model_type, how, **settings) for how in ("auto", "off")]
    assert_equal_runs(*runs, 1e-12 if is_double else 1e-6)


def test_it_is_equal_to_padded_rows_too(train: Callable[..., Any]) -> None:
    assert_equal_runs(train(), train(padding_free="off"), 1e-12)


def test_evaluation_shares_prompts_too(train: Callable[..., Any]) -> None:
    def evaluate(how: str) -> dict[str, float]:
        metrics = train(shared_prompts=how, per_device_eval_batch_size=12)[0].evaluate()
        speed = ("runtime", "per_second")
        return {name: value for name, value in metrics.items() if not name.endswith(speed)}

    found, expected = evaluate("auto"), evaluate("off")
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_router_whose_loss_counts_tokens_reads_each_prompt_for_each_row(
    train: Callable[..., Any],
) -> None:
    fields = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    found, expected = (train("mixtral", how, fields=fields) for how in ("auto", "off"))
    assert_equal_runs(found, expected, 1e-12, saves=False)
    summary = found[0]._attention.choice.summary
    assert "prompts once per row, because the loss of its router counts every token" in summary


def test_rows_of_one_prompt_meet_in_a_micro_batch_within_the_budget(
    train: Callable[..., Any],
) -> None:
    prompts = [tokens(seed, 60) for seed in range(4)]
    rows = [row(prompts[n % 4], tokens(20 + n, 10)) for n in range(16)]
    settings = {
        "rows": rows,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_tokens_per_microbatch": 210,
    }
    runs = [train(shared_prompts=how, **settings) for how in ("auto", "off")]
    assert_equal_runs(*runs, 1e-12)
    (_, ours), (_, others) = runs
    assert (ours.num_read, ours.parts) == (4 * (60 + 4 * 10), 2)
    assert (others.num_read, others.parts) == (16 * 70, 6)


@pytest.mark.parametrize("rows", [[row(tokens(1, 30), [5])], [row([7], [n, 5]) for n in range(4)]])
def test_rows_with_nothing_to_share_run_as_ever(
    rows: list[dict[str, Any]], train: Callable[..., Any]
) -> None:
    runs = [train(shared_prompts=how, rows=rows) for how in ("auto", "off")]
    assert_equal_runs(*runs, 1e-12, saves=False)


def test_positions_of_its_own_are_kept() -> None:
    ids = torch.arange(40).expand(2, 40)
    usual = torch.arange(40).expand(2, 40)
    assert find_layout({"input_ids": ids, "position_ids": usual}, True).shared is not None
    assert find_layout({"input_ids": ids, "position_ids": usual + 1}, True).shared is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_token_of_one_response_moves_no_logit_of_another_by_a_bit(
    model_type: str, model_factory: Make
) -> None:
    model = model_factory(model_type, **FAMILIES[model_type]).eval()
    choice = choose_attention(model, model)
    assert choice.shares_prompts
    rows = [np.array(tokens(1, 20) + tokens(seed, 12)) for seed in (2, 3, 4)]
    shared = find_shared_prompts(rows)
    assert shared is not None
    ids = torch.from_numpy(np.concatenate(rows))[shared.index].unsqueeze(0)
    changed = ids.clone()
    # In the middle of the second response.
    changed[0, 20 + 12 + 5] = 1
    with torch.no_grad(), choice.running():
        logits, moved = (
            model(input_ids=x, use_cache=False, **shared.model_inputs()).logits[0]
            for x in (ids, changed)
        )
    # Experts are given other numbers of tokens, which may round otherwise.
    bound = 1e-6 if model_type == "mixtral" else 0
    others = [*range(37), *range(44, 56)]
    torch.testing.assert_close(moved[others], logits[others], rtol=bound, atol=bound)
    assert not (moved[37:44] == logits[37:44]).all(dim=-1).any()
