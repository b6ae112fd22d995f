"""The walk of a batch of rows: normal form, rendering, tokens, mask, proof, truncation."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.encoding.decoding import TokenDecoder
from hf_sft_plugin.encoding.texts import JoinedEncoding, PartEncoder, TextEncoder, TextEncoding
from hf_sft_plugin.masks.rendering import RenderedText
from hf_sft_plugin.masks.row_variables import RowRenderer
from hf_sft_plugin.masks.special_tokens import ControlTokenMarker
from hf_sft_plugin.masks.stop_tokens import resolve_stop_tokens, stop_texts
from hf_sft_plugin.rows.arguments import require_tokenizer
from hf_sft_plugin.rows.conversation import remarks_on, to_conversation
from hf_sft_plugin.rows.formats import RowFormat
from hf_sft_plugin.tokens.eval_masks import (
    mark_masks,
    missing_column,
    needs_column,
    with_every_response,
)
from hf_sft_plugin.tokens.response_mask import check_parts, mask_text
from hf_sft_plugin.tokens.segments import join_segments
from hf_sft_plugin.tokens.tokenized_rows import check_tokenized_row
from hf_sft_plugin.tokens.truncation import (
    keep,
    mask_runs,
    max_row_length,
    nothing_left,
    plan_truncation,
    without_oldest_exchange,
)
from hf_sft_plugin.types import Conversation, DataOptions, RowError, TokenizedExample, TrainedSpan

# A row, its trained token ids, the text that they must decode to, and what encodes that text alone.
Proof: TypeAlias = tuple["RowOutcome", Sequence[int], str, Callable[[], JoinedEncoding] | None]


@dataclass
class RowOutcome:
    """What became of one raw row: examples to train, or the reason why there are none.

    Attributes:
        row: Position of the row in its dataset.
        examples: Usually one; one per response where the chat template rewrites earlier turns.
        spans: What each example trains, and why.
        num_tokens: Tokens of all examples before truncation.
        num_lost: Tokens of them that are in no example.
        num_stopped: Examples whose last trained token is a stop token.
        num_cut_before_stop: Examples that lost their stop token to truncation.
        control_tokens: Control tokens that stood in the contents.
        num_straddled: Edges of responses at which the whole text has other tokens than its parts.
        is_lossy: Whether the tokenizer cannot give the text back exactly, as one that lowers case.
        is_altered: Whether the chat template changed the text of a response.
        is_unseen: Whether a second rendering could not show where every content went.
        added_stops: Stop tokens put behind last responses, where the chat template writes none.
        remarks: Likely mistakes in a row that can be trained.
        error: Why the row is dropped; None where it is trained.
    """

    row: int
    examples: list[TokenizedExample] = field(default_factory=list)
    spans: list[list[TrainedSpan]] = field(default_factory=list)
    num_tokens: int = 0
    num_lost: int = 0
    num_stopped: int = 0
    num_cut_before_stop: int = 0
    control_tokens: list[str] = field(default_factory=list)
    num_straddled: int = 0
    is_lossy: bool = False
    is_altered: bool = False
    is_unseen: bool = False
    added_stops: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    error: RowError | None = None

    @property
    def num_example_tokens(self) -> int:
        """Tokens of the examples."""
        return sum(len(example["input_ids"]) for example in self.examples)

    def drop(self, error: RowError) -> None:
        """Leaves the row out, for a reason."""
        self.error = error
        self.num_tokens = max(self.num_tokens, self.num_example_tokens)
        self.num_lost = self.num_tokens
        self.examples, self.spans = [], []

    def add(self, example: TokenizedExample, spans: list[TrainedSpan]) -> None:
        """Adds an example."""
        self.examples.append(example)
        self.spans.append(spans)


class RowTokenizer:
    """Tokenizes batches of rows; holds everything that is the same for all rows of a dataset.

    Args:
        tokenizer: See `tokenize_example`.
        options: See `DataOptions`.
        stop_token_ids: See `tokenize_example`.
        eval_masks: See `prepare_dataset`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        stop_token_ids: Collection[int] | None,
        eval_masks: Collection[str] = (),
    ) -> None:
        require_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._trains_all = options.trained_mask == "all"
        self._trains_last = options.trained_mask == "last_response"
        self._eval_masks = eval_masks if needs_column(options, eval_masks) else ()
        self._options = options = with_every_response(options) if self._eval_masks else options
        self._stops = resolve_stop_tokens(tokenizer, options.stop_token, stop_token_ids)
        self._limit = max_row_length(tokenizer, options.max_length)
        self._marker = ControlTokenMarker(tokenizer)
        self._encode = TextEncoder(tokenizer)
        self._encode_parts = PartEncoder(tokenizer)
        self._encode_hidden = PartEncoder(tokenizer, self._marker.encode)
        self._decode = TokenDecoder(tokenizer)
        self._render = RowRenderer(tokenizer, options, stop_texts(tokenizer, self._stops))

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], row_format: RowFormat
    ) -> list[RowOutcome]:
        """Tokenizes rows together; see `tokenize_rows`."""
        outcomes = [RowOutcome(row) for row in indices]
        chats: list[tuple[RowOutcome, Conversation]] = []
        texts: list[tuple[RowOutcome, Conversation]] = []
        for row, outcome in zip(rows, outcomes, strict=True):
            try:
                if row_format.kind == "tokenized":
                    ignored = self._options.ignored_columns or ()
                    seen = {name: value for name, value in row.items() if name not in ignored}
                    example = check_tokenized_row(
                        seen, outcome.row, len(self._tokenizer), self._trains_all
                    )
                    if self._eval_masks and "eval_masks" not in example:
                        raise missing_column(
                            self._eval_masks, f"Row {outcome.row} and maybe others"
                        )
                    runs = mask_runs(example["response_mask"])
                    outcome.add(example, [TrainedSpan(a, b, 0, "given") for a, b in runs])
                    continue
                conversation = to_conversation(row, outcome.row, row_format, self._options)
                known = (row_format, self._options, bool(self._tokenizer.chat_template))
                outcome.remarks = remarks_on(conversation, *known)
                (chats if conversation.turns else texts).append((outcome, conversation))
            except RowError as error:
                outcome.drop(error)
        self._prove([*self._tokenize_chats(chats), *self._tokenize_texts(texts)])
        for outcome, conversation in chats:
            self._shorten(outcome, conversation)
        for outcome, made in (*chats, *texts) if self._eval_masks else ():
            is_all = self._trains_all and bool(made.turns)
            mark_masks(outcome.examples, outcome.spans, self._trains_last, is_all)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.error is None:
                self._finish(outcome)
            if outcome.error is None and isinstance(row.get("source"), (str, int)):
                for example in outcome.examples:
                    example["source"] = str(row["source"])
        return outcomes

    def _tokenize_chats(self, chats: Sequence[tuple[RowOutcome, Conversation]]) -> list[Proof]:
        """Fills the outcomes of chats, and returns what is to be proven of them."""
        shown: list[tuple[RowOutcome, Conversation]] = []
        for outcome, conversation in chats:
            try:
                shown.append((outcome, self._hide_control_tokens(outcome, conversation)))
            except RowError as error:
                outcome.drop(error)
        rows = [outcome.row for outcome, _ in shown]
        rendered: list[tuple[RowOutcome, RenderedText]] = []
        all_texts = self._render([conversation for _, conversation in shown], rows)
        for (outcome, _), texts in zip(shown, all_texts, strict=True):
            if isinstance(texts, RowError):
                outcome.drop(texts)
            else:
                rendered += [(outcome, text) for text in texts]
        keeps = self._options.control_tokens == "keep"
        usual = [text.text for outcome, text in rendered if keeps or not outcome.control_tokens]
        encodings = iter(self._encode(usual))
        proofs: list[Proof] = []
        for outcome, text in rendered:
            is_hidden = bool(outcome.control_tokens) and not keeps
            encoding: TextEncoding = (
                self._marker.encode([text.text]) if is_hidden else next(encodings)
            )
            if outcome.error is None:
                proofs += self._mask_chat(outcome, text, encoding, is_hidden)
        if self._options.multi_turn == "auto":
            alone = []
            for outcome, conversation in chats:
                spans = [span for made in outcome.spans for span in made]
                if any(span.kind == "rewritten" for span in spans):
                    # Later responses would be trained with the cut tokens in their context.
                    outcome.examples, outcome.spans, outcome.num_straddled = [], [], 0
                    alone += [(outcome, conversation.up_to(span.turn)) for span in spans]
            proofs += self._tokenize_chats(alone) if alone else []
        return proofs

    def _hide_control_tokens(self, outcome: RowOutcome, conversation: Conversation) -> Conversation:
        if not self._tokenizer.chat_template:
            raise ValueError(
                "The rows are conversations, but the tokenizer has no chat template to write them "
                "with. Set tokenizer.chat_template (MaskedSFTConfig and recipe: "
                "chat_template_path), or use the tokenizer of the model's chat version."
            )
        outcome.control_tokens = outcome.control_tokens or self._marker.find(conversation)
        if not outcome.control_tokens or self._options.control_tokens == "keep":
            return conversation
        if self._options.control_tokens == "error":
            raise self._has_control_tokens(outcome)
        if self._marker.is_ambiguous(conversation):
            raise RowError(
                outcome.row,
                "the contents hold control tokens and characters from U+100000 on, which stand in "
                "for control tokens while the template writes. Remove one or the other.",
                "control tokens beside private characters",
            )
        return self._marker.hide(conversation)

    def _has_control_tokens(self, outcome: RowOutcome) -> RowError:
        found = ", ".join(sorted(set(outcome.control_tokens)))
        return RowError(
            outcome.row,
            f"the contents hold the control tokens {found}. Remove them, or set control_tokens to "
            "'text', which encodes them as ordinary text.",
            "control tokens in the contents",
        )

    def _mask_chat(
        self, outcome: RowOutcome, text: RenderedText, encoding: TextEncoding, is_hidden: bool
    ) -> list[Proof]:
        encode = self._encode_hidden if is_hidden else self._encode_parts
        show = self._marker.show if is_hidden else str
        try:
            masked = mask_text(
                text, encoding, encode, self._stops, self._options.boundary, outcome.row
            )
            if is_hidden:
                self._marker.check(text.text, encoding.ids, outcome.row)
            if masked.input_ids is not encoding.ids:
                read, expected = self._decode([masked.input_ids, encoding.ids])
                check_parts(read, expected, show(text.text), outcome.row)
        except RowError as error:
            outcome.num_tokens = outcome.num_example_tokens + len(encoding.ids)
            outcome.drop(error)
            return []
        example: TokenizedExample = {"input_ids": masked.input_ids, "response_mask": masked.mask}
        if masked.weights is not None:
            example["loss_weights"] = masked.weights
        outcome.add(example, masked.spans)
        outcome.num_straddled += masked.num_straddled
        outcome.is_altered |= text.is_altered
        outcome.is_unseen |= text.is_unseen
        if text.added is not None:
            outcome.added_stops.append(text.text[slice(*text.added)].strip())
        return [(outcome, ids, show(told), partial(encode, [told])) for ids, told in masked.proofs]

    def _tokenize_texts(self, texts: Sequence[tuple[RowOutcome, Conversation]]) -> list[Proof]:
        """Fills the outcomes of texts without a template, and returns what is to be proven."""
        if not texts:
            return []
        proofs: list[Proof] = []
        segments = [conversation.segments for _, conversation in texts]
        # A prompt without a template is taken as it is written, control tokens and all.
        as_text = self._options.control_tokens == "text"
        encode = partial(self._marker.encode_response, stops=self._stops) if as_text else None
        all_joined = join_segments(segments, self._tokenizer, self._stops, encode)
        for (outcome, conversation), joined in zip(texts, all_joined, strict=True):
            outcome.control_tokens = self._marker.find(conversation)
            if outcome.control_tokens and self._options.control_tokens == "error":
                outcome.drop(self._has_control_tokens(outcome))
                continue
            if joined is None:
                outcome.drop(_no_token(outcome.row))
                continue
            try:
                if as_text and outcome.control_tokens:
                    self._marker.check_responses(joined.proofs, self._stops, outcome.row)
            except RowError as error:
                outcome.drop(error)
                continue
            outcome.add(joined.example, joined.spans)
            proofs += [(outcome, ids, text, None) for ids, text in joined.proofs]
        return proofs

    def _prove(self, proofs: Sequence[Proof]) -> None:
        """Decodes what is trained: it must be the text of the response."""
        decoded = self._decode([ids for _, ids, *_ in proofs])
        for (outcome, ids, told, encode_alone), read in zip(proofs, decoded, strict=True):
            if read == told or outcome.error is not None:
                continue
            # Some tokenizers never give a text back exactly; then both must lose the same.
            alone = ids if encode_alone is None else encode_alone().ids
            if read.strip() == self._decode([alone])[0].strip():
                outcome.is_lossy = True
                continue
            outcome.drop(
                RowError(
                    outcome.row,
                    f"the trained tokens decode to {read[:80]!r}, but the response is "
                    f"{told[:80]!r}, so the mask cannot be trusted. Use another tokenizer, or "
                    "remove the row.",
                    "trained tokens do not decode to the response",
                )
            )

    def _shorten(self, outcome: RowOutcome, conversation: Conversation) -> None:
        """For `keep_response`: an example that is too long loses its oldest turns first."""
        limit = self._limit
        if self._options.overflow != "keep_response" or limit is None or outcome.error is not None:
            return
        num_tokens = outcome.num_example_tokens
        made = _with_conversations(outcome, conversation)
        outcome.examples, outcome.spans = [], []
        while made:
            example, spans, conversation = made.pop(0)
            is_long, again = len(example["input_ids"]) > limit, RowOutcome(outcome.row)
            shorter = without_oldest_exchange(conversation) if is_long else None
            if shorter is not None:
                self._prove(self._tokenize_chats([(again, shorter)]))
                made = _with_conversations(again, shorter) + made
            if not again.examples:
                outcome.add(example, spans)
        outcome.num_lost = num_tokens - outcome.num_example_tokens

    def _finish(self, outcome: RowOutcome) -> None:
        """Cuts examples to the limit, counts what is lost and drops a row that loses all."""
        limit, overflow = self._limit, self._options.overflow
        longest = max(len(example["input_ids"]) for example in outcome.examples)
        num_before = outcome.num_example_tokens
        outcome.num_tokens = num_before + outcome.num_lost
        made = list(zip(outcome.examples, outcome.spans, strict=True))
        outcome.examples, outcome.spans = [], []
        for example, spans in made:
            if self._trains_all:
                example["response_mask"] = [1] * len(example["input_ids"])
                spans = [TrainedSpan(0, len(example["input_ids"]), 0, "text")]
            pieces = [(example, spans)]
            if limit is not None and len(example["input_ids"]) > limit:
                try:
                    mask = example["response_mask"]
                    plan = plan_truncation(mask, limit, overflow, outcome.row)
                except RowError as error:
                    if overflow == "error":
                        raise
                    outcome.drop(error)
                    break
                pieces = [keep(example, spans, ranges) for ranges in plan]
            for piece, left in pieces:
                # Nothing comes before the first token, so nothing predicts it.
                for marks in (piece["response_mask"], piece.get("eval_masks", [])):
                    marks[0:1] = bytes(len(marks[0:1]))
                if any(piece["response_mask"]) or any(piece.get("eval_masks", ())):
                    outcome.add(piece, left)
                    if _ends_with(piece, self._stops):
                        outcome.num_stopped += 1
                    elif piece is not example and _ends_with(example, self._stops):
                        outcome.num_cut_before_stop += 1
        outcome.num_lost = outcome.num_tokens - outcome.num_example_tokens
        if not outcome.examples and outcome.error is None:
            is_cut = limit is not None and longest > limit
            outcome.drop(nothing_left(outcome.row, limit if is_cut else None, longest))


def _no_token(row: int) -> RowError:
    return RowError(
        row,
        "the tokenizer makes no token of the response. Fill or remove it.",
        "empty response",
    )


def _ends_with(example: TokenizedExample, stops: Collection[int]) -> bool:
    runs = mask_runs(example["response_mask"])
    return bool(runs) and example["input_ids"][runs[-1][1] - 1] in stops


def _with_conversations(
    outcome: RowOutcome, conversation: Conversation
) -> list[tuple[TokenizedExample, list[TrainedSpan], Conversation]]:
    """Each example of a chat with the part of the chat that it was made of."""
    is_whole = len(outcome.examples) == 1
    return [
        (example, spans, conversation if is_whole else conversation.up_to(spans[0].turn))
        for example, spans in zip(outcome.examples, outcome.spans, strict=True)
    ]
