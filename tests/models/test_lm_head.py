"""The fused head on real architectures: the same loss and gradient as their own full logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sft_plugin.batches.response_batch import ResponseBatch
from hf_sft_plugin.loss import head as head_module
from hf_sft_plugin.loss.logit_tile import LogitTransform
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.models.lm_head import (
    FusedHead,
    HeadChooser,
    find_transform,
    forward_full,
)

NLL = LossObjective()
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 5.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 tied": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "gemma2 soft-capped": ("gemma2", GEMMA),
    "gemma3 soft-capped": ("gemma3_text", GEMMA),
    "cohere scaled": ("cohere", {"logit_scale": 0.25}),
    "granite scaled": ("granite", {"logits_scaling": 4.0}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "phi biased head": ("phi", {"tie_word_embeddings": False}),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "output_router_logits": True, "experts_implementation": "eager"},
    ),
}


def trained(targets: Tensor) -> Tensor:
    return (targets != -100).flatten().nonzero()[:, 0]


def as_batch(inputs: dict[str, Any], targets: Tensor, weights: Tensor) -> ResponseBatch:
    counts = weights.sum(-1), (targets != -100).sum(-1)
    return ResponseBatch(inputs, targets, targets, weights, *counts, trained(targets))


def make_batch() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs with padding, shifted targets and weights; the second row has no target."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 300, (3, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[2, 6:] = 0
    targets = torch.randint(3, 300, (3, 9), generator=generator)
    targets[0, :4] = -100
    targets[1] = -100
    targets[2, 5:] = -100
    weights = torch.rand(3, 9, generator=generator, dtype=torch.float64)
    return {"input_ids": input_ids, "attention_mask": attention_mask}, targets, weights


def run(
    forward: Callable[..., Any], model: Any, *batch: Any
) -> tuple[Tensor, dict[str, Tensor], Any]:
    model.zero_grad()
    result = forward(model, *batch)
    result = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    result.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result.loss.detach(), gradients, result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fused_head_equals_the_models_own_logits(
    name: str, model_factory: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sft_plugin.loss.tile_choice._CPU_BYTES", 3 * 300 * 8)
    model_type, fields = ARCHITECTURES[name]
    model = model_factory(model_type, **fields).double().eval()
    inputs, targets, weights = make_batch()
    transform = find_transform(model, model, inputs)
    assert transform is not None
    fused, fused_gradients, a = run(
        FusedHead(model, transform).forward, model, as_batch(inputs, targets, weights), NLL
    )
    full, full_gradients, b = run(forward_full, model, as_batch(inputs, targets, weights), NLL)
    torch.testing.assert_close(fused, full, rtol=1e-12, atol=1e-12)
    for one, other in zip(a.stats, b.stats, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert fused_gradients.keys() == full_gradients.keys()
    for key, gradient in full_gradients.items():
        torch.testing.assert_close(fused_gradients[key], gradient, rtol=1e-10, atol=1e-13)
    assert (a.aux_loss is None) == (name != "mixtral")
    if name == "mixtral":
        torch.testing.assert_close(a.aux_loss, b.aux_loss)


def test_scaling_and_soft_capping_are_measured_not_assumed(
    model_factory: Callable[..., Any],
) -> None:
    """With a wrong transformation the loss would differ; the measured one is the model's."""
    inputs, targets, weights = make_batch()
    model = model_factory("cohere", logit_scale=0.25).double().eval()
    wrong = FusedHead(model, LogitTransform()).forward(
        model, as_batch(inputs, targets, weights), NLL
    )
    right, _ = forward_full(model, as_batch(inputs, targets, weights), NLL)
    assert abs(wrong.loss.item() - right.loss.item()) > 1e-3


