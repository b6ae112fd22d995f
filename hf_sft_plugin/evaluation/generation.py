"""Evaluation by generating: the prompts of prepared rows are continued and judged."""

import importlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_sft_plugin.batches.padding_rows import rows_of_dataset
from hf_sft_plugin.models.loading import last_position
from hf_sft_plugin.rows.arguments import stored_rows
from hf_sft_plugin.tokens.tokenization import tokenize_example
from hf_sft_plugin.types import RowError, TokenizedExample

logger = logging.getLogger(__name__)


class GeneratedResponse(NamedTuple):
    """One prompt, what the model answered and what it should have answered, as text.

    Attributes:
        prompt: Everything before the response.
        response: What was generated.
        reference: The expected response.
        num_tokens: Tokens that were generated, the stop token among them.
        is_stopped: Whether the last of them is a stop token; else the limit was reached.
    """

    prompt: str
    response: str
    reference: str
    num_tokens: int = 0
    is_stopped: bool = False


class Metric(Protocol):
    """What judges responses: an `evaluate.Metric`, or anything that computes like one."""

    def compute(self, *, predictions: list[str], references: list[str]) -> Mapping[str, Any]:
        """Figures by name."""


class ExactMatch:
    """Share of predictions that equal their reference, ignoring space around them.

    Works offline, unlike `evaluate.load("exact_match")`.

    Examples:
        >>> ExactMatch().compute(predictions=["4", "5 "], references=["4", "6"])
        {'exact_match': 0.5}
    """

    def compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
        """As in `evaluate.Metric`, for texts."""
        pairs = list(zip(predictions, references, strict=True))
        hits = sum(prediction.strip() == reference.strip() for prediction, reference in pairs)
        return {"exact_match": hits / len(pairs)}


def load_metric(name: str) -> Metric:
    """The built-in `exact_match`, or any other metric of `evaluate` by its name or path."""
    if name == "exact_match":
        return ExactMatch()
    # Importing evaluate takes long, and the processes of a run would share a file.
    metric: Metric = importlib.import_module("evaluate").load(name, keep_in_memory=True)
    return metric


def examples_to_answer(
    dataset: Any, num_rows: int | None, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[TokenizedExample]:
    """The first rows of a dataset as tokenized examples.

    Args:
        dataset: Raw or prepared rows.
        num_rows: Only the first rows; None takes all.
        tokenizer: Tokenizes raw rows.
        **options: Those of `tokenize_example`.

    Returns:
        One example per prepared row; of a raw row as many as `tokenize_example` gives.

    Raises:
        ValueError: If there is no dataset, if there are several, or if it is a stream.
        RowError: If a raw row has no response.
    """
    dataset = rows_of_dataset(dataset)
    if dataset is None:
        raise ValueError(
            "There are no rows to answer. Pass a dataset, or give the trainer an eval_dataset. A "
            "loader without a dataset has none but batches: set predict_with_generate to False."
        )
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"There are several datasets, {', '.join(map(str, dataset))}, but responses are "
            f"generated for one. Pass one of them, such as eval_dataset[{next(iter(dataset))!r}]."
        )
    refuse_stream(dataset)
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        # A format such as "torch" would make tensors of lists and numbers.
        dataset = stored_rows(dataset, "The dataset")
    examples: list[TokenizedExample] = []
    for index in range(len(dataset))[:num_rows]:
        row = dataset[index]
        if row.get("response_mask") is not None:
            examples.append(row)
            continue
        try:
            examples += tokenize_example(row, tokenizer, **options)
        except RowError as error:
            raise RowError(index, error.problem, error.reason) from error
    return examples


def refuse_stream(dataset: object) -> None:
    """Raises a `ValueError` on a dataset without a length, for which nothing can be generated."""
    if not isinstance(dataset, Sized):
        raise ValueError(
            "Responses cannot be generated for a streaming dataset: the processes share its rows "
            "by their numbers. Keep the rows to evaluate on in memory, for example with "
            "Dataset.from_list(list(dataset.take(100))), or set predict_with_generate to False."
        )


