"""Chat templates in the manner of the families that people train, each with its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import AddedToken

from hf_sft_plugin.tokens.row_tokenizer import RowOutcome
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows


@dataclass(frozen=True)
class Family:
    """A chat template and the control tokens that it needs.

    Attributes:
        template: The chat template.
        stops: Tokens at which inference stops; the first is the eos token.
        specials: Other control tokens.
        bos: The bos token.
        swallows: Control tokens that swallow the space after them.
        kwargs: Variables for the template.
    """

    template: str = field(repr=False)
    stops: tuple[str, ...] = ("<|im_end|>",)
    specials: tuple[str, ...] = ()
    bos: str | None = None
    swallows: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


_LOOP, _DONE = "{% for m in messages %}", "{% endfor %}"
_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helper."
    "{{ strftime_now(' It is %Y.') }}<|im_end|>\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "<|header|>system<|/header|>\n\nCutting off: 2023\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
    "{{ ns.system }}<|eot|>"
    "{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role here') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}<|turn|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
_MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {{ system if loop.first }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
_LLAMA2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ ((system if loop.first else '') ~ m.content) | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{% if '</think>' in m.content and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
)
_QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set text = m.content or '' %}{% set thought = '' %}"
    "{% if m.reasoning_content %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ text.lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}" + _CALLS + "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n"
    "{% else %}" + _CHATML + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
_CHANNELS = (
    "<|start|>system<|message|>You are a model.\nDate: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}{% if m.role == 'system' %}"
    "<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}{% if loop.last and m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_HERMES = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' }}"
    "\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' and tools %}"
    "{% elif m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}" + _CALLS + "<|im_end|>\n"
    "{% endif %}{% endfor %}" + _OPEN
)
_WORDS = (
    "{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _OPEN
)
_INST = ("[INST]", "[/INST]")
FAMILIES = {
    "chatml": Family(_LOOP + _CHATML + _DONE + _OPEN),
    "default_system": Family(_DEFAULT + _LOOP + _CHATML + _DONE + _OPEN),
    "llama3": Family(_LLAMA3, ("<|eot|>",), ("<|header|>", "<|/header|>"), "<|bos|>"),
    "gemma": Family(_GEMMA, ("<|eot|>", "<eos>"), ("<|turn|>",), "<bos>"),
    "mistral": Family(_MISTRAL, ("</s>",), _INST, "<s>"),
    "llama2": Family(_LLAMA2, ("</s>",), (), "<s>"),
    "phi": Family(
        _PHI, ("<|end|>",), (), None, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ),
    "deepseek": Family(_DEEPSEEK, ("<|end_of_text|>",), ("<|User|>", "<|Assistant|>"), "<|bos|>"),
    "deepseek_forgets": Family(
        _DEEPSEEK.replace(" and not loop.last", ""),
        ("<|end_of_text|>",),
        ("<|User|>", "<|Assistant|>"),
        "<|bos|>",
    ),
    "qwen3": Family(_QWEN3),
    "qwen3_no_thinking": Family(_QWEN3, kwargs={"enable_thinking": False}),
    "channels": Family(
        _CHANNELS, ("<|return|>", "<|end|>"), ("<|start|>", "<|message|>", "<|channel|>")
    ),
    "hermes": Family(_HERMES),
    "words": Family(_WORDS, ("</s>",)),
    "marked": Family(_MARKED),
}

_GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% else %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and m.reasoning_content and "
    "loop.last %}<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}\n"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_FALCON = (
    "{% for m in messages %}{{ '\n' if not loop.first }}"
    "{{ 'Falcon' if m.role == 'assistant' else m.role | capitalize }}: {{ m.content | trim }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n' }}Falcon:{% endif %}"
)
_SOLAR = (
    "{% for m in messages %}{% if m.role == 'assistant' %}### Assistant:\n{{ m.content }}"
    "{% else %}### {{ m.role | capitalize }}:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
_LINES = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_ENDED_LATER = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{{ eos_token + '\n' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}\n<|assistant|>\n{% endif %}"
)
_TULU = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}"
    "{{ eos_token }}{{ '\n' if not loop.last }}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_GLM_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_GLM_OTHERS = ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>")
# No stop token behind the last response, or behind none; and headers that differ in their space.
UNUSUAL = {
    "glm4": Family(_GLM4, _GLM_STOPS, _GLM_OTHERS),
    "falcon": Family(_FALCON, ("<|endoftext|>",)),
    "solar": Family(_SOLAR, ("</s>",)),
    "lines": Family(_LINES, ("</s>",)),
    "ended_later": Family(_ENDED_LATER, ("</s>",), _ROLES),
    "tulu": Family(_TULU, ("<|endoftext|>",), _ROLES),
}
EVERY = {**FAMILIES, **UNUSUAL}


def pytest_generate_tests(metafunc: Any) -> None:
    """A test that asks for `family` runs once for each of them; one for `any_family`, for all."""
    for name, made in (("family", FAMILIES), ("any_family", EVERY)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(made))


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    """The families by name."""
    return EVERY


@pytest.fixture(scope="session")
def tokenizer_of_family(tokenizer_factory: Callable[..., Any]) -> Callable[[str], Any]:
    """The tokenizer of a family; made once."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            each = EVERY[name]
            tokenizer = tokenizer_factory(
                chat_template=each.template, eos_token=each.stops[0], bos_token=each.bos
            )
            swallowing = [AddedToken(t, rstrip=True, special=True) for t in each.swallows]
            tokenizer.add_tokens(swallowing, special_tokens=True)
            others = [t for t in (*each.stops, *each.specials) if t not in each.swallows]
            tokenizer.add_tokens(others, special_tokens=True)
            made[name] = tokenizer
        return made[name]

    return make