def test_an_unknown_transformation_of_the_logits_is_noticed(model: Any) -> None:
    own_forward = model.forward

    def forward_with_a_twist(*args: Any, **kwargs: Any) -> Any:
        outputs = own_forward(*args, **kwargs)
        outputs.logits = outputs.logits + outputs.logits.mean()
        return outputs

    model.forward = forward_with_a_twist
    inputs, _, _ = make_batch()
    assert find_transform(model, model, inputs) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("qwen3", {}, lambda z: z),
        ("gemma2", GEMMA, lambda z: torch.tanh(z / 5) * 5),
        ("gemma2", {**GEMMA, "final_logit_softcapping": None}, lambda z: z),
        ("cohere", {"logit_scale": 0.25}, lambda z: z * 0.25),
        ("cohere", {"logit_scale": 1.0}, lambda z: z),
        ("granite", {"logits_scaling": 8.0}, lambda z: z / 8),
        ("granite", {"logits_scaling": 1.0}, lambda z: z),
    ],
)
def test_the_transformation_does_not_depend_on_the_weights(
    model_type: str,
    fields: dict[str, Any],
    expected: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    model_factory: Callable[..., Any],
) -> None:
    """On the zeros of such a head any scaling and any soft cap would seem to fit."""
    model = model_factory(model_type, **fields, tie_word_embeddings=False).to(dtype)
    nn.init.zeros_(model.lm_head.weight)
    inputs, _, _ = make_batch()
    transform = find_transform(model, model, inputs)
    assert transform is not None
    values = torch.linspace(-90, 80, 33, dtype=dtype)
    assert torch.equal(transform(values), expected(values))


@pytest.mark.parametrize("scale", [-1.0, 3.0])
def test_a_scaling_that_the_config_does_not_name_is_noticed(
    scale: float, model: Any, model_factory: Callable[..., Any]
) -> None:
    own_forward = model.forward

    def forward_in_place(*args: Any, **kwargs: Any) -> Any:
        outputs = own_forward(*args, **kwargs)
        outputs.logits.mul_(scale)
        return outputs

    model.forward = forward_in_place
    nn.init.zeros_(model.lm_head.weight)
    inputs, _, _ = make_batch()
    assert find_transform(model, model, inputs) is None


def test_of_two_transformations_that_fit_but_differ_none_is_taken(
    model_factory: Callable[..., Any],
) -> None:
    """A cap so high that it hardly bends what is planted."""
    model = model_factory("gemma2", **{**GEMMA, "final_logit_softcapping": 3e4})
    inputs, _, _ = make_batch()
    assert find_transform(model, model, inputs) is None


def test_looking_for_the_transformation_is_one_forward_pass_that_leaves_no_trace(
    model_factory: Callable[..., Any],
) -> None:
    model = model_factory(attention_dropout=0.5).train()
    inputs, _, _ = make_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls, positions = [], []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: positions.append(hidden.shape[1]) or own(hidden)
    random_state = torch.get_rng_state()
    assert find_transform(model, model, inputs) is not None
    assert calls == [False]
    assert positions == [1]  # the head's matrix meets one position, not the whole row
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_head_that_is_told_more_than_hidden_states_is_noticed(model: Any) -> None:
    """As heads are whose adapter begins somewhere in a row: a tile would not know its part."""
    inputs, _, _ = make_batch()
    told: list[Any] = []

    def tell(_: Any, given: Any, options: dict[str, Any]) -> Any:
        return given, {**options, "offsets": [3, 1, 4]}

    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden, offsets: told.append(offsets) or own(hidden)
    model.lm_head.register_forward_pre_hook(tell, with_kwargs=True)
    assert find_transform(model, model, inputs) is None
    assert told == [[3, 1, 4]]


@pytest.mark.parametrize(
    ("model_type", "name", "fields"),
    [
        ("gemma2", "final_logit_softcapping", GEMMA),
        ("recurrent_gemma", "logits_soft_cap", {"lru_width": 32, "num_hidden_layers": 3}),
        ("xlstm", "output_logit_soft_cap", {"num_heads": 4}),
    ],
)
def test_soft_caps_are_known_by_all_their_names(
    model_type: str, name: str, fields: dict[str, Any], model_factory: Callable[..., Any]
) -> None:
    inputs, _, _ = make_batch()
    model = model_factory(model_type, **{**fields, name: 6.0})
    assert find_transform(model, model, inputs) == LogitTransform(softcap=6.0)


def test_a_model_without_an_lm_head_is_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    inputs, _, _ = make_batch()
    assert find_transform(model, model, inputs) is None


