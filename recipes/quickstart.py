"""What the quickstart trains on: small tasks, a tokenizer and a model, all made on the spot.

The tasks are easy for a person and impossible for an untrained model, so that two minutes on a
laptop show whether training works. Everything is deterministic.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

# The widespread ChatML layout: each turn between <|im_start|> and <|im_end|>.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = """
    amber apple birch breeze brook cedar cherry clover cloud coral daisy ember falcon fern ginger
    hazel honey ivory juniper lemon lily maple meadow mint oak olive otter owl pebble pepper pine
    plum poppy raven river robin saffron star thistle willow
""".split()  # noqa: SIM905  # forty quoted words would be harder to read
ORDINALS = ("first", "second", "third")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# A conversation as alternating user and assistant texts.
Turns = tuple[str, ...]


def _words(rng: random.Random, low: int = 2) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, 3))


def _repeat(rng: random.Random) -> Turns:
    words = " ".join(_words(rng))
    return f"Repeat: {words}", words


def _reverse(rng: random.Random) -> Turns:
    words = _words(rng)
    return f"Reverse: {' '.join(words)}", " ".join(reversed(words))


def _pick(rng: random.Random) -> Turns:
    words = _words(rng, low=3)
    position = rng.randrange(len(words))
    return f"Which is {ORDINALS[position]}: {' '.join(words)}?", words[position]


def _add(rng: random.Random) -> Turns:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"The {rng.choice(WORDS)} shop had {a} jars and got {b} more. How many now?", str(a + b)


def _compare(rng: random.Random) -> Turns:
    a, b = rng.sample(range(10, 100), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def _weekday(rng: random.Random) -> Turns:
    today, days = rng.randrange(7), rng.randint(2, 4)
    question = (
        f"The {rng.choice(WORDS)} came on {WEEKDAYS[today]} for {days} days. When did it leave?"
    )
    return question, WEEKDAYS[(today + days) % 7]


def _repeat_then_reverse(rng: random.Random) -> Turns:
    words = _words(rng)
    text = " ".join(words)
    return f"Repeat: {text}", text, "Now backwards.", " ".join(reversed(words))


def _repeat_then_pick(rng: random.Random) -> Turns:
    words = _words(rng, low=3)
    position = rng.randrange(len(words))
    text = " ".join(words)
    return f"Repeat: {text}", text, f"Which was {ORDINALS[position]}?", words[position]


SKILLS: Mapping[str, Callable[[random.Random], Turns]] = {
    "repeat": _repeat,
    "reverse": _reverse,
    "pick": _pick,
    "add": _add,
    "compare": _compare,
    "weekday": _weekday,
    "repeat, then reverse": _repeat_then_reverse,
    "repeat, then pick": _repeat_then_pick,
}


def make_tasks(
    num_train: int = 4000, num_eval: int = 400, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Makes the training rows and the held-out rows.

    No prompt of a held-out row, which is all of its text before the last answer, occurs anywhere
    in the training rows. Skills take turns; a skill that runs out of new prompts repeats its own.

    Returns:
        Two datasets with the columns `messages` and `source`, the skill.
    """
    rng = random.Random(seed)  # noqa: S311  # nothing secret is drawn
    evaluation: dict[Turns, str] = {}
    while len(evaluation) < num_eval:
        for skill, make in SKILLS.items():
            evaluation[make(rng)] = skill
    held_out = {turns[:-1] for turns in evaluation}
    training: list[tuple[Turns, str]] = []
    while len(training) < num_train:
        for skill, make in SKILLS.items():
            turns = make(rng)
            prompts = {turns[: end + 1] for end in range(0, len(turns), 2)}
            if not prompts & held_out:
                training.append((turns, skill))
    return _to_dataset(training[:num_train]), _to_dataset(list(evaluation.items())[:num_eval])


def _to_dataset(conversations: list[tuple[Turns, str]]) -> Dataset:
    rows = [
        {
            "messages": [
                {"role": "assistant" if turn % 2 else "user", "content": text}
                for turn, text in enumerate(turns)
            ],
            "source": skill,
        }
        for turns, skill in conversations
    ]
    return Dataset.from_list(rows)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer with one token per digit and a ChatML template.

    Args:
        texts: What it learns its merges from.
        vocab_size: Its size, special tokens included; it may come out smaller on little text.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106  # not that kind of token
        pad_token="<|endoftext|>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
    )


def build_model(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Builds an untrained model, with as many embeddings as the tokenizer has tokens.

    Args:
        config: `model_type` and any other fields of that model's config.
        tokenizer: Gives the size of the vocabulary and the special tokens.
    """
    fields = {"vocab_size": len(tokenizer), **config}
    model_config = AutoConfig.for_model(
        **fields,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(model_config)
