"""From a chat to the text a model reads, and to the characters of it that are trained.

A trained span begins right after the text that inference supplies: the turns before the response,
rendered with the generation prompt. The template itself is not parsed; everything is found by
rendering. A second rendering puts each content between two sentinels and shows independently where
each content went. `{% generation %}` markers, where a template has them, are a third check.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.masks.chat_template import render_turns
from hf_sft_plugin.masks.content_markers import Range, core_of, free_base, mark, unmark
from hf_sft_plugin.masks.generation_markers import check_markers, marked_ranges
from hf_sft_plugin.masks.response_openings import (
    TAGS,
    after_opening,
    before_open_tag,
    common_length,
    may_leave_out,
)
from hf_sft_plugin.masks.stop_tokens import stop_behind
from hf_sft_plugin.masks.written_parts import check_written
from hf_sft_plugin.rows.messages import calls_of
from hf_sft_plugin.types import Conversation, DataOptions, RowError, SpanKind


@dataclass(frozen=True)
class Span:
    """The characters of one turn that are trained.

    Attributes:
        start: Where the model begins to write.
        content: What of the message's content is trained, without the space around it; None where
            no rendering shows where it went.
        bound: Where the text of the next turn begins, or the end of the text. The stop token lies
            before it.
        turn: Position of the message.
        kind: See `TrainedSpan`.
        weight: How much each of its tokens counts.
        needs_stop: Whether the span must end in a stop token.
        weighted: Characters within the span that count otherwise, and how much; 0 is not trained.
        has_calls: Whether the message calls tools.
    """

    start: int
    content: Range | None
    bound: int
    turn: int
    kind: SpanKind
    weight: float = 1.0
    needs_stop: bool = True
    weighted: tuple[tuple[int, int, float], ...] = ()
    has_calls: bool = False


@dataclass(frozen=True)
class RenderedText:
    """A conversation as one text.

    Attributes:
        text: What the model reads.
        spans: What of it is trained, in order.
        contents: The contents of all messages, in order; None where one went unseen.
        is_altered: Whether the template wrote a trained content otherwise than it was given.
        is_unseen: Whether a content that is not empty went unseen.
        added: The stop token behind the last response, where the template writes none; None where
            all of the text is the template's.
    """

    text: str
    spans: tuple[Span, ...]
    contents: tuple[Range | None, ...]
    is_altered: bool = False
    is_unseen: bool = False
    added: Range | None = None

    @property
    def written(self) -> str:
        """What the chat template wrote."""
        start, end = self.added or (0, 0)
        return self.text[:start] + self.text[end:]


def render_chat(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    options: DataOptions,
    stop_texts: Collection[str],
) -> list[RenderedText]:
    """Renders a chat with the tokenizer's chat template and finds what of it is trained.

    A template may write an earlier turn differently once later turns exist: one may drop old
    reasoning, another may end the last turn in a different token. Then no single text shows every
    response as it is at inference, and the conversation becomes one text per response, unless
    `multi_turn` is `joint`.

    Args:
        conversation: A conversation with turns.
        tokenizer: Has a chat template.
        index: Row of the dataset, for error messages.
        options: `multi_turn`, `train_on` and `chat_template_kwargs` matter here.
        stop_texts: The tokens at which inference stops, as text.

    Raises:
        RowError: If the template refuses the conversation, or writes a response that does not
            continue what inference supplies.
    """
    render = _Rendering(conversation, tokenizer, index, options, stop_texts)
    count = len(conversation.turns)
    whole = render(count)
    contents = render.contents(count, whole)
    if options.train_on == "all" or not options.use_loss_mask:
        span = Span(0, None, len(whole), 0, "text", needs_stop=False)
        return [RenderedText(whole, (span,), contents)]
    # Responses that open the conversation have no prompt to answer: they are context only.
    prompts = (
        n for n, turn in enumerate(conversation.turns) if turn.message["role"] != "assistant"
    )
    first = next(prompts, count)
    trained = [n for n, turn in enumerate(conversation.turns) if turn.train and n >= first]
    if not trained:
        raise RowError(
            index,
            "only responses that open the conversation are trained: no prompt comes before them. "
            "Put the turn that they answer before them, or remove the row.",
            "response without a prompt",
        )
    if options.multi_turn != "split" or len(trained) == 1:
        spans = [render.span(turn, whole, contents) for turn in trained]
        is_joint = options.multi_turn == "joint" and len(trained) > 1
        if is_joint or all(span.kind != "rewritten" for span in spans):
            return [render.result(whole, spans, contents)]
    return [render.alone(turn) for turn in trained]


class _Rendering:
    """The first turns of a conversation as text, and what of it is trained."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: PreTrainedTokenizerBase,
        index: int,
        options: DataOptions,
        stop_texts: Collection[str],
    ) -> None:
        self._turns = conversation.turns
        self._messages = conversation.messages
        self._cores = [core_of(message) for message in self._messages]
        self._conversation = conversation
        self._tokenizer = tokenizer
        self._options = options
        self._index = index
        self._stop_texts = stop_texts
        self._render = partial(
            render_turns, conversation, tokenizer=tokenizer, index=index, options=options
        )

    def __call__(
        self,
        num_messages: int,
        generation_prompt: bool = False,
        messages: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The first messages as text."""
        return self._render(num_messages, generation_prompt=generation_prompt, messages=messages)

    def contents(self, num_messages: int, text: str) -> tuple[Range | None, ...]:
        """Where the contents of the first messages went in their rendered text."""
        base = free_base(text, 2 * num_messages)
        if base is not None:
            try:
                marked = self(num_messages, messages=mark(self._messages, self._cores, base))
            except RowError:
                marked = ""
            plain, ranges = unmark(marked, num_messages, base)
            if plain == text:
                return ranges
        return self._search(num_messages, text)

    def span(self, turn: int, text: str, contents: Sequence[Range | None]) -> Span:
        """What of a turn is trained."""
        content = contents[turn]
        span = Span(
            start=content[0] if content else 0,
            content=content,
            bound=next((later[0] for later in contents[turn + 1 :] if later), len(text)),
            turn=turn,
            kind="exact",
            weight=self._turns[turn].weight,
            has_calls=bool(calls_of(self._messages[turn])),
        )
        if self._messages[turn]["role"] != "assistant":
            if content is None:
                raise RowError(
                    self._index,
                    f"the chat template does not show the content of message {turn}, which is to "
                    "be trained. Leave its role out of train_roles, or remove the row.",
                    "trained content is not shown",
                )
            # No generation prompt opens such a turn, so what is trained is its content.
            weighted = self._weighted(turn, text, content, span.start)
            return replace(span, needs_stop=False, weighted=weighted)
        start, kind = self._begin(turn, text, contents)
        if turn + 1 < len(contents):
            end = self._end(turn, text, content[1] if content else start)
            if end is None:
                kind = "rewritten"
            else:
                span = replace(span, bound=min(span.bound, max(end, start)))
        weighted = self._weighted(turn, text, content, start)
        # Inference may supply how the content begins.
        content = content and (min(max(start, content[0]), content[1]), content[1])
        return replace(span, kind=kind, start=start, content=content, weighted=weighted)

    def _begin(
        self, turn: int, text: str, contents: Sequence[Range | None]
    ) -> tuple[int, SpanKind]:
        """Where the model begins to write a response, and how that was found."""
        content = contents[turn]
        limit = content[0] if content else len(text)
        prompt = self(turn, generation_prompt=True)
        is_second = turn > 0 and self._messages[turn - 1]["role"] == "assistant"
        if text.startswith(prompt) and not is_second:
            return len(prompt), "exact"
        base = self(turn)
        opening = prompt[len(base) :] if prompt.startswith(base) else ""
        if is_second and prompt == base:
            # The generation prompt writes nothing before a second response in a row, but the
            # template writes a header.
            first = max(n for n in range(turn) if self._messages[n]["role"] != "assistant") + 1
            earlier, opened = self(first), self(first, generation_prompt=True)
            opening = opened[len(earlier) :] if opened.startswith(earlier) else ""
        elif text.startswith(prompt):
            return len(prompt), "exact"
        if opening and text.startswith(base):
            closing = self._stop_texts if is_second else ()
            start, rest = after_opening(text, len(base), opening, closing) or (None, "")
            if start is not None and (
                TAGS.fullmatch(text[start:limit]) if content else may_leave_out(rest, text, start)
            ):
                return min(start, limit), "shared_prefix"
        if text.startswith(prompt):
            return len(prompt), "exact"
        before = max((r[1] for r in contents[:turn] if r), default=0)
        found = text.rfind(opening, before, limit)
        start = content[0] if content else max(before, common_length(text, prompt))
        return (min(found + len(opening), limit) if opening and found >= 0 else start), "rewritten"

    def _end(self, turn: int, text: str, after: int) -> int | None:
        """Where the stop token of a response ends that is not the last turn of a text.

        Args:
            turn: Position of the message.
            text: The rendered text.
            after: Where the content of the response ends.

        Returns:
            None where the text does not show the response as it is when it is the last one, or has
            no stop token right behind it.
        """
        own = self(turn + 1)
        found = [(own.rfind(stop), stop) for stop in self._stop_texts]
        ends = [place + len(stop) for place, stop in found if place >= after]
        if ends:
            own = own[: max(ends)]
            return len(own) if text.startswith(own) else None
        # Inference may stop at the header of the next turn.
        own = own.rstrip()
        behind = len(text) - len(text[len(own) :].lstrip())
        stops = [stop for stop in self._stop_texts if text.startswith(stop, behind)]
        if not stops or not text.startswith(own):
            return None
        return behind + len(max(stops, key=len))

    def alone(self, turn: int) -> RenderedText:
        """A turn as it is when it is the last one."""
        text = self(turn + 1)
        contents = self.contents(turn + 1, text)
        span = self.span(turn, text, contents)
        if span.kind == "rewritten":
            prompt = self(turn, generation_prompt=True)
            raise RowError(
                self._index,
                f"at inference the model would continue {prompt[-60:]!r}, but the chat template "
                f"writes the response of message {turn} as {text[-120:]!r}, which does not begin "
                "so. Training on it would teach a continuation that is never asked for. Use a "
                "template whose generation prompt is how it begins a response.",
                "response does not continue the generation prompt",
            )
        return self.result(text, [span], contents)

    def result(
        self, text: str, spans: Sequence[Span], contents: tuple[Range | None, ...]
    ) -> RenderedText:
        """The text with what is trained, on which the markers of the template have to agree."""
        conversation, trained = self._conversation, [span.turn for span in spans]
        marked = marked_ranges(conversation, len(contents), text, self._tokenizer, self._options)
        check_markers(conversation, marked, contents, trained, self._index)
        for span in spans:
            # Where the turns before are written otherwise, so may be the reasoning.
            has_reasoning = span.kind != "rewritten"
            turn, core = self._turns[span.turn], self._cores[span.turn]
            part = (text, (span.start, span.bound))
            check_written(turn, span.turn, core, span.content, *part, has_reasoning, self._index)
        is_altered = any(self._is_altered(span, text) for span in spans)
        is_unseen = any(
            content is None and start < end
            for content, (start, end) in zip(contents, self._cores, strict=False)
        )
        rendered = RenderedText(text, tuple(spans), contents, is_altered, is_unseen)
        return self._stopped(rendered) if spans[-1].turn + 1 == len(contents) else rendered

    def _stopped(self, rendered: RenderedText) -> RenderedText:
        """The text with a stop token behind the last response, where the template writes none."""
        text, span = rendered.text, rendered.spans[-1]
        content_end = span.content[1] if span.content else span.start
        if not span.needs_stop or any(stop in text[content_end:] for stop in self._stop_texts):
            return rendered
        stop = stop_behind(self, self._messages[: span.turn + 1], self._stop_texts)
        if stop is None:
            return rendered
        space = self._content(span.turn)[self._cores[span.turn][1] :]
        if not span.content or not text.startswith(space, content_end):
            space = ""
        place = max(len(text.rstrip()), content_end + len(space))
        shared = common_length(text[place:], stop)
        place, stop = place + shared, stop[shared:]
        added = (place, place + len(stop))
        return replace(
            rendered,
            text=text[:place] + stop + text[place:],
            spans=(*rendered.spans[:-1], replace(span, bound=added[1])),
            added=added,
        )

    def _is_altered(self, span: Span, text: str) -> bool:
        """Whether a content, with the reasoning in it, stands otherwise than it was given."""
        content = self._content(span.turn).strip()
        if span.content is None:
            return bool(content) and content not in text
        return not text.endswith(content, span.content[1] - len(content), span.content[1])

    def _content(self, turn: int) -> str:
        content = self._messages[turn].get("content")
        return content if isinstance(content, str) else ""

    def _weighted(
        self, turn: int, text: str, content: Range | None, first: int
    ) -> tuple[tuple[int, int, float], ...]:
        """The parts of a content that count otherwise, in a span of the rendered text."""
        parts = self._turns[turn].weighted
        if not parts:
            return ()
        given, (start, end) = self._content(turn), self._cores[turn]
        move = content[0] - start if content else -1
        if move < 0 or not text.startswith(given, move):
            # Space and reasoning before the content may be left out, but not written otherwise.
            is_other = content is None or text[slice(*content)] != given[start:end]
            has_reasoning = content is not None and text[first : content[0]].strip() != ""
            if is_other or (
                has_reasoning and any(given[a : min(b, start)].strip() for a, b, _ in parts)
            ):
                raise RowError(
                    self._index,
                    f"message {turn} has parts with a flag or weight of their own, but the chat "
                    "template does not write its content as it is, so they cannot be found. Use a "
                    "template that does, or one flag and weight for the whole message.",
                    "parts of a content cannot be found",
                )
            parts = tuple((max(a, start), min(b, end), weight) for a, b, weight in parts)
        moved = [(max(a + move, first), b + move, weight) for a, b, weight in parts]
        return tuple((a, b, weight) for a, b, weight in moved if a < b)

    def _header_end(self, turn: int, text: str) -> int:
        """How far the text of a turn is known to be its header."""
        if self._messages[turn]["role"] != "assistant" or turn == 0:
            return 0
        prompt = self(turn, generation_prompt=True)
        common = common_length(text, prompt)
        return before_open_tag(text[:common]) if common >= len(self(turn)) else 0

    def _search(self, num_messages: int, text: str) -> tuple[Range | None, ...]:
        """Looks the contents up in order, for a template that sentinels disturb."""
        ranges: list[Range | None] = []
        position = 0
        for turn in range(num_messages):
            core = self._content(turn)[slice(*self._cores[turn])]
            position = max(position, self._header_end(turn, text))
            found = text.find(core, position) if core else -1
            ranges.append((found, found + len(core)) if found >= 0 else None)
            position = max(position, found + len(core) if found >= 0 else 0)
        return tuple(ranges)
