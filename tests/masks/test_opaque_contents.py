"""A template is proven to write contents as they are, or it is not; never wrongly."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sft_plugin.masks.opaque_contents import OpaqueTemplate
from hf_sft_plugin.tokens.tokenization import make_options

MESSAGES = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}]


def write(tokenizer: Any, generation_prompt: bool = False) -> tuple[str, set[str]] | None:
    return OpaqueTemplate(tokenizer, make_options({})).write(MESSAGES, generation_prompt)


def each(expression: str) -> str:
    return "{% for m in messages %}[{{ " + expression + " }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text", "needles"),
    [
        (each("m.content"), "[\ue000][\ue001]", set()),
        (each("m['content'] | trim"), "[\ue000][\ue001]", set()),
        (each("(' ' + m.content + ' x ').strip()"), "[\ue000 x][\ue001 x]", set()),
        (each("m.role ~ 1 ~ m.content"), "[user1\ue000][assistant1\ue001]", set()),
        (each("m.content | string if m.content is string else ''"), "[\ue000][\ue001]", set()),
        (each("m.content.split('</t>')[-1].lstrip('\\n')"), "[\ue000][\ue001]", {"</t>"}),
        (each("'y' if '<a>' in m.content or m.content == 'b' else 'n'"), "[n][n]", {"<a>", "b"}),
        (each("m.content.startswith('<a>')"), "[False][False]", {"<a>"}),
        (each("m.content.replace('a', 'b')"), "[\ue000][\ue001]", {"a"}),
        (each("m.content is mapping or m.content is none"), "[False][False]", set()),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}" + each("f(m.content)"),
         "[<\ue000>][<\ue001>]", set()),
        ("{% set ns = namespace(a='') %}{% for m in messages %}{% set ns.a = ns.a + m.content %}"
         "{% endfor %}{{ ns.a }}", "\ue000\ue001", set()),
        ("{% set x %} {{ messages[0].content }} {% endset %}{{ x | trim }}", "\ue000", set()),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "\ue001", set()),
    ],
)  # fmt: skip
def test_what_a_template_does_with_all_contents_alike_is_proven(
    template: str, text: str, needles: set[str], tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory(chat_template=template)
    assert write(tokenizer) == (text, needles)
    real = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert real == text


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | length",
        "m.content | upper",
        "m.content | tojson",
        "m.content | int(0)",
        "m.content | float(0)",
        "m.content | e",
        "m.content | first",
        "m.content | list",
        "m.content | attr('upper')",
        "m.content.upper()",
        "m.content[0]",
        "m.content[:2]",
        "m.content.split()",
        "m.content.split('a', 1)",
        "m.content.strip('a')",
        "m.content.replace('', '-')",
        "'%s' % m.content",
        "'{}'.format(m.content)",
        "m.content * 2",
        "m.content < 'b'",
        "m.content in 'abc'",
        "m.content in ['a', messages[0].content]",
        "{'a': 1}[m.content]",
        "[1, 2][m.content]",
        "m | string",
        "(m | dictsort) == (messages[0] | dictsort)",
        "messages[0].content == messages[1].content",
        "messages | map(attribute='content') | join",
        "messages | groupby('content')",
        "'a' in m.content ~ 'b'",
        "(m.content + 'b').startswith('a')",
        "loop.changed(m.content)",
        "m.content is sameas messages[0].content",
        "m.content is lower",
        "['a', 'b'] | random",
        "lipsum()",
        "strftime_now('%Y')",
        "raise_exception('no')",
    ],
)
def test_nothing_is_proven_of_a_template_that_may_tell_contents_apart(
    expression: str, tokenizer_factory: Callable[..., Any]
) -> None:
    assert write(tokenizer_factory(chat_template=each(expression))) is None


def test_escaped_outputs_are_not_contents_as_they_are(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = "{% autoescape true %}" + each("m.content") + "{% endautoescape %}"
    assert write(tokenizer_factory(chat_template=template)) is None


def test_nothing_is_proven_of_a_tokenizer_that_writes_chats_its_own_way(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(chat_template=each("m.content"))

    class Other(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return str(super().apply_chat_template(*args, **kwargs)).lower()

    tokenizer.__class__ = Other
    assert write(tokenizer) is None


# Without the characters that stand for contents.
CONTENT = (
    st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1).map(str.strip).filter(bool)
)


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(contents=st.tuples(CONTENT, CONTENT), is_prompt=st.booleans())
def test_filled_contents_are_what_every_template_writes_of_them(
    family: str,
    contents: tuple[str, str],
    is_prompt: bool,
    families: dict[str, Any],
    tokenizer_of_family: Callable[[str], Any],
) -> None:
    tokenizer, kwargs = tokenizer_of_family(family), families[family].kwargs or {}
    template = OpaqueTemplate(tokenizer, make_options({"chat_template_kwargs": kwargs}))
    proof = template.write(MESSAGES, is_prompt)
    if proof is not None and not any(each in "".join(contents) for each in proof[1]):
        pairs = [*zip(MESSAGES, contents, strict=True)]
        filled = proof[0]
        for message, content in pairs:
            filled = filled.replace(message["content"], content)
        assert filled == tokenizer.apply_chat_template(
            [{**message, "content": content} for message, content in pairs],
            tokenize=False,
            add_generation_prompt=is_prompt,
            **kwargs,
        )
