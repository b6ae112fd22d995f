"""Proof that a chat template writes contents as they are, whatever they say.

The template runs once with objects in place of the contents that answer only what is the same for
all of them: that a content is text, not empty, and without white space at its ends; and, whatever
string the template looks for, that the content does not hold it. Any other question ends the run
without a proof. What such a run writes, the template writes for all contents that hold none of the
strings that were looked for: with the same answers it takes the same way.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import Frame
from jinja2.ext import Extension
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.types import DataOptions


class OpaqueTemplate:
    """A tokenizer's chat template, for contents of which nothing is known.

    Args:
        tokenizer: Has a chat template.
        options: `chat_template_kwargs` matter here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> None:
        assert not isinstance(options.chat_template_kwargs, str)
        variables = {**tokenizer.special_tokens_map, **(options.chat_template_kwargs or {})}
        source = tokenizer.get_chat_template(variables.pop("chat_template", None))
        self._variables = variables
        self._template: Template | None = None
        # A tokenizer that writes chats in a way of its own is not known by its template.
        usual: Callable[..., Any] = PreTrainedTokenizerBase.apply_chat_template
        if type(tokenizer).apply_chat_template is usual:
            self._template = _compile(source)

    def write(
        self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool
    ) -> tuple[str, set[str]] | None:
        """What the template writes, and what no content may hold; None without a proof.

        Args:
            messages: Each of a role and a content, which is a single character that stands for it.
            generation_prompt: Whether what opens a response follows.
        """
        if self._template is None:
            return None
        needles: set[str] = set()
        shown = [{**each, "content": _Text(each["content"], needles)} for each in messages]
        values = {"messages": shown, "tools": None, "documents": None, **self._variables}
        try:
            written: Any = self._template.render(values, add_generation_prompt=generation_prompt)
        except (Exception, _LookedIntoError):
            return None
        return (written._text if isinstance(written, _Text) else written), needles


class _LookedIntoError(BaseException):
    """The template asks what not all contents answer alike; nothing passes over it."""


def _refuse(*_: Any, **__: Any) -> Any:
    raise _LookedIntoError


class _Text:
    """Text in which single characters stand for contents.

    It is no `str`, so that nothing can read it unseen.

    Args:
        text: The text.
        needles: Where what is looked for in contents is noted.
    """

    def __init__(self, text: str, needles: set[str]) -> None:
        self._text = text
        self._needles = needles

    __getattr__ = __getitem__ = __iter__ = __len__ = __hash__ = _refuse
    __str__ = __repr__ = __format__ = __int__ = __float__ = __index__ = _refuse

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: Any) -> "_Text":
        return _concat((self, _require_text(other)))

    def __radd__(self, other: Any) -> "_Text":
        return _concat((_require_text(other), self))

    def __contains__(self, needle: Any) -> bool:
        return self._holds(needle)

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, _Text):
            _refuse()
        return isinstance(other, str) and other != "" and self._holds(other)

    def startswith(self, prefix: Any) -> bool:
        return self._holds(prefix)

    def endswith(self, suffix: Any) -> bool:
        return self._holds(suffix)

    def split(self, separator: Any) -> list["_Text"]:
        self._holds(separator)
        return [self]

    def replace(self, old: Any, new: Any) -> "_Text":
        self._holds(old)
        return self

    def strip(self, chars: str | None = None) -> "_Text":
        return self._strip(str.strip, chars)

    def lstrip(self, chars: str | None = None) -> "_Text":
        return self._strip(str.lstrip, chars)

    def rstrip(self, chars: str | None = None) -> "_Text":
        return self._strip(str.rstrip, chars)

    def _strip(self, strip: Callable[..., str], chars: str | None) -> "_Text":
        # Contents have no white space at their ends, but may have anything else.
        if chars is not None and (type(chars) is not str or chars.strip()):
            _refuse()
        return _Text(strip(self._text, chars), self._needles)

    def _holds(self, needle: Any) -> bool:
        # Where two texts meet, something could arise that neither of them holds.
        if type(needle) is not str or not needle or len(self._text) != 1:
            _refuse()
        self._needles.add(needle)
        return False


def _require_text(value: Any) -> Any:
    return value if isinstance(value, (str, _Text)) else _refuse()


def _concat(parts: Iterable[Any]) -> Any:
    """What `"".join` makes of outputs, where some of them are texts with contents."""
    parts = [*parts]
    written = "".join(part._text if isinstance(part, _Text) else str(part) for part in parts)
    needles = next((part._needles for part in parts if isinstance(part, _Text)), None)
    return written if needles is None else _Text(written, needles)


class _Generation(Extension):
    """The markers that transformers knows; what is between them is written as it is."""

    tags = {"generation"}  # noqa: RUF012  # as jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Code(NativeCodeGenerator):
    """Outputs are not made `str` before they are joined."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  # jinja's name
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    concat = staticmethod(_concat)


def _as_text(value: Any) -> Any:
    return value if isinstance(value, _Text) else str(value)


def _compile(source: str) -> Template | None:
    """The template as transformers compiles it, but for outputs; None where it cannot be known."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["string"] = _as_text
    environment.filters["trim"] = lambda value, chars=None: _as_text(value).strip(chars)
    tests: dict[str, Any] = environment.tests
    for name in ("string", "iterable", "sequence"):
        tests[name] = partial(_is_text_or, tests[name])
    # What gives other answers from one call to the next.
    del environment.filters["random"], tests["sameas"], environment.globals["lipsum"]
    environment.globals.update(strftime_now=_refuse, raise_exception=_refuse)
    try:
        # Where outputs are escaped, contents are not written as they are.
        is_escaped = environment.parse(source).find(nodes.EvalContextModifier) is not None
        return None if is_escaped else environment.from_string(source)
    except TemplateError:
        return None


def _is_text_or(is_kind: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, _Text) or is_kind(value)
