"""Norms, MLPs and rotary embeddings run as one function each, and nothing else changes."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_step import OwnTrainer, fused, gradient_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback
from transformers.models.llama import modeling_llama

from hf_sft_plugin import DataCollatorForPromptResponse
from hf_sft_plugin.models import fused_layers
from hf_sft_plugin.models.fused_layers import FusedLayers

Make = Callable[..., Any]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
# Models of the tests have two layers.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "5 norms, 2 gated MLPs, rotary embeddings"),
    "qwen3": ({}, "9 norms, 2 gated MLPs, rotary embeddings"),
    "gemma3_text": ({}, "13 norms, 2 gated MLPs, rotary embeddings"),
    "mixtral": (EXPERTS, "5 norms, rotary embeddings"),
}
IDS = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))


def gradient(model: Any, **settings: Any) -> Tensor:
    """Of the mean loss of some tokens, in float64."""
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False, **settings).loss.backward()
    return gradient_of(model)


def kept_bytes(model: Any) -> int:
    """What is kept for the backward pass, weights aside, each storage once."""
    storages: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states = model.model(IDS, use_cache=False).last_hidden_state
    kept = [t.untyped_storage().nbytes() for at, t in storages.items() if at not in weights]
    assert hidden_states.isfinite().all()
    return sum(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_errs_no_more_than_the_model_and_says_what_is_fused(
    family: str, model_factory: Make, widen: Callable[[nn.Module], None]
) -> None:
    fields, summary = FAMILIES[family]
    model = model_factory(family, **fields)
    exact = copy.deepcopy(model).double()
    widen(exact)
    truth, own = gradient(exact), gradient(model)
    with fused(model) as layers:
        assert layers.summary == f"{summary}, each as one function"
        found = gradient(model)
    assert (found - truth).norm() <= (own - truth).norm() + 1e-6 * truth.norm()
    # What ran was something else, and runs no more.
    assert not torch.equal(found, own)
    assert torch.equal(gradient(model), own)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_float64_the_gradient_is_that_of_the_model(
    family: str, model_factory: Make, widen: Callable[[nn.Module], None]
) -> None:
    model = model_factory(family).double()
    widen(model)
    own = gradient(model)
    with fused(model):
        assert (gradient(model) - own).norm() < 1e-14 * own.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_runs_again_what_it_ran(
    use_reentrant: bool, model_factory: Make
) -> None:
    model = model_factory("qwen3")
    model.train()
    with fused(model):
        own = gradient(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        assert torch.equal(gradient(model), own)


def test_autocast_gives_what_it_gives_the_model(model_factory: Make) -> None:
    model = model_factory("qwen3")
    truth = gradient(copy.deepcopy(model).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = gradient(model)
        with fused(model):
            found = gradient(model)
    assert (found - truth).norm() <= 1.1 * (own - truth).norm()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_less_is_kept_for_the_backward_pass(family: str, model_factory: Make) -> None:
    model = model_factory(family, intermediate_size=96)
    own = kept_bytes(model)
    with fused(model):
        assert kept_bytes(model) < 0.8 * own


def test_what_breaks_off_on_the_way_leaves_nothing(
    model_factory: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_factory("llama")

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_layers, "_replaced_rotary", stop)
    with pytest.raises(KeyboardInterrupt):
        FusedLayers(model)
    assert not any("forward" in vars(module) for module in model.modules())


class OtherNorm(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]
    """A norm of somebody's own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Twice the norm."""
        return 2 * super().forward(hidden_states)  # type: ignore[no-any-return]


def test_code_that_is_not_known_is_left_alone(model_factory: Make) -> None:
    model = model_factory("llama")
    hidden_size = model.config.hidden_size
    model.model.norm = OtherNorm(hidden_size)
    first, second = model.model.layers
    first.mlp.act_fn = nn.PReLU()
    # As Accelerate leaves it there, and others.
    second.input_layernorm.forward = own = second.input_layernorm.forward
    with fused(model) as layers:
        assert layers.summary.startswith("3 norms, 1 gated MLPs")
        assert second.input_layernorm.forward is own
    gpt = model_factory("gpt2", n_inner=48)
    with fused(gpt) as layers:
        assert layers.summary == "as the model has them: none is of a known kind"


class Counting(nn.SiLU):
    """An activation that is another each time."""

    calls = 0

    def forward(self, gate: Tensor) -> Tensor:
        """Times how often it ran."""
        self.calls += 1
        return self.calls * super().forward(gate)


@pytest.mark.parametrize("activation", [nn.RReLU(), Counting(), nn.ReLU(inplace=True)])
def test_an_activation_that_may_not_run_again_runs_once(
    activation: nn.Module, model_factory: Make
) -> None:
    model = model_factory("llama")
    model.model.layers[0].mlp.act_fn = activation
    with fused(model) as layers:
        assert layers.summary.startswith("5 norms, 1 gated MLPs")
        assert gradient(model).isfinite().all()