def test_the_model_is_left_as_it_was(model: Any) -> None:
    inputs, targets, weights = make_batch()
    model.train()
    before = (
        dict(model.lm_head.__dict__),
        len(model._forward_hooks),
        len(model.lm_head._forward_hooks),
    )
    transform = find_transform(model, model, inputs)
    assert transform is not None
    head = FusedHead(model, transform)
    head.forward(model, as_batch(inputs, targets, weights), NLL)
    with pytest.raises(RuntimeError):
        head.forward(
            model, as_batch({"input_ids": inputs["input_ids"].float()}, targets, weights), NLL
        )
    after = (
        dict(model.lm_head.__dict__),
        len(model._forward_hooks),
        len(model.lm_head._forward_hooks),
    )
    assert before == after
    assert model.training
    assert model(**inputs).logits.shape == (3, 9, 300)


def test_full_logits_may_be_taken_for_a_while(model: Any) -> None:
    chooser, inputs = HeadChooser(), {"input_ids": torch.tensor([[3, 4, 5]])}
    head = chooser.choose(model, model, inputs, "auto")
    assert head is not None
    with chooser.full_logits():
        assert chooser.choose(model, model, inputs, "auto") is None
    assert chooser.choose(model, model, inputs, "auto") is head


def test_a_forward_of_its_own_on_the_head_is_used_and_comes_back(model: Any) -> None:
    """Accelerate's hooks replace the forward of a module instance, to move inputs for example."""
    inputs, targets, weights = make_batch()
    plain, _ = forward_full(model, as_batch(inputs, targets, weights), NLL)
    own = model.lm_head.forward
    calls = []

    def hooked(hidden_states: Tensor) -> Tensor:
        calls.append(hidden_states.shape)
        return own(hidden_states)

    model.lm_head.forward = hooked
    head = FusedHead(model, LogitTransform())
    result = head.forward(model, as_batch(inputs, targets, weights), NLL)
    assert calls == [(10, 32)]  # the response rows alone
    assert model.lm_head.forward is hooked
    torch.testing.assert_close(result.loss, plain.loss)


