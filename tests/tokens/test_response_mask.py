"""Which tokens are trained, for every way in which tokenizers cut text."""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows

# The generation prompt ends in a space, which tokenizers like to join with the word after it.
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Nothing but a control token stands before a response.
CLEAN = (
    "{% for m in messages %}{% if m.role == 'user' %}[i]{{ m.content }}[/i]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# No token ends a word, so only a control token does.
COLON = SPACED.replace(": ", ":")
CHAT = [("user", "hi"), ("assistant", "the end")]


def chat(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def outcome_of(row: dict[str, Any], tokenizer: Any, **options: Any) -> Any:
    return tokenize_rows([row], [0], tokenizer, make_options(options))[0]


def trained_tokens(outcome: Any, tokenizer: Any) -> list[str]:
    assert outcome.error is None, outcome.error
    trained = [
        token
        for example in outcome.examples
        for token, mark in zip(example["input_ids"], example["response_mask"], strict=True)
        if mark
    ]
    return list(tokenizer.convert_ids_to_tokens(trained))


def fed(row: dict[str, Any], turn: int, tokenizer: Any) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            row["messages"][:turn], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def wrap(backend: Tokenizer, template: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        additional_special_tokens=["[i]", "[/i]"],
        chat_template=template,
    )


def byte_level(
    template: str,
    *merges: tuple[str, str],
    normalizer: Any = None,
    trims: bool = False,
    has_words: bool = False,
) -> Any:
    """Bytes and a few merges."""
    texts = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({t: n for n, t in enumerate(texts)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=has_words)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    if trims:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrap(backend, template)


def metaspace(template: str, prepend: str, *merges: tuple[str, str]) -> Any:
    """Characters, bytes for all others, and a few merges, as SentencePiece has them."""
    texts = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += list("abcdefghijklmnopqrstuvwxyz:.\u2581") + [a + b for a, b in merges]
    vocabulary = {text: number for number, text in enumerate(texts)}
    model = models.BPE(vocabulary, list(merges), byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(backend, template)


G, C = "\u0120", "\u010a"  # how byte-level tokenizers write a space and a line break
# The generation prompt ends in two line breaks: one token where nothing follows.
PARTED = SPACED.replace(": ", "\n\n")


def test_split_cuts_where_inference_cuts() -> None:
    tokenizer = byte_level(SPACED, (G, "t"), ("e", "n"))
    row = chat(*CHAT)
    outcome = outcome_of(row, tokenizer)
    assert trained_tokens(outcome, tokenizer) == ["t", "h", "e", G, "en", "d", "</s>"]
    assert outcome.num_straddled == 1
    (span,) = outcome.spans[0]
    assert outcome.examples[0]["input_ids"][: span.start] == fed(row, 1, tokenizer)
    assert tokenizer.decode(outcome.examples[0]["input_ids"]) == (
        "user: hi</s>assistant: the end</s>"
    )


def test_include_trains_the_token_across_the_edge_and_exclude_does_not() -> None:
    tokenizer = byte_level(SPACED, (G, "t"), ("e", "n"))
    end = ["h", "e", G, "en", "d", "</s>"]
    whole = tokenizer("user: hi</s>assistant: the end</s>")["input_ids"]
    for boundary, expected in (("include", [G + "t", *end]), ("exclude", end)):
        outcome = outcome_of(chat(*CHAT), tokenizer, boundary=boundary)
        assert trained_tokens(outcome, tokenizer) == expected
        assert outcome.examples[0]["input_ids"] == whole
        assert outcome.num_straddled == 1


def test_exclude_leaves_the_token_across_the_edge_out_where_offsets_are_trimmed() -> None:
    tokenizer = byte_level(SPACED, (G, "t"), ("e", "n"), trims=True)
    outcome = outcome_of(chat(*CHAT), tokenizer, boundary="exclude")
    assert outcome.num_straddled == 1
    assert trained_tokens(outcome, tokenizer) == ["h", "e", G, "en", "d", "</s>"]


@pytest.mark.parametrize("trims", [False, True])
def test_include_ends_where_a_content_without_stop_token_ends(trims: bool) -> None:
    """Space that offsets leave out may belong to the content; what follows it does not."""
    template = "{% for m in messages %}[i]{{ m.content }} {% endfor %}"
    tokenizer = byte_level(template, ("e", "n"), trims=trims)
    options = {"boundary": "include", "train_roles": ["user", "assistant"]}
    outcome = outcome_of(chat(("user", "hi"), ("user", "end")), tokenizer, **options)
    space = [G] * trims
    assert trained_tokens(outcome, tokenizer) == ["h", "i", *space, "en", "d", *space]


@pytest.mark.parametrize("boundary", ["split", "include", "exclude"])
def test_all_choices_are_one_where_no_token_straddles(boundary: str) -> None:
    for template in (CLEAN, COLON):
        tokenizer = byte_level(template, ("t", "h"), ("th", "e"))
        outcome = outcome_of(chat(*CHAT), tokenizer, boundary=boundary)
        assert trained_tokens(outcome, tokenizer) == ["the", G, "e", "n", "d", "</s>"]
        assert outcome.num_straddled == 0


def test_two_straddled_responses_are_both_cut() -> None:
    tokenizer = byte_level(SPACED, (G, "t"))
    row = chat(*CHAT, ("user", "to"), ("assistant", "to"))
    for multi_turn, kinds in (
        ("auto", [["exact"], ["exact"]]),
        ("joint", [["exact", "rewritten"]]),
    ):
        outcome = outcome_of(row, tokenizer, multi_turn=multi_turn)
        assert trained_tokens(outcome, tokenizer) == [
            *["t", "h", "e", G, "e", "n", "d", "</s>"],
            *["t", "o", "</s>"],
        ]
        assert outcome.num_straddled == 2
        assert [[span.kind for span in spans] for spans in outcome.spans] == kinds
        for example, spans in zip(outcome.examples, outcome.spans, strict=True):
            is_fed = [example["input_ids"][: s.start] == fed(row, s.turn, tokenizer) for s in spans]
            assert is_fed == [span.kind == "exact" for span in spans]


@pytest.mark.parametrize("marks", [("", ""), ("[i]", "[/i]")])
@pytest.mark.parametrize("control", ["", "</s>"])
def test_the_prompt_has_the_tokens_that_it_has_alone(marks: tuple[str, str], control: str) -> None:
    """No token reaches across the edge, but what follows the line breaks decides about them."""
    template = PARTED.replace("m.role }}", f"m.role }}}}{marks[0]}").replace(
        "%}assistant", f"%}}assistant{marks[0]}"
    )
    tokenizer = byte_level(template, (C, C), has_words=True)
    assert tokenizer.tokenize("t\n\n") == ["t", C + C]
    assert tokenizer.tokenize("t\n\nthe") == ["t", C, C, "t", "h", "e"]
    row = chat(("user", "hi" + control), *CHAT[1:])
    outcome = outcome_of(row, tokenizer)
    assert trained_tokens(outcome, tokenizer) == [*"the", G, *"end", "</s>"]
    (span,) = outcome.spans[0]
    ids = outcome.examples[0]["input_ids"]
    assert span.kind == "exact"
    assert tokenizer.convert_ids_to_tokens(ids[: span.start])[-1] == C + C
    if not control:
        assert ids[: span.start] == fed(row, 1, tokenizer)
    assert outcome.num_straddled == 1
    whole = outcome_of(row, tokenizer, boundary="include")
    assert trained_tokens(whole, tokenizer) == [*"the", G, *"end", "</s>"]
    assert whole.num_straddled == 0


def test_each_response_after_a_prompt_of_other_tokens_is_an_example() -> None:
    """The first one is read with the tokens of the whole text once a second one follows."""
    tokenizer = byte_level(PARTED, (C, C), has_words=True)
    row = chat(*CHAT, *CHAT)
    outcome = outcome_of(row, tokenizer)
    assert [[span.kind for span in spans] for spans in outcome.spans] == [["exact"], ["exact"]]
    for example, (span,) in zip(outcome.examples, outcome.spans, strict=True):
        assert example["input_ids"][: span.start] == fed(row, span.turn, tokenizer)


def test_a_token_of_half_a_character_across_the_edge_is_cut() -> None:
    tokenizer = byte_level(SPACED, (G, "\u00c3"))
    for text in ("\u00e9", "\u00e9\u00e9 \u00e9"):
        outcome = outcome_of(chat(("user", text), ("assistant", text)), tokenizer)
        assert outcome.num_straddled == 1
        (span,) = outcome.spans[0]
        ids = outcome.examples[0]["input_ids"]
        assert tokenizer.decode(ids[span.start : span.end]) == text + "</s>"
        assert outcome.is_lossy is False


def test_the_edges_of_untrained_parts_are_cut_too() -> None:
    tokenizer = byte_level(CLEAN, ("b", "c"), ("d", "e"))
    parts = [
        {"type": "text", "text": "ab"},
        {"type": "text", "text": "cd", "train": False},
        {"type": "text", "text": "ef"},
    ]
    row = chat(("user", "q"), ("assistant", parts))
    outcome = outcome_of(row, tokenizer)
    assert trained_tokens(outcome, tokenizer) == ["a", "b", "e", "f", "</s>"]
    assert outcome.num_straddled == 2
    exclude = outcome_of(row, tokenizer, boundary="exclude")
    assert trained_tokens(exclude, tokenizer)[0] == "a"
    assert trained_tokens(exclude, tokenizer)[-2:] == ["f", "</s>"]


def test_offsets_that_leave_space_out_do_not_move_the_edge() -> None:
    row = chat(("user", " q "), ("assistant", "  the end \n"))
    expected = "  the end \n</s>"
    for template in (SPACED, CLEAN, COLON):
        for trims in (False, True):
            tokenizer = byte_level(template, (G, "t"), (G, G), ("e", G), (":", G), trims=trims)
            outcome = outcome_of(row, tokenizer)
            (span,) = outcome.spans[0]
            ids = outcome.examples[0]["input_ids"]
            assert tokenizer.decode(ids[span.start : span.end]) == expected
            assert ids[: span.start] == fed(row, 1, tokenizer)


@pytest.mark.parametrize(
    ("normalizer", "text", "told", "is_lossy"),
    [
        (normalizers.Lowercase(), "The End", "the end", True),
        (normalizers.Lowercase(), "the end", "the end", False),
        (normalizers.NFKC(), "\ufb01n\u2460", "fin1", True),
        (normalizers.NFKC(), "fin", "fin", False),
        (normalizers.NFC(), "e\u0301", "\u00e9", True),
        (normalizers.NFC(), "\u00e9", "\u00e9", False),
        (normalizers.NFD(), "\u00e9", "e\u0301", True),
        (normalizers.StripAccents(), "\u00e9", "\u00e9", False),
        (normalizers.Replace("e", "oo"), "end", "oond", True),
    ],
)
def test_a_normalizer_is_lossy_where_it_changes_something(
    normalizer: Any, text: str, told: str, is_lossy: bool
) -> None:
    for template in (CLEAN, SPACED):
        tokenizer = byte_level(template, normalizer=normalizer)
        outcome = outcome_of(chat(("user", text), ("assistant", text)), tokenizer)
        (span,) = outcome.spans[0]
        ids = outcome.examples[0]["input_ids"]
        assert tokenizer.decode(ids[span.start : span.end]) == told + "</s>"
        assert outcome.is_lossy is is_lossy


def test_a_combining_mark_does_not_merge_with_the_prompt() -> None:
    tokenizer = byte_level(
        "{% for m in messages %}{{ m.role }}e{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistante{% endif %}",
        normalizer=normalizers.NFC(),
    )
    row = chat(("user", "q"), ("assistant", "\u0301x"))
    outcome = outcome_of(row, tokenizer)
    (span,) = outcome.spans[0]
    ids = outcome.examples[0]["input_ids"]
    assert ids[: span.start] == fed(row, 1, tokenizer)
    assert tokenizer.decode(ids[span.start : span.end]) == "\u0301x</s>"


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_sentencepiece_like_tokenizers_train_the_response(prepend: str) -> None:
    tokenizer = metaspace(CLEAN, prepend, ("\u2581", "t"))
    outcome = outcome_of(chat(("user", "hi"), ("assistant", "the \U0001f30d")), tokenizer)
    world = ["<0xF0>", "<0x9F>", "<0x8C>", "<0x8D>"]
    first = ["\u2581t"] if prepend == "always" else ["t"]
    assert trained_tokens(outcome, tokenizer) == [*first, "h", "e", "\u2581", *world, "</s>"]
    assert outcome.num_straddled == 0


def test_a_cut_leaves_the_tokens_of_the_response() -> None:
    tokenizer = metaspace(SPACED, "never", ("\u2581", "t"))
    outcome = outcome_of(chat(*CHAT), tokenizer)
    assert outcome.num_straddled == 1
    assert trained_tokens(outcome, tokenizer)[:3] == ["t", "h", "e"]


@pytest.mark.parametrize("prepend", ["first", "always"])
def test_a_tokenizer_that_adds_a_space_to_each_part_is_not_asked_for_parts(prepend: str) -> None:
    tokenizer = metaspace(SPACED, prepend, ("\u2581", "t"))
    outcome = outcome_of(chat(*CHAT), tokenizer)
    assert outcome.examples == []
    assert outcome.error is not None
    assert outcome.error.reason == "the tokenizer cannot encode in parts"
    whole = outcome_of(chat(*CHAT), tokenizer, boundary="include")
    assert trained_tokens(whole, tokenizer)[:3] == ["\u2581t", "h", "e"]


def test_wordpiece_like_tokenizers_are_lossy_but_masked_rightly() -> None:
    texts = ["[UNK]", "</s>", *"abcdefghijklmnopqrstuvwxyz:.", "the", "end", "##s", "hi"]
    texts += ["user", "assistant"]
    backend = Tokenizer(models.WordPiece({t: n for n, t in enumerate(texts)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    for template in (SPACED, CLEAN):
        tokenizer = wrap(backend, template)
        row = chat(("user", "Hi."), ("assistant", "  The  ends \u4e16 "))
        outcome = outcome_of(row, tokenizer)
        assert trained_tokens(outcome, tokenizer) == ["the", "end", "##s", "[UNK]", "</s>"]
        assert outcome.is_lossy
        (span,) = outcome.spans[0]
        assert outcome.examples[0]["input_ids"][: span.start] == fed(row, 1, tokenizer)


class SlowTokenizer(PreTrainedTokenizer):
    """Pairs of characters, written in Python: it cannot tell which characters a token has."""

    def __init__(self, **kwargs: Any) -> None:
        self._texts = ["</s>"]
        super().__init__(eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of pairs met so far."""
        return 10_000

    def get_vocab(self) -> dict[str, int]:
        """Pairs met so far."""
        return {text: number for number, text in enumerate(self._texts)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [text[start : start + 2] for start in range(0, len(text), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._texts:
            self._texts.append(token)
        return self._texts.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._texts[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pairs, joined."""
        return "".join(tokens)


@pytest.mark.parametrize("hi", ["hi", "hi!"])
@pytest.mark.parametrize("boundary", ["split", "include", "exclude"])
def test_a_slow_tokenizer_is_cut_wherever_something_begins(hi: str, boundary: str) -> None:
    tokenizer: Any = SlowTokenizer(chat_template=COLON)
    row = chat(("user", hi), ("assistant", "the end"), ("user", hi), ("assistant", "a"))
    outcome = outcome_of(row, tokenizer, boundary=boundary)
    assert trained_tokens(outcome, tokenizer) == ["th", "e ", "en", "d", "</s>", "a", "</s>"]
    first, second = outcome.spans[0]
    ids = outcome.examples[0]["input_ids"]
    assert ids[: first.start] == fed(row, 1, tokenizer)
    assert ids[: second.start] == fed(row, 3, tokenizer)


@lru_cache(maxsize=64)
def random_vocabulary(seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer with merges of random text."""
    maker = random.Random(seed)
    letters = maker.choice(["ab :", "user assistant:\n", "\u00e9\u0301 \U0001f30d\n", "the end</"])
    words = ["".join(maker.choices(letters, k=40)) for _ in range(40)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=maker.random() < 0.5
    )
    backend.decoder = decoders.ByteLevel()
    if maker.random() < 0.5:
        backend.post_processor = processors.ByteLevel(trim_offsets=maker.random() < 0.5)
    trainer = tokenizer_trainers.BpeTrainer(
        vocab_size=256 + maker.randint(1, 200),
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(words, trainer)
    return backend


# Without the characters that stand for the edges of contents: see test_rendering.py.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=20),
    st.text(st.sampled_from("ab user assistant:\n\u00e9\u0301\U0001f30d</s>"), min_size=1),
)
NEWLINES = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@settings(
    deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    template=st.sampled_from([SPACED, CLEAN, COLON, PARTED, NEWLINES]),
    seed=st.integers(0, 23),
    texts=st.lists(TEXTS.filter(str.strip), min_size=2, max_size=8),
    multi_turn=st.sampled_from(["auto", "joint"]),
)
def test_any_conversation_with_any_vocabulary_trains_its_responses_and_nothing_else(
    template: str, seed: int, texts: list[str], multi_turn: str
) -> None:
    tokenizer = wrap(random_vocabulary(seed), template)
    texts = texts[: len(texts) // 2 * 2]
    row = chat(*zip(("user", "assistant") * 4, texts, strict=False))
    outcome = outcome_of(row, tokenizer, multi_turn=multi_turn)
    assert outcome.error is None
    assert not outcome.is_lossy
    assert len(outcome.examples) == 1 or outcome.num_straddled
    stop, told = tokenizer.eos_token_id, []
    for example, spans in zip(outcome.examples, outcome.spans, strict=True):
        ids = example["input_ids"]
        told += [tokenizer.decode(ids[s.start : s.end]) for s in spans]
        marks = {token for span in spans for token in range(span.start, span.end)}
        assert {token for token, mark in enumerate(example["response_mask"]) if mark} == marks
        messages = row["messages"][: spans[-1].turn + 1]
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert [ids[s.start : s.end].count(stop) for s in spans] == [1] * len(spans)
        assert ids.count(stop) == len(messages) // (2 if template is CLEAN else 1)
        if not outcome.control_tokens:
            for span in spans:
                is_fed = ids[: span.start] == fed(row, span.turn, tokenizer)
                assert is_fed == (span.kind == "exact")
    assert told == [text + "</s>" for text in texts[1::2]]
    kinds = {span.kind for spans in outcome.spans for span in spans}
    assert kinds == {"exact"} or (multi_turn == "joint" and outcome.num_straddled)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    template=st.sampled_from([SPACED, CLEAN, COLON, PARTED, NEWLINES]),
    seed=st.integers(0, 23),
    question=TEXTS.filter(str.strip),
    answer=TEXTS.filter(str.strip),
    boundary=st.sampled_from(["include", "exclude"]),
)
def test_include_and_exclude_leave_the_tokens_and_move_the_edge_by_one_at_most(
    template: str, seed: int, question: str, answer: str, boundary: str
) -> None:
    tokenizer = wrap(random_vocabulary(seed), template)
    row = chat(("user", question), ("assistant", answer))
    split = outcome_of(row, tokenizer)
    outcome = outcome_of(row, tokenizer, boundary=boundary)
    trims = getattr(tokenizer.backend_tokenizer.post_processor, "trim_offsets", False)
    # Offsets that leave space out do not tell which token it belongs to.
    if split.control_tokens or trims or outcome.error is not None:
        # A response of one token that straddles has nothing left but its stop token.
        assert outcome.error is None or boundary == "exclude"
        return
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    ids = outcome.examples[0]["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    (span,) = outcome.spans[0]
    told = tokenizer.backend_tokenizer.decode(ids[span.start : span.end], skip_special_tokens=False)
    assert ids[span.end - 1] == tokenizer.eos_token_id
    if outcome.num_straddled == 0:
        assert told == answer + "</s>"
    elif boundary == "include":
        assert told.endswith(answer + "</s>")
    else:
        assert (answer + "</s>").endswith(told.lstrip("\ufffd"))


def test_a_stop_token_in_the_wrong_place_is_no_stop_token(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'user' %}{{ m.content }}<|im_end|>\n{% else %}{{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template)
    outcome = outcome_of(chat(("user", "q"), ("assistant", "a")), tokenizer)
    assert trained_tokens(outcome, tokenizer) == ["a", "<|im_end|>"]
    # That of the next turn is not the response's own.
    outcome = outcome_of(chat(("user", "q"), ("assistant", "a"), ("user", "p")), tokenizer)
    assert trained_tokens(outcome, tokenizer) == ["a", "<|im_end|>"]
    assert "p" not in tokenizer.convert_ids_to_tokens(outcome.examples[0]["input_ids"])


@pytest.mark.parametrize("boundary", ["split", "include", "exclude"])
def test_the_tokens_of_a_part_count_as_much_as_it_says(boundary: str) -> None:
    tokenizer = byte_level(CLEAN)
    parts = [
        {"type": "text", "text": "ab", "weight": 3},
        {"type": "text", "text": "cd", "train": False},
        {"type": "text", "text": "ef"},
    ]
    messages = chat(("user", "q"), ("assistant", parts))["messages"]
    messages[1]["weight"] = 0.5
    row = {"messages": messages, "weight": 4}
    outcome = outcome_of(row, tokenizer, boundary=boundary)
    (example,) = outcome.examples
    pairs = zip(example["response_mask"], example["loss_weights"], strict=True)
    # The stop token is no part of a content, so it counts like the message.
    assert [w for trained, w in pairs if trained] == [6.0, 6.0, 2.0, 2.0, 2.0]
    assert trained_tokens(outcome, tokenizer) == ["a", "b", "e", "f", "</s>"]


def test_the_edges_of_weighted_parts_are_cut_too() -> None:
    tokenizer = byte_level(CLEAN, ("b", "c"))
    parts = [{"type": "text", "text": "ab", "weight": 3}, {"type": "text", "text": "cd"}]
    (example,) = outcome_of(chat(("user", "q"), ("assistant", parts)), tokenizer).examples
    trained = [w for w in example["loss_weights"] if w]
    assert trained == [3.0, 3.0, 1.0, 1.0, 1.0]
