"""The last layer runs at trained positions only, and nothing changes."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from one_step import Gradients, OwnTrainer, Rows, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_sft_plugin import DataCollatorForPromptResponse
from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.models.attention_choice import choose_attention
from hf_sft_plugin.models.last_layer import LastLayer, LastLayerMixin

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
# Rows are longer than the windows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "mixtral": EXPERTS,
    "gpt2": {"n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
LORA = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
Make = Callable[..., Any]


def make_rows() -> list[dict[str, Any]]:
    """Nine rows, three to a prompt; of one nothing is trained, of one a part of the prompt is."""
    rows = []
    for number in range(9):
        prompt, response = tokens(number % 3, 20 + number % 3), tokens(10 + number, 1 + number)
        mask = [0] * len(prompt) + [int(number != 5)] * len(response)
        if number == 7:
            mask[4:9] = [1] * 5
        ids = prompt + response
        weights = [(1.0 + number) * each for each in mask]
        rows.append({"input_ids": ids, "response_mask": mask, "loss_weights": weights})
    return rows


NUM_READ = sum(len(row["input_ids"]) for row in make_rows())
NUM_TRAINED = sum(sum(row["response_mask"]) for row in make_rows())


class Run:
    """One optimizer step and one evaluation."""

    def __init__(self, trainer: OwnTrainer, gradients: Gradients) -> None:
        self.trainer = trainer
        trainer.train()
        self.gradient = gradients.values[-1]
        self.numbers = dict(trainer.state.log_history[0]) | trainer.evaluate()
        for name in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
            del self.numbers[name]


@pytest.fixture
def make_trainer(model_factory: Make, tokenizer: Any, make_config: Make) -> Make:
    def make(
        model_type: str = "qwen3",
        dtype: torch.dtype = torch.float64,
        adapter: LoraConfig | None = None,
        fields: dict[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> tuple[OwnTrainer, Gradients]:
        own = {
            name: settings.pop(name)
            for name in ("trained_positions_only", "fused_head", "padding_free", "shared_prompts")
            if name in settings
        }
        own["loss_normalization"] = LossNormalization(settings.pop("loss_normalization", "token"))
        step = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": 9, "per_device_eval_batch_size": 4}
        model = model_factory(model_type, **FAMILIES[model_type] | (fields or {})).to(dtype)
        if adapter is not None:
            torch.manual_seed(5)
            model = get_peft_model(model, adapter)
        gradients = Gradients()
        torch.manual_seed(7)
        trainer = OwnTrainer(
            model,
            make_config(**{**step, **sizes, **settings}),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Rows(make_rows() if rows is None else rows),
            eval_dataset=Rows(make_rows()),
            callbacks=[gradients],
        )
        for name, value in own.items():
            setattr(trainer, name, value)
        return trainer, gradients

    return make


@pytest.fixture
def train(make_trainer: Make) -> Callable[..., Run]:
    return lambda *args, **kwargs: Run(*make_trainer(*args, **kwargs))


def assert_equal_runs(found: Run, expected: Run, bound: float) -> None:
    assert found.trainer.last_layer_summary == "at trained positions"
    assert expected.trainer.last_layer_summary == (
        "everywhere, because trained_positions_only is 'off'"
    )
    assert found.numbers == pytest.approx(expected.numbers, rel=bound, abs=bound)
    error = (found.gradient - expected.gradient).norm() / expected.gradient.norm()
    assert error < bound


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gradient_loss_and_metrics_are_those_of_a_layer_that_runs_everywhere(
    model_type: str, dtype: torch.dtype, bound: float, train: Callable[..., Run]
) -> None:
    runs = (train(model_type, dtype, trained_positions_only=how) for how in ("auto", "off"))
    assert_equal_runs(*runs, bound)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": LORA},
        {"fused_head": "off"},
        {"loss_normalization": "example"},
        {"shared_prompts": "off"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5},
        {"fields": {"tie_word_embeddings": False, "num_hidden_layers": 1}},
    ],
    ids=["LoRA", "full logits", "examples", "prompts apart", "accumulation", "one layer"],
)
def test_it_goes_with_everything_else(
    model_type: str, settings: dict[str, Any], train: Callable[..., Run]
) -> None:
    if "fields" in settings and model_type == "gemma3_text":
        fields = {**settings["fields"], "layer_types": ["sliding_attention"]}
        settings = {**settings, "fields": fields}
    runs = (train(model_type, trained_positions_only=how, **settings) for how in ("auto", "off"))
    assert_equal_runs(*runs, 1e-12)


def test_it_is_equal_to_padded_rows_too(train: Callable[..., Run]) -> None:
    # Norms sum the gradients of a shared token in float32.
    found, expected = train(shared_prompts="off"), train(padding_free="off")
    assert expected.trainer.last_layer_summary is None
    assert found.numbers == pytest.approx(expected.numbers, rel=1e-12)
    assert (found.gradient - expected.gradient).norm() < 1e-12 * expected.gradient.norm()


class Counter:
    """Counts the tokens that a module is given while training."""

    def __init__(self, module: nn.Module) -> None:
        self.num_tokens = 0
        module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor], _: Any) -> None:
        # Nothing is learned from what the trainer tries out beforehand.
        if torch.is_grad_enabled():
            self.num_tokens += inputs[0].shape[:-1].numel()


@pytest.mark.parametrize("shared_prompts", ["auto", "off"])
def test_the_parts_of_the_last_layer_see_trained_positions_and_no_others(
    shared_prompts: str, make_trainer: Make
) -> None:
    trainer, _ = make_trainer(
        adapter=LORA, shared_prompts=shared_prompts, max_tokens_per_microbatch=None
    )
    trainer.max_tokens_per_microbatch = None
    layers = trainer.model.get_base_model().model.layers
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    # What a PEFT layer wraps is called by its own forward.
    at_trained = [Counter(layers[1].get_submodule(f"{name}.base_layer")) for name in names]
    everywhere = [Counter(layers[0].get_submodule(f"{name}.base_layer")) for name in names]
    everywhere += [
        Counter(layers[1].self_attn.get_submodule(name)) for name in ("k_proj", "v_proj")
    ]
    trainer.train()
    assert [counter.num_tokens for counter in at_trained] == [NUM_TRAINED] * 4
    # Of each prompt, 20 to 22 tokens, two copies are spared.
    num_run = NUM_READ - (0 if shared_prompts == "off" else 2 * (20 + 21 + 22))
    assert [counter.num_tokens for counter in everywhere] == [num_run] * 6


ROUTER_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 1.0}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gradient_checkpointing": True}, "gradient checkpointing runs it again"),
        (
            {"fields": {"attention_dropout": 0.1}},
            "it draws random numbers, as for dropout",
        ),
        (
            {"adapter": LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.01)},
            "it draws random numbers, as for dropout",
        ),
        (
            {"model_type": "mixtral", "fields": ROUTER_LOSS},
            "the loss of its router counts every token",
        ),
        ({"trained_positions_only": "off"}, "trained_positions_only is 'off'"),
    ],
    ids=["checkpointing", "dropout", "dropout of LoRA", "router loss", "off"],
)
def test_it_runs_everywhere_where_it_has_to_and_the_summary_says_why(
    options: dict[str, Any], reason: str, make_trainer: Make
) -> None:
    trainer, _ = make_trainer(**options)
    trainer.max_tokens_per_microbatch = None
    part = next(m for n, m in reversed([*trainer.model.named_modules()]) if n.endswith("mlp"))
    own, seen = part.forward, []
    part.forward = lambda hidden, *rest: seen.append(hidden.shape) or own(hidden, *rest)
    trainer.train()
    assert trainer.describe_speed()["last layer"] == f"everywhere, because {reason}"
    assert NUM_TRAINED not in {shape[1] for shape in seen}


def test_dropout_before_it_draws_the_same_numbers_as_ever(train: Callable[..., Run]) -> None:
    dropout = LoraConfig(target_modules=r".*layers\.0\..*_proj", r=4, lora_dropout=0.3)
    runs = (train(adapter=dropout, trained_positions_only=how) for how in ("auto", "off"))
    assert_equal_runs(*runs, 1e-12)


def test_padded_rows_have_no_such_line(make_trainer: Make) -> None:
    trainer, _ = make_trainer(padding_free="off")
    trainer.train()
    assert "last layer" not in trainer.describe_speed()


def test_dropout_that_is_off_leaves_the_random_numbers_as_they_were(model: Any) -> None:
    last_layer, state = LastLayer(model), torch.get_rng_state()
    model.eval()
    with choose_attention(model, model).running():
        assert last_layer.prove()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


class Mean(nn.Module):
    """Works on all positions together."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.cumsum(1)