def last_prompt(example: TokenizedExample) -> tuple[list[int], list[int]]:
    """Splits a row where its last response begins.

    What comes before it is exactly what inference supplies, so nothing is rendered again.

    Returns:
        The token ids of the prompt, and those of the response with its stop token.

    Examples:
        >>> last_prompt({"input_ids": [5, 6, 7, 2, 9], "response_mask": [0, 0, 1, 1, 0]})
        ([5, 6], [7, 2])
    """
    mask = example["response_mask"]
    end = len(mask) - mask[::-1].index(1)
    start = end
    while start > 0 and mask[start - 1]:
        start -= 1
    return [*example["input_ids"][:start]], [*example["input_ids"][start:end]]


def plan_batches(
    lengths: Sequence[int], batch_size: int, max_new_tokens: int, num_positions: int | None
) -> list[tuple[list[int], int]]:
    """Batches of prompts of similar length, which have room for as many new tokens each.

    So a long prompt does not shorten the answers to the other prompts of its batch.

    Args:
        lengths: Tokens of each prompt.
        batch_size: Prompts at a time.
        max_new_tokens: Longest response.
        num_positions: Where prompt and response have to end; None: anywhere.

    Returns:
        The prompts of each batch, and its longest response.

    Examples:
        >>> plan_batches([4, 7, 3, 5], batch_size=2, max_new_tokens=5, num_positions=9)
        [([1], 2), ([3], 4), ([0, 2], 5)]
    """

    def room(index: int) -> int:
        left = max_new_tokens if num_positions is None else num_positions - lengths[index]
        return max(1, min(left, max_new_tokens))

    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    groups = [(limit, list(same)) for limit, same in groupby(order, key=room)]
    return [
        (numbers[start : start + batch_size], limit)
        for limit, numbers in groups
        for start in range(0, len(numbers), batch_size)
    ]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Collection[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
    of_processes: Sequence[Sequence[Sequence[int]]] = (),
) -> list[list[int]]:
    """Continues prompts greedily, in batches of similar length, padded on the left.

    Where the model has a last position, responses end there.

    Args:
        model: The unwrapped model.
        prompts: Token ids; none is empty.
        stop_token_ids: Tokens that end a response.
        pad_token_id: Fills prompts on the left; masked, so any id will do.
        max_new_tokens: Longest response.
        batch_size: Prompts at a time.
        progress: Title of a progress bar; None shows none.
        of_processes: The prompts of every process, so that all of them run as many batches.

    Returns:
        Per prompt, in order, the new tokens up to and with the stop token.
    """
    plan, *others = (
        plan_batches(list(map(len, each)), batch_size, max_new_tokens, last_position(model))
        for each in (prompts, *of_processes)
    )
    num_missing = max(map(len, [plan, *others])) - len(plan)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stop_token_ids),
        pad_token_id=pad_token_id,
    )
    responses: list[list[int]] = [[] for _ in prompts]
    batches = [*plan, *plan[-1:] * num_missing]
    with _generation_mode(model, config):
        bar = tqdm(batches, desc=progress, disable=progress is None, leave=False)
        for indices, config.max_new_tokens in bar:
            width = max(len(prompts[index]) for index in indices)
            input_ids = torch.full((len(indices), width), pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for row, index in enumerate(indices):
                input_ids[row, width - len(prompts[index]) :] = torch.as_tensor(prompts[index])
                attention_mask[row, width - len(prompts[index]) :] = 1
            sequences = cast(Any, model).generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
            )
            for index, sequence in zip(indices, sequences[:, width:].tolist(), strict=True):
                stops = (i + 1 for i, token in enumerate(sequence) if token in stop_token_ids)
                responses[index] = sequence[: next(stops, len(sequence))]
    return responses


