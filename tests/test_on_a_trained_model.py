"""What is promised holds on a trained model: its logits are peaked, its template is a real one."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer, tokenize_example

pytestmark = pytest.mark.trained

CHATS = [
    ["Name a colour.", "Blue."],
    ["What is the capital of France?", "The capital of France is Paris."],
    ["Say yes.", "Yes.", "And now no, in capital letters please.", "NO."],
    ["Count to five.", "1, 2, 3, 4, 5"],
]
ADAPTER = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


def as_messages(turns: list[str]) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"messages": as_messages(turns)} for turns in CHATS]


@pytest.fixture
def make_trainer(
    trained_tokenizer: Any, make_config: Callable[..., MaskedSFTConfig], rows: list[dict[str, Any]]
) -> Callable[..., MaskedSFTTrainer]:
    def make(model: Any, peft_config: Any = None, **settings: Any) -> MaskedSFTTrainer:
        args = make_config(
            **{
                "max_steps": 1,
                "per_device_train_batch_size": 4,
                "max_tokens_per_microbatch": 4096,
                **settings,
            }
        )
        return MaskedSFTTrainer(
            model,
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=trained_tokenizer,
            peft_config=peft_config,
        )

    return make


@pytest.fixture(scope="module")
def truth(load_trained_model: Callable[..., Any], trained_tokenizer: Any) -> Mapping[str, float]:
    """Loss, entropy and accuracy in float64: each row alone, on full logits."""
    model = load_trained_model(torch.float64).eval()
    losses, entropies, hits = [], [], []
    for turns in CHATS:
        for end in range(1, len(turns), 2):
            ids, start = tokens_of(turns[: end + 1], trained_tokenizer)
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            targets = torch.tensor(ids[start:])
            losses.append(-log_p.gather(1, targets[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            hits.append((log_p.argmax(-1) == targets).double())
    names = ("loss", "token_entropy", "token_accuracy")
    figures = [torch.cat(each) for each in (losses, entropies, hits)]
    means = {name: each.mean().item() for name, each in zip(names, figures, strict=True)}
    return {**means, "num_response_tokens": len(figures[0])}


def tokens_of(turns: list[str], tokenizer: Any) -> tuple[list[int], int]:
    """What inference renders, then the last turn with its stop token, and where that begins."""
    prompt = tokenizer.apply_chat_template(
        as_messages(turns[:-1]), add_generation_prompt=True, tokenize=False
    )
    ids = [tokenizer(text)["input_ids"] for text in (prompt, f"{turns[-1]}<|im_end|>")]
    return ids[0] + ids[1], len(ids[0])


def assert_logged(log: Mapping[str, float], truth: Mapping[str, float]) -> None:
    assert {name: log[name] for name in truth} == pytest.approx(truth, rel=1e-5)
    assert log["grad_norm"] > 0


def test_a_step_logs_the_figures_of_full_logits_in_float64(
    make_trainer: Callable[..., MaskedSFTTrainer],
    load_trained_model: Callable[..., Any],
    truth: Mapping[str, float],
) -> None:
    trainer = make_trainer(load_trained_model())
    trainer.train()
    assert_logged(trainer.state.log_history[0], truth)


@pytest.mark.parametrize("opening", ["\n", "\n\n", "\n<think>\n\n</think>\n\n", ": ", ":  ", ""])
def test_before_a_response_stand_the_tokens_that_inference_feeds(
    opening: str, trained_tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """Its tokenizer makes one token of two line breaks at an end, and two before a word."""
    tokenizer = copy.deepcopy(trained_tokenizer)
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template.replace("+ '\n' + message", f"+ '{opening}' + message")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", f"assistant{opening}")
    for row in rows:
        for example in tokenize_example(row, tokenizer):
            start = example["response_mask"].index(1)
            fed = [
                tokenizer.apply_chat_template(
                    row["messages"][:turn], add_generation_prompt=True, return_dict=False
                )
                for turn in range(1, len(row["messages"]), 2)
            ]
            assert example["input_ids"][:start] in fed


def test_what_is_trained_is_what_the_model_would_generate(
    make_trainer: Callable[..., MaskedSFTTrainer],
    load_trained_model: Callable[..., Any],
    trained_tokenizer: Any,
) -> None:
    """Its own greedy answers, trained: each token is the likeliest, from the first to the stop."""
    model = load_trained_model().eval()
    chats, num_tokens = [], 0
    for question in ("What is the capital of France?", "What is 2 + 2?"):
        inputs = trained_tokenizer.apply_chat_template(
            as_messages([question]),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
        answer = tokens[inputs["input_ids"].shape[1] :]
        assert answer[-1] == model.generation_config.eos_token_id
        num_tokens += len(answer)
        chats.append([question, trained_tokenizer.decode(answer, skip_special_tokens=True)])
    rows = Dataset.from_list([{"messages": as_messages(turns)} for turns in chats])
    figures = make_trainer(model).evaluate(rows)
    assert figures["eval_num_response_tokens"] == num_tokens
    assert figures["eval_token_accuracy"] == 1.0


def test_an_adapter_logs_the_same_resumes_exactly_and_gives_the_same_logits_when_it_is_loaded(
    make_trainer: Callable[..., MaskedSFTTrainer],
    load_trained_model: Callable[..., Any],
    trained_tokenizer: Any,
    truth: Mapping[str, float],
    tmp_path: Path,
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    adapter = LoraConfig(**ADAPTER, lora_dropout=0.1)
    whole, resumed = (make_trainer(load_trained_model(), adapter, **settings) for _ in range(2))
    whole.train()
    # At first, an adapter adds nothing.
    assert_logged(whole.state.log_history[0], truth)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == losses
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(weights[n], p) for n, p in resumed.model.named_parameters())

    whole.save_model(str(tmp_path / "adapter"))
    ids, _ = tokens_of(CHATS[1], trained_tokenizer)
    base = load_trained_model().eval()
    with torch.no_grad():
        before = base(torch.tensor([ids])).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        logits = loaded(torch.tensor([ids])).logits
        trained = whole.model.eval()(torch.tensor([ids])).logits
    torch.testing.assert_close(logits, trained, rtol=1e-5, atol=1e-4)
    assert (logits - before).abs().max() > 0.1