def mix_positions(model: Any) -> None:
    model.model.layers[-1].mlp = Mean()


def make_keys_of_queries(model: Any) -> None:
    attention = model.model.layers[-1].self_attn
    attention.k_proj.forward = lambda hidden_states: attention.q_proj(hidden_states)[..., :16]


def show_others(model: Any) -> None:
    layer = model.model.layers[-1]
    layer.register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))


def hide_parts(model: Any) -> None:
    layer = model.model.layers[-1]
    layer.attention, layer.feed = layer.self_attn, layer.mlp
    del layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (mix_positions, "logits then differ by .*, and 1.0e-06 is rounding"),
        (make_keys_of_queries, "the model does not run each of its parts once"),
        (show_others, "other positions see more of it than keys and values"),
        (hide_parts, "no layer with parts of known names was found"),
    ],
)
def test_a_model_for_which_it_would_not_be_exact_is_found_out(
    change: Callable[[Any], None], reason: str, model: Any
) -> None:
    choice = choose_attention(model, model)
    change(model)
    last_layer = LastLayer(model)
    with choice.running():
        assert not last_layer.prove()
    assert last_layer.problem is not None
    assert re.fullmatch(reason, last_layer.problem)


class Engine(LastLayerMixin):
    """As much of a trainer as says how it trains."""

    def __init__(self, model: nn.Module, kind: DistributedType) -> None:
        self.model_wrapped = model
        self.accelerator = SimpleNamespace(distributed_type=kind)
        self.args = self.data_collator = None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DistributedType.FSDP, "FSDP looks after its weights"),
        (DistributedType.DEEPSPEED, "DEEPSPEED looks after its weights"),
        (DistributedType.MULTI_GPU, None),
        (DistributedType.NO, None),
    ],
)
def test_sharded_weights_are_left_alone(
    kind: DistributedType, reason: str | None, model: Any
) -> None:
    assert Engine(model, kind)._known_problem(model) == reason