def test_a_hook_on_an_activation_sees_it_once_and_may_put_it_into_the_loss(
    model_factory: Make,
) -> None:
    model, seen = model_factory("llama"), []

    def gradient_with_penalty() -> Tensor:
        seen.clear()
        model.zero_grad()
        loss = model(IDS, labels=IDS, use_cache=False).loss
        (loss + sum(each.square().sum() for each in seen)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with fused(model):
        # Put there when the run has begun.
        for layer in model.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda _, __, output: seen.append(output))
        found = gradient_with_penalty()
        assert len(seen) == 2
    own = gradient_with_penalty()
    assert (found - own).norm() < 1e-6 * own.norm()


def test_a_weight_for_each_head_and_a_class_from_nowhere_run_as_they_are(
    model_factory: Make,
) -> None:
    model = model_factory("llama")
    own = model(IDS).logits
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().expand(IDS.shape[1], -1).clone())
    # As from a file that was run, but not imported.
    norm.__class__ = type("Norm", (modeling_llama.LlamaRMSNorm,), {"__module__": "nowhere"})
    with fused(model):
        assert (model(IDS).logits - own).norm() < 1e-6 * own.norm()
        assert gradient(model).isfinite().all()


@pytest.mark.parametrize(("family", "name"), [("llama", "hidden_states"), ("gemma", "x")])
def test_arguments_go_by_the_names_that_the_model_has_for_them(
    family: str, name: str, model_factory: Make
) -> None:
    model, x = model_factory(family), torch.ones(1, 2, 32)
    with fused(model):
        assert torch.equal(model.model.norm(**{name: x}), model.model.norm(x))
        mlp = model.model.layers[0].mlp
        assert torch.equal(mlp(x=x), mlp(x))


def test_a_model_written_to_a_file_while_training_has_its_own_code_there(
    model_factory: Make,
) -> None:
    model, file = model_factory("llama"), io.BytesIO()
    own = gradient(model)
    with fused(model):
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(gradient(torch.load(file, weights_only=False)), own)


def test_a_copy_made_while_training_has_its_own_weights(model_factory: Make) -> None:
    model = model_factory("llama")
    with fused(model):
        duplicate = copy.deepcopy(model)
    before = duplicate(IDS).logits
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(duplicate(IDS).logits, before)


def test_angles_that_are_trained_take_the_models_own_rotation(model_factory: Make) -> None:
    angles = torch.randn(1, 5, 8, requires_grad=True)
    heads = torch.randn(1, 2, 5, 8)
    with fused(model_factory("llama")):
        rotated, _ = modeling_llama.apply_rotary_pos_emb(heads, heads, angles, angles)
    rotated.sum().backward()
    assert angles.grad is not None


class Watcher(TrainerCallback):
    """Sees what is fused at a step, and may fail there."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts modules with another forward."""
        self.num_fused = sum("forward" in vars(module) for module in kwargs["model"].modules())
        if self.fails:
            raise RuntimeError("stop")


def make_trainer(
    model: Any, make_config: Make, tokenizer: Any, watcher: Watcher, **settings: Any
) -> OwnTrainer:
    rows = [{"input_ids": row.tolist(), "response_mask": [0] * 10 + [1] * 30} for row in IDS]
    return OwnTrainer(
        model,
        make_config(max_steps=1, **settings),
        data_collator=DataCollatorForPromptResponse(tokenizer),
        train_dataset=rows,  # type: ignore[arg-type]
        callbacks=[watcher],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_training_fuses_and_leaves_the_model_as_it_was(
    fails: bool, model_factory: Make, make_config: Make, tokenizer: Any
) -> None:
    model, watcher = model_factory("llama"), Watcher(fails)
    own = modeling_llama.apply_rotary_pos_emb
    trainer = make_trainer(model, make_config, tokenizer, watcher)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            trainer.train()
    else:
        trainer.train()
    assert watcher.num_fused == 7
    assert not any("forward" in vars(module) for module in model.modules())
    assert modeling_llama.apply_rotary_pos_emb is own
    assert trainer.layers_summary is None


def test_it_can_be_switched_off(model_factory: Make, make_config: Make, tokenizer: Any) -> None:
    watcher = Watcher()
    trainer = make_trainer(model_factory("llama"), make_config, tokenizer, watcher)
    trainer.fused_layers = "off"
    trainer.train()
    assert watcher.num_fused == 0
    assert trainer.layers_summary == "as the model has them, because fused_layers is 'off'"
    trainer.fused_layers = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="fused_layers is False; choose auto or off"):
        trainer.train()


def test_a_compiled_model_is_left_to_its_compiler(
    model_factory: Make, make_config: Make, tokenizer: Any
) -> None:
    model, watcher = model_factory("llama"), Watcher()
    # As `compile` leaves a module, without the wait for the compiler.
    layer = model.model.layers[0]
    layer._compiled_call_impl = layer.forward
    trainer = make_trainer(model, make_config, tokenizer, watcher)
    trainer.train()
    assert watcher.num_fused == 0
    assert trainer.layers_summary == "as the model has them, because the compiler fuses more"
