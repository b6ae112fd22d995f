"""The recipe as its users run it: settings in; a model, an adapter and an account of it out."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sft
import yaml
from arguments import parse_arguments
from datasets import Dataset
from peft import PeftModel
from quickstart import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft_plugin import GeneratedResponse, MaskedSFTConfig, prepare_dataset, write_shards

ROWS = [{"prompt": f"Say {number}", "response": f"{number}!"} for number in range(12)]
TINY_MODEL = json.dumps(
    {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
)
MODEL = ("--model_config", TINY_MODEL)
SHORT = ("--max_steps", "2", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "1")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the recipe in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run_recipe(*argv: str) -> str:
        flags = (*argv, "--use_cpu", "1", "--num_cpu_threads", "1", "--output_dir", "out")
        monkeypatch.setattr(sys, "argv", ["sft.py", *flags])
        sft.main()
        return capsys.readouterr().out

    return run_recipe


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.mark.curves
def test_the_quickstart_says_what_it_does_and_shows_what_it_learned(
    run: Callable[..., str], recipes: Path, tmp_path: Path
) -> None:
    printed = run(
        str(recipes / "configs" / "quickstart.yaml"),
        *("--max_train_rows", "100", "--max_eval_rows", "16", "--num_train_epochs", "1"),
    )
    for part in ("About to train", "100 in = 100 trained", "parameters", "4 of 32 rows"):
        assert part in printed
    for part in ("Held-out rows", "exact match", "before training", "Some answers", "out/"):
        assert part in printed
    folder = tmp_path / "out"
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 1e5
    assert AutoTokenizer.from_pretrained(folder).chat_template
    for name in ("README.md", "metrics.jsonl", "report/loss.png", "report/token_entropy.png"):
        assert (folder / name).is_file()


def test_a_model_learns_to_answer_prompts_it_has_not_seen(
    run: Callable[..., str], tmp_path: Path
) -> None:
    forms = (
        "Say {}",
        "Please say {}",
        "Now say {}.",
        "Can you say {}?",
        "Would you say {}?",
        "I say {}",
    )
    pairs = [(form, word) for form in forms for word in WORDS[:24]]
    for name, is_held_out in (("train", False), ("eval", True)):
        chosen = [pair for n, pair in enumerate(pairs) if (n % 7 == 3) == is_held_out]
        rows = [{"prompt": f.format(w), "response": w} for f, w in chosen]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    config = {**json.loads(TINY_MODEL), "hidden_size": 64, "initializer_range": 0.05}
    run(
        *("--train_file", "train.json", "--eval_file", "eval.json", "--prompt_format", "chat"),
        *("--model_config", json.dumps(config), "--tokenizer_vocab_size", "400"),
        *("--num_train_epochs", "20", "--learning_rate", "5e-3", "--eval_on_start", "1"),
        *("--predict_with_generate", "1", "--generation_max_new_tokens", "8"),
        *("--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "1"),
    )
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    matches = [log["eval_exact_match"] for log in map(json.loads, lines) if "eval_loss" in log]
    assert matches[0] == 0.0
    assert matches[-1] >= 0.95


def test_lora_leaves_an_adapter_that_reloads(
    run: Callable[..., str], train_file: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    printed = run(
        *("--model_name_or_path", "base", "--train_file", train_file, "--lora", "--lora_r", "4"),
        *SHORT,
    )
    assert "of them trained" in " ".join(printed.split())
    assert not (tmp_path / "out" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = PeftModel.from_pretrained(base, tmp_path / "out")
    assert adapter.peft_config["default"].r == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == tokenizer.eos_token


def test_a_checkpoint_is_resumed(run: Callable[..., str], train_file: str, tmp_path: Path) -> None:
    flags = ("--train_file", train_file, "--model_config", TINY_MODEL, "--report_to", "none")
    steps = ("--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1")
    run(*flags, *steps, "--max_steps", "2")
    run(*flags, *steps, "--max_steps", "3", "--resume_from_checkpoint", "out/checkpoint-2")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [log["step"] for log in map(json.loads, lines) if "loss" in log] == [1, 2, 3]
    run(*flags, *steps, "--max_steps", "4", "--resume_from_checkpoint", "true")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [log["step"] for log in map(json.loads, lines) if "loss" in log] == [1, 2, 3, 4]
    other = (*steps, "--max_steps", "5", "--per_device_train_batch_size", "3")
    with pytest.raises(SystemExit, match=r"^sft\.py: .*checkpoint-4 cannot be resumed where it"):
        run(*flags, *other, "--resume_from_checkpoint", "true")


def test_a_mistake_that_nothing_explains_keeps_its_traceback(
    run: Callable[..., str], train_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(sft.MaskedSFTTrainer, "train", fail)
    with pytest.raises(ValueError, match="a bug"):
        run("--train_file", train_file, *MODEL, *SHORT)


def test_rows_held_out_by_share_are_evaluated(run: Callable[..., str], train_file: str) -> None:
    flags = ("--train_file", train_file, "--model_config", TINY_MODEL, "--eval_share", "0.25")
    printed = run(*flags, *SHORT)
    assert "9 in = 9 trained" in printed
    assert "Held-out rows" in printed


def test_rows_are_packed_by_a_flag(run: Callable[..., str], train_file: str) -> None:
    text = run(
        "--train_file", train_file, *MODEL, *SHORT, "--packing", "true", "--max_length", "64"
    )
    assert re.search(r"12 rows in \d packed rows of up to 64 tokens, \d+\.\d% filled", text)


def test_a_run_is_verified_by_a_flag_and_one_that_fails_ends_without_a_traceback(
    run: Callable[..., str], train_file: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    printed = run("--train_file", train_file, *MODEL, *SHORT, "--verify")
    assert printed.count("Verified before step 1") == 1
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    halves = ("--model_init_kwargs", '{"dtype": "bfloat16"}', "--learning_rate", "1e-6")
    flags = ("--model_name_or_path", "base", "--train_file", train_file, *halves, *SHORT)
    with pytest.raises(SystemExit, match=r"sft\.py: Nothing was trained, because\nupdates: "):
        run(*flags, "--verify_before_training", "true")


def test_a_chat_template_may_come_from_a_file(
    run: Callable[..., str], train_file: str, model: Any, tokenizer_factory: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "base")
    tokenizer_factory(chat_template=None).save_pretrained(tmp_path / "base")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "template.jinja").write_text(template)
    run(
        *("--model_name_or_path", "base", "--train_file", train_file, "--prompt_format", "chat"),
        *("--chat_template_path", "template.jinja", *SHORT),
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_pushing_goes_through_the_trainers_own_path(
    run: Callable[..., str], train_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushes = []
    monkeypatch.setattr(sft.MaskedSFTTrainer, "init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr(sft.MaskedSFTTrainer, "push_to_hub", lambda self: pushes.append(self))
    flags = ("--train_file", train_file, "--model_config", TINY_MODEL)
    run(*flags, *SHORT, "--push_to_hub", "--hub_model_id", "me/tiny")
    assert len(pushes) == 1

    def stop(trainer: Any, **kwargs: Any) -> None:
        trainer.state.global_step, trainer.state.max_steps = 1, 2

    # As SIGTERM does: what is not finished is not published.
    monkeypatch.setattr(sft.MaskedSFTTrainer, "train", stop)
    run(*flags, *SHORT, "--push_to_hub", "--hub_model_id", "me/tiny")
    assert len(pushes) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--train_file", "rows.csvv", "--model_config", TINY_MODEL),
            "'rows.csvv' ends in '.csvv'",
        ),
        (("--train_file", "none.jsonl", "--model_config", TINY_MODEL), "There is no 'none.jsonl'"),
        (("--train_file", "rows.jsonl"), "Name the model to fine-tune"),
        (
            ("--train_file", "rows.jsonl", "--model_name_or_path", "./nowhere"),
            "model_name_or_path is './nowhere', from which nothing could be loaded",
        ),
        (
            ("--train_file", "rows.jsonl", "--tokenizer_name_or_path", "./no", *MODEL),
            "tokenizer_name_or_path is './no', from which nothing could be loaded",
        ),
        (
            ("--train_file", "rows.jsonl", "--chat_template_path", "no.jinja", *MODEL),
            "chat_template_path is 'no.jinja', but there is no such file",
        ),
        (
            ("--train_file", "rows.jsonl", "--chat_template_path", "a.jinja", *MODEL),
            "chat_template_path is 'a.jinja', which is not text in UTF-8",
        ),
        (
            ("--train_file", "rows.jsonl", "--model_config", '{"hidden_size":3}'),
            'model_config is {"hidden_size": 3}, without a model_type',
        ),
        (
            ("--train_file", "rows.jsonl", "--model_config", '{"model_type":"qwen3","hidden":3}'),
            "model_config: 'hidden' is no field of a qwen3 config. Did you mean 'hidden_act'?",
        ),
        (
            ("--train_file", "rows.jsonl", "--model_config", "{bad"),
            "model_config is '{bad', which is not JSON",
        ),
        (
            ("--train_file", "rows.jsonl", "--model_config", '{"model_type": "qwen33"}'),
            "model_config: the model_type 'qwen33' is unknown to transformers. Did you mean",
        ),
        (
            ("--predict_with_generate", "--generation_metrics", "rouge"),
            "generation_metrics names 'rouge', which cannot be loaded",
        ),
        (
            ("--resume_from_checkpoint", "nodir"),
            "resume_from_checkpoint is 'nodir', but there is no trainer_state.json in it",
        ),
        (
            ("--resume_from_checkpoint", "true"),
            "resume_from_checkpoint is true, but 'out' holds no checkpoint",
        ),
        (
            ("--train_file", "rows.jsonl", "--eval_masks", "all", *MODEL),
            "eval_masks is set, but there are no held-out rows to evaluate",
        ),
        (("--lora_r", "8"), "lora_r is 8, but there is no --lora"),
        (("--lora_alpha=32",), "lora_alpha is 32, but there is no --lora"),
        (("--lora-target-modules", "q_proj"), "lora_target_modules is 'q_proj', but there is no"),
        (
            ("--train_file", "rows.jsonl", "--lora", "--lora_target_modules", ",", *MODEL),
            "lora_target_modules is ',', which names no module",
        ),
        (
            ("--train_file", "rows.jsonl", "--model_config", TINY_MODEL, "--prompt_column", "q"),
            "There is no column 'q'",
        ),
    ],
)
def test_a_mistake_ends_in_one_clear_message(
    argv: tuple[str, ...],
    message: str,
    run: Callable[..., str],
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jinja").write_bytes(b"{{ 1 }} \xe9")
    for name in ("rows.jsonl", "rows.csvv"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(SystemExit) as error:
        run(*argv)
    assert str(error.value).startswith(f"sft.py: {message}")


def test_an_error_of_the_system_keeps_its_traceback(
    run: Callable[..., str], train_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sft, "MaskedSFTTrainer", fail)
    with pytest.raises(OSError, match="No space left"):
        run("--train_file", train_file, "--model_name_or_path", "base")


@pytest.mark.parametrize(
    ("modules", "targets"),
    [
        ("q_proj, v_proj", {"q_proj", "v_proj"}),
        ("q_proj", {"q_proj"}),
        ("q_proj,", {"q_proj"}),
        ("all-linear", "all-linear"),
        (" all-linear ", "all-linear"),
    ],
)
def test_lora_target_modules_are_names_with_commas(modules: str, targets: Any) -> None:
    config = sft.lora_config(sft.ModelArguments(lora=True, lora_target_modules=modules))
    assert config is not None
    assert config.target_modules == targets


def test_a_file_may_state_the_defaults_of_an_adapter_that_a_flag_leaves_out() -> None:
    sft.require_lora(sft.ModelArguments(lora=False, lora_r=16), {"lora"})
    with pytest.raises(ValueError, match="lora_r is 17, but there is no --lora"):
        sft.require_lora(sft.ModelArguments(lora=False, lora_r=17), {"lora"})


def test_full_fine_tuning_leaves_the_dtype_of_the_weights_to_the_trainer(recipes: Path) -> None:
    settings = yaml.safe_load((recipes / "configs" / "full_qwen3_0.6b.yaml").read_text())
    assert "model_init_kwargs" not in settings


@pytest.mark.parametrize("name", ["quickstart", "full_qwen3_0.6b", "lora", "gsm8k", "smollm2"])
def test_every_config_holds_known_settings(name: str, recipes: Path) -> None:
    path = recipes / "configs" / f"{name}.yaml"
    classes = (sft.ModelArguments, sft.DataArguments, MaskedSFTConfig)
    argv = [str(path), "--use_cpu", "1", "--bf16", "0", "--eval_strategy", "no"]
    *_, args = parse_arguments(classes, argv, path, description="")
    assert args.output_dir == yaml.safe_load(path.read_text())["output_dir"]


def test_the_trained_model_of_a_config_learns_bookings_or_the_rows_of_a_flag(recipes: Path) -> None:
    path = recipes / "configs" / "smollm2.yaml"
    classes = (sft.ModelArguments, sft.DataArguments, MaskedSFTConfig)
    folder = ("--model_name_or_path", "folder", "--use_cpu", "1")
    for rows, found in ((), ("bookings", None)), (("--train_file", "a"), (None, "a")):
        model_args, data_args, args = parse_arguments(
            classes, [str(path), *folder, *rows], path, description=""
        )
        assert (data_args.tasks, data_args.train_file) == found
        assert (model_args.model_name_or_path, model_args.lora) == ("folder", True)
        assert args.predict_with_generate


def test_there_is_no_other_config(recipes: Path) -> None:
    assert {path.stem for path in (recipes / "configs").iterdir()} == {
        "quickstart",
        "full_qwen3_0.6b",
        "lora",
        "gsm8k",
        "smollm2",
    }


def test_accelerate_launches_it_with_questions_and_answers(recipes: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n + 1}"} for n in range(20)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(recipes / "sft.py")]
    config = [str(recipes / "configs" / "gsm8k.yaml"), "--train_file", "qa.jsonl"]
    flags = ["--eval_file", "qa.jsonl", "--max_steps", "2", "--disable_tqdm", "1"]
    output = subprocess.run(
        [*launch, *config, *flags], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "Verified before step 1" in output
    assert "20 in = 20 trained" in output
    assert (tmp_path / "outputs" / "gsm8k" / "model.safetensors").is_file()


def test_an_untrained_model_learns_from_shards_with_their_tokenizer(
    run: Callable[..., str], tokenizer: Any, tmp_path: Path
) -> None:
    prepared, ledger = prepare_dataset(Dataset.from_list(ROWS), tokenizer)
    write_shards(tmp_path / "set", {"train": prepared}, tokenizer, ledgers={"train": ledger})
    printed = run(*MODEL, *SHORT, "--train_file", "set")
    assert "12 in = 12 trained" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    blocks = ("--block_size", "4", "--use_loss_mask", "false", "--logging_steps", "1")
    run(*MODEL, *SHORT, "--train_file", "set", *blocks)
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    # Steps of 8 blocks, in which the first token is not predicted.
    assert [line["num_response_tokens"] for line in log if "loss" in line] == [24, 48]


def test_what_rows_and_models_say_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        GeneratedResponse("[INST] Say it [/INST]", "[bold]it :smile:", "[/INST]\x1b[2J\u202e"),
        GeneratedResponse("Ask\x9b31m", "[red]a\n[/red]", "b\x07"),
    ]
    args = SimpleNamespace(output_dir="out/[/INST]\x1b[0m")
    state = SimpleNamespace(log_history=[])
    trainer: Any = SimpleNamespace(args=args, state=state, responses=answers, eval_dataset=[])
    sft.print_results(trainer, num_samples=2)
    shown = capsys.readouterr().out
    for text in ("[INST]", "[/INST]", "[bold]it :smile:", "[red]a [/red]", "Ask<U+009B>31m"):
        assert text in shown
    assert not set(shown) & set("\x1b\x9b\x07\u202e")