@contextmanager
def _generation_mode(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, with these settings alone; everything is put back afterwards.

    `generate` takes settings that are None from the config that was saved with the model,
    such as a penalty on repetitions.
    """
    owner = getattr(model, "get_base_model", lambda: model)()
    saved, was_training = owner.generation_config, model.training
    owner.generation_config = config
    model.eval()
    try:
        yield
    finally:
        owner.generation_config = saved
        model.train(was_training)


def generate_responses(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    stop_token_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[GeneratedResponse]:
    """Answers the last prompt of each example; each process takes its share, all get the result.

    Args:
        model: The unwrapped model.
        examples: Prepared rows.
        tokenizer: Turns tokens into text, without special tokens.
        accelerator: Knows the processes.
        stop_token_ids: See `generate`.
        max_new_tokens: See `generate`.
        batch_size: Prompts at a time on each process.

    Returns:
        One response per example, in order.
    """
    pairs = [last_prompt(example) for example in examples]
    num_processes = accelerator.num_processes
    num_each = -(-len(pairs) // num_processes)
    # Where weights are sharded, all processes have to run the model equally often.
    shares = [
        [*range(rank, len(pairs), num_processes), 0][:num_each] for rank in range(num_processes)
    ]
    prompts = [[pairs[index][0] for index in share] for share in shares]
    mine = range(accelerator.process_index, len(pairs), num_processes)
    if accelerator.is_main_process:
        _warn_of_little_room([len(prompt) for prompt, _ in pairs], max_new_tokens, model)
    pad_token_id = tokenizer.pad_token_id
    answers = generate(
        model,
        prompts[accelerator.process_index],
        stop_token_ids=stop_token_ids,
        pad_token_id=pad_token_id if pad_token_id is not None else min(stop_token_ids),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress="Generating" if accelerator.is_main_process else None,
        of_processes=prompts,
    )
    responses = []
    for index, answer in zip(mine, answers, strict=False):
        is_stopped = bool(answer) and answer[-1] in stop_token_ids
        (prompt, reference), response = pairs[index], answer[: len(answer) - is_stopped]
        texts = [
            str(tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (prompt, response, reference)
        ]
        told = GeneratedResponse(texts[0], texts[1], texts[2], len(answer), is_stopped)
        responses.append((index, told))
    return [response for _, response in sorted(gather_object(responses))]


def _warn_of_little_room(
    lengths: Sequence[int], max_new_tokens: int, model: PreTrainedModel
) -> None:
    last = last_position(model)
    num_short = sum(last is not None and length + max_new_tokens > last for length in lengths)
    if num_short:
        logger.warning(
            "%d of %d prompts leave less room than generation_max_new_tokens, %d, in the %d "
            "positions that the model has. Their responses end there.",
            num_short,
            len(lengths),
            max_new_tokens,
            last,
        )


def with_whole_reference(
    responses: Sequence[GeneratedResponse],
    examples: Sequence[TokenizedExample],
    stop_token_ids: Collection[int],
    name: str = "eval",
) -> list[GeneratedResponse]:
    """The responses that can be judged fairly: the expected one ends with a stop token.

    Rows that were cut to `max_length` have lost it, and nothing could match what is left of them.
    Where no row has one, as in rows that were tokenized without, all responses are given. The log
    tells of both.
    """
    whole = [
        response
        for response, example in zip(responses, examples, strict=True)
        if last_prompt(example)[1][-1] in stop_token_ids
    ]
    num_cut = len(responses) - len(whole)
    if num_cut and PartialState().is_main_process:
        logger.warning(
            "%s: %d of %d expected responses do not end with a stop token: their rows were cut to "
            "max_length, or never had one. %s.",
            name,
            num_cut,
            len(responses),
            "They are not judged" if whole else "Exact match with what is left of them says little",
        )
    return whole or list(responses)


def generation_figures(responses: Sequence[GeneratedResponse]) -> dict[str, float]:
    """How often responses end by themselves, and their mean length in tokens.

    Examples:
        >>> generation_figures([
        ...     GeneratedResponse("Say a.", "a", "a", num_tokens=2, is_stopped=True),
        ...     GeneratedResponse("Say b.", "a a a a", "b", num_tokens=4),
        ... ])
        {'stop_rate': 0.5, 'mean_generated_tokens': 3.0}
    """
    return {
        "stop_rate": sum(each.is_stopped for each in responses) / len(responses),
        "mean_generated_tokens": sum(each.num_tokens for each in responses) / len(responses),
    }


def judge(responses: Sequence[GeneratedResponse], metrics: Sequence[Metric]) -> dict[str, float]:
    """Computes metrics of `evaluate` over generated responses; only their numbers are kept."""
    predictions = [response.response for response in responses]
    references = [response.reference for response in responses]
    results: dict[str, float] = {}
    for metric in metrics:
        values = metric.compute(predictions=predictions, references=references)
        results.update({k: float(v) for k, v in values.items() if isinstance(v, int | float)})
    return results