@pytest.mark.parametrize(
    ("settings", "is_short"),
    [
        (None, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
    ids=["no adapter", "all-linear", "lora on the head", "trained copy of the head"],
)
def test_a_head_that_is_a_linear_layer_goes_the_short_way_and_no_other(
    settings: dict[str, Any] | None,
    is_short: bool,
    model_factory: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_factory(tie_word_embeddings=settings is None)
    if settings is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    ways = []
    for name in ("linear_head_loss", "fused_head_loss"):
        original = getattr(head_module, name)

        def noted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            ways.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(head_module, name, noted)
    inputs, targets, weights = make_batch()
    transform = find_transform(model, model, inputs)
    assert transform is not None
    run(FusedHead(model, transform).forward, model, as_batch(inputs, targets, weights), NLL)
    assert ways == ["linear_head_loss" if is_short else "fused_head_loss"]


OBJECTIVE = LossObjective("focal", label_smoothing=0.1, z_loss_coef=0.01, entropy_coef=0.2)


@pytest.mark.parametrize("name", ["qwen3 tied", "gemma2 soft-capped", "phi biased head", "mixtral"])
def test_an_objective_has_the_gradient_that_it_has_on_full_logits(
    name: str, model_factory: Callable[..., Any]
) -> None:
    model_type, fields = ARCHITECTURES[name]
    model = model_factory(model_type, **fields).double().eval()
    inputs, targets, weights = make_batch()
    transform = find_transform(model, model, inputs)
    assert transform is not None
    batch = as_batch(inputs, targets, weights), OBJECTIVE
    fused, fused_gradients, a = run(FusedHead(model, transform).forward, model, *batch)
    full, full_gradients, b = run(forward_full, model, *batch)
    torch.testing.assert_close(fused, full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.token_losses, b.token_losses, rtol=1e-12, atol=1e-12)
    for key, gradient in full_gradients.items():
        torch.testing.assert_close(fused_gradients[key], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=["all-linear", "lora on the head", "trained copy of the head", "dora"],
)
def test_adapters_train_with_the_same_gradient_as_on_full_logits(
    settings: dict[str, Any], model_factory: Callable[..., Any]
) -> None:
    base = model_factory(tie_word_embeddings=False).double()
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    model = model.double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    inputs, targets, weights = make_batch()
    transform = find_transform(model, model, inputs)
    assert transform is not None
    fused, fused_gradients, _ = run(
        FusedHead(model, transform).forward, model, as_batch(inputs, targets, weights), NLL
    )
    full, full_gradients, _ = run(forward_full, model, as_batch(inputs, targets, weights), NLL)
    torch.testing.assert_close(fused, full, rtol=1e-12, atol=1e-12)
    assert fused_gradients.keys() == full_gradients.keys()
    assert all(gradient.any() for gradient in full_gradients.values())
    for key, gradient in full_gradients.items():
        torch.testing.assert_close(fused_gradients[key], gradient, rtol=1e-10, atol=1e-13)


# The name that every supported version of transformers knows; newer ones call it deprecated.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(model_factory: Callable[..., Any]) -> None:
    inputs, targets, weights = make_batch()
    gradients = []
    for checkpointing in (False, True):
        model = model_factory().double().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head = FusedHead(model, LogitTransform())
        gradients.append(run(head.forward, model, as_batch(inputs, targets, weights), NLL)[1])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-12, atol=1e-14)


def test_a_compiled_model_is_not_compiled_again_for_another_number_of_rows(model: Any) -> None:
    graphs = []

    def compile_nothing(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    inputs, targets, weights = make_batch()
    head = FusedHead(model, LogitTransform())
    plain = run(head.forward, model, as_batch(inputs, targets, weights), NLL)[0]
    torch.compiler.reset()
    compiled = torch.compile(model, backend=compile_nothing)
    torch.testing.assert_close(
        head.forward(compiled, as_batch(inputs, targets, weights), NLL).loss, plain
    )
    num_graphs = len(graphs)
    assert num_graphs > 0
    for num_left_out in (1, 2, 3):
        targets[0, -num_left_out:] = -100
        expected = head.forward(model, as_batch(inputs, targets, weights), NLL).loss
        found = head.forward(compiled, as_batch(inputs, targets, weights), NLL).loss
        torch.testing.assert_close(found, expected)
    assert len(graphs) == num_graphs


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("is_alone", [True, False])
def test_a_head_on_another_device_is_followed(
    is_fused: bool, is_alone: bool, model_factory: Callable[..., Any]
) -> None:
    """Tensors that hold nothing know where they are, and do not mix with those of elsewhere."""
    known = as_batch(*make_batch())
    inputs = known.model_inputs
    with FakeTensorMode() as mode:
        model = model_factory(tie_word_embeddings=False)
        weight = nn.Parameter(torch.empty(300, 32, device="meta"))
        model.lm_head.weight = weight
        # As Accelerate does it.
        model.lm_head.forward = lambda rows: F.linear(rows.to("meta"), weight)
        if not is_alone:
            model.model.norm.register_forward_hook(lambda _, __, hidden: hidden.to("meta"))
        inputs = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        tensors = (mode.from_tensor(tensor) for tensor in known[1:7])
        batch = ResponseBatch(inputs, *tensors)
        fused = FusedHead(model, LogitTransform())
        result = (
            fused.forward(model, batch, NLL) if is_fused else forward_full(model, batch, NLL)[0]
        )
        result.loss.backward()
    for tensor in (result.loss, result.token_losses, *result.stats):
        assert tensor.device.type == "cpu"
    devices = {name: p.grad.device.type for name, p in model.named_parameters()}
    assert devices.pop("lm_head.weight") == "meta"
    assert set(devices.values()) == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_head_on_a_gpu_gives_the_numbers_of_one_beside_its_body(
    model_factory: Callable[..., Any],
) -> None:
    inputs, targets, weights = make_batch()
    found = []
    for device in ("cpu", "cuda"):
        model = model_factory(tie_word_embeddings=False).double()
        add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device=device))
        model.lm_head.to(device)
        head = FusedHead(model, LogitTransform())
        found.append(run(head.forward, model, as_batch(inputs, targets, weights), NLL)[:2])
    (expected_loss, expected), (loss, gradients) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key].cpu(), gradient, rtol=1e-10, atol=1e-13)