@pytest.mark.parametrize("how", ["wrapped", "in place", "a layer"])
def test_a_compiled_model_is_left_alone(how: str, model: Any) -> None:
    wrapped = model
    if how == "wrapped":
        wrapped = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model.model.layers[0]).compile(backend="eager")
    problem = Engine(wrapped, DistributedType.NO)._known_problem(model)
    assert problem == "the model is compiled"


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_the_model_is_left_as_it_was(is_broken_off: bool, make_trainer: Make) -> None:
    trainer, _ = make_trainer()
    model = trainer.model
    own = model.model.layers[-1].mlp.forward
    # Accelerate, for one, leaves a forward of its own on a module.
    model.model.layers[-1].mlp.forward = own
    seen = []

    def look(*_: Any) -> None:
        seen.append("forward" in vars(model.model.layers[-1].self_attn.q_proj))
        if is_broken_off and seen[-1] and torch.is_grad_enabled():
            raise KeyboardInterrupt

    model.model.layers[-1].register_forward_hook(look)
    if is_broken_off:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    assert True in seen
    assert [n for n, m in model.named_modules() if "forward" in vars(m)] == ["model.layers.1.mlp"]
    assert model.model.layers[-1].mlp.forward == own


def test_a_batch_of_which_nothing_is_trained_gives_a_gradient_of_zeros(
    make_trainer: Make,
) -> None:
    row = {"input_ids": tokens(1, 9), "response_mask": [0] * 9}
    trainer, _ = make_trainer(rows=[row])
    trainer.compute_loss(trainer.model, trainer.data_collator(make_rows())).backward()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_a_position_that_is_asked_for_twice_gets_its_gradient_once(model: Any) -> None:
    model.double()
    mlp = model.model.layers[-1].mlp
    last_layer = LastLayer(model)
    hidden = torch.randn(1, 12, 32, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([7, 2, 7, 11, 2, 2])
    scale = torch.randn(6, 1, dtype=torch.float64)
    (mlp(hidden)[0, wanted] * scale).sum().backward()
    expected = [hidden.grad, *(p.grad for p in mlp.parameters())]
    hidden.grad = None
    mlp.zero_grad()
    with last_layer.running_at(wanted, 12, are_distinct=False):
        output = mlp(hidden)
    (output[0, wanted] * scale).sum().backward()
    assert output.shape == (1, 12, 32)
    for found, ours in zip(
        [hidden.grad, *(p.grad for p in mlp.parameters())], expected, strict=True
    ):
        torch.testing.assert_close(found, ours, rtol=1e-12, atol=1e-14)
