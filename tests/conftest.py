"""Tiny tokenizers and models, built on the spot, and a trained one; nothing is ever downloaded."""

import os

# Before any Hugging Face library is imported: a test that reaches for the network must fail.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests that run side by side share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.overrides import TorchFunctionMode
from trained_model import is_made, trained_model_folder
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_sft_plugin import MaskedSFTConfig

datasets.disable_progress_bars()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the trained model come first: they take longest, and would end alone."""
    with_model = {item.path for item in items if item.get_closest_marker("trained")}
    items.sort(key=lambda item: item.path not in with_model)


@pytest.fixture(scope="module", autouse=True)
def little_to_look_through() -> None:
    """Every training looks for garbage; what is left of earlier files and imports is none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run draws its curves where a test looks at them; they take longer than its training."""
    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr("hf_sft_plugin.training.callbacks.write_report", lambda folder: [])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "hello world what is the answer to this question user assistant system 0123456789"


def make_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens: 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    settings = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        **overrides,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """See `make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes tokenizers with other settings."""
    return make_tokenizer


def make_model(model_type: str = "qwen3", seed: int = 0, **overrides: Any) -> Any:
    """A causal language model of two layers and 300 tokens, with random weights."""
    fields = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        **overrides,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.fixture
def model() -> Any:
    """See `make_model`."""
    return make_model()


@pytest.fixture(scope="session")
def model_factory() -> Callable[..., Any]:
    """Makes models with other settings."""
    return make_model


@pytest.fixture(scope="session")
def trained_model_path() -> str:
    """The folder of a trained model, for tests marked `trained`; skips where it is missing."""
    folder = trained_model_folder()
    if not is_made(folder):
        pytest.skip(f"no trained model in {folder}; `python recipes/trained_model.py` makes it")
    return str(folder)


@pytest.fixture(scope="session")
def load_trained_model(trained_model_path: str) -> Callable[..., Any]:
    """Loads it anew, in float32 or another dtype."""

    def load(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(trained_model_path, dtype=dtype)

    return load


@pytest.fixture(scope="session")
def trained_tokenizer(trained_model_path: str) -> PreTrainedTokenizerBase:
    """Its tokenizer, with its own chat template."""
    return AutoTokenizer.from_pretrained(trained_model_path)


def compute_reference_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    loss_type: str = "nll",
    focal_gamma: float = 2.0,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> torch.Tensor:
    """The loss of each token in float64, as the formulas say; autograd differentiates them."""
    logits = logits.double()
    log_z = logits.exp().sum(-1).log()
    log_p = logits - log_z.unsqueeze(-1)
    log_p_target = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p_target = log_p_target.exp()
    modulation = {"nll": 1.0, "dft": p_target.detach(), "focal": (1 - p_target) ** focal_gamma}
    loss = (1 - label_smoothing) * modulation[loss_type] * -log_p_target
    loss = loss + label_smoothing * -log_p.sum(-1) / logits.shape[-1]
    return loss + z_loss_coef * log_z**2 + entropy_coef * (log_p.exp() * log_p).sum(-1)


@pytest.fixture(scope="session")
def reference_losses() -> Callable[..., torch.Tensor]:
    """See `compute_reference_losses`."""
    return compute_reference_losses


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., MaskedSFTConfig]:
    """Settings of a short, quiet run on the CPU that writes below the test's own folder."""

    def make(**overrides: Any) -> MaskedSFTConfig:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-3,
            **overrides,
        }
        return MaskedSFTConfig(**settings)

    return make


@pytest.fixture
def chat_rows() -> list[dict[str, Any]]:
    """Eight conversations, half of them with two responses."""
    rows = []
    for number in range(8):
        turns = [("user", f"hello {number}"), ("assistant", "world " * (number % 3 + 1) + "!")]
        if number % 2:
            turns += [("user", "again"), ("assistant", str(number))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


@pytest.fixture
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers add adapters by itself: 5.24 asks for a newer PEFT than there is."""
    monkeypatch.setattr(
        "transformers.integrations.peft.check_peft_version", lambda min_version: None
    )


class InFloat64(TorchFunctionMode):
    """Norms and routers work in float64 too.

    They cast to float32 whatever the dtype of the model, and so their gradients are rounded; that
    of a sum, as at tokens that are shared, is rounded otherwise than its parts.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        wider = [torch.float64 if each is torch.float32 else each for each in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wider, **named)


def widen_norms_and_routers(model: nn.Module) -> None:
    """Lets them compute in float64, in the forward pass and when it is run again."""

    def widen(module: nn.Module) -> None:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with InFloat64():
                return own(*args, **kwargs)

        module.forward = forward

    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "Router")):
            widen(module)


@pytest.fixture(scope="session")
def widen() -> Callable[[nn.Module], None]:
    """See `widen_norms_and_routers`."""
    return widen_norms_and_routers


def like_trained(model: Any) -> Any:
    """Gives random weights what trained ones have: outlier features, large norms, peaked logits."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        for name, weight in model.named_parameters():
            is_matrix = weight.dim() > 1 and weight is not embeddings
            weight.mul_(6.0 if is_matrix else 3.0 if "norm" in name else 1.0)
        embeddings.mul_(5.0)
        embeddings[:, 3] *= 60.0
    return model


@pytest.fixture(scope="session")
def trained_like() -> Callable[[Any], Any]:
    """See `like_trained`."""
    return like_trained