@pytest.fixture(scope="session")
def tokenize_with(tokenizer_of_family: Callable[[str], Any]) -> Callable[..., RowOutcome]:
    """Tokenizes one row with the template of a family, at its stop tokens."""

    def tokenize(name: str, row: Any, **options: Any) -> RowOutcome:
        tokenizer, each = tokenizer_of_family(name), EVERY[name]
        row = row if isinstance(row, dict) else {"messages": row}
        options = {"chat_template_kwargs": each.kwargs, **options}
        stops = tokenizer.convert_tokens_to_ids(list(each.stops))
        (outcome,) = tokenize_rows([row], [0], tokenizer, make_options(options), stops)
        return outcome

    return tokenize


@pytest.fixture(scope="session")
def trained_of(tokenizer_of_family: Callable[[str], Any]) -> Callable[..., list[Any]]:
    """Per example: kind and text of each trained span; the mask must say the same."""

    def trained(name: str, outcome: RowOutcome) -> list[list[tuple[str, str]]]:
        tokenizer = tokenizer_of_family(name)
        assert outcome.error is None, outcome.error
        found = []
        for example, spans in zip(outcome.examples, outcome.spans, strict=True):
            marks = {t for span in spans for t in range(span.start, span.end)}
            assert {t for t, mark in enumerate(example["response_mask"]) if mark} == marks
            ids = example["input_ids"]
            found.append([(s.kind, tokenizer.decode(ids[s.start : s.end])) for s in spans])
        return found

    return trained


@pytest.fixture(scope="session")
def check_inference(tokenizer_of_family: Callable[[str], Any]) -> Callable[..., None]:
    """Before each exact span stands what inference feeds, token by token."""

    def check(name: str, messages: list[dict[str, Any]], outcome: RowOutcome, **more: Any) -> None:
        tokenizer = tokenizer_of_family(name)
        for example, spans in zip(outcome.examples, outcome.spans, strict=True):
            for span in spans:
                fed = tokenizer.apply_chat_template(
                    messages[: span.turn],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **EVERY[name].kwargs,
                    **more,
                )
                if span.kind == "exact":
                    assert example["input_ids"][: span.start] == fed
                elif span.kind == "shared_prefix":
                    assert example["input_ids"][: span.start] != fed

    return check
