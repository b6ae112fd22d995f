"""The model card: what was trained, on what, and what was measured."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_sft_plugin.types import visible, visible_lines

# By the end of the log key: in between stands the name of the set where there are several.
_EVAL_NAMES = {
    "loss": "Loss (nats per response token)",
    "perplexity": "Perplexity",
    "token_accuracy": "Token accuracy",
    "token_entropy": "Token entropy (nats)",
    "exact_match": "Exact match of generated responses",
}


@dataclass
class CardFacts:
    """What a card says; every value was measured or set, none is guessed.

    Attributes:
        model_name: Name of the result.
        base_model: Name of the model it was tuned from; None for one that has no name.
        library_name: `peft` for an adapter, else `transformers`.
        settings: Hyperparameters by name.
        versions: Versions of the libraries by name.
        ledger: The account of the training data, as lines of text.
        before: Evaluation before training; empty where it was not run.
        after: The last evaluation, or that of the best step where its weights were taken.
        best_step: Optimizer step whose weights were taken, as the best; None: those of the last.
        tags: Tags besides our own.
        license: Licence of the result, if it is known.
        language: Its language, if it is known.
        datasets: Names of the datasets, if they are known.
    """

    model_name: str
    base_model: str | None
    library_name: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    ledger: str = ""
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    tags: Sequence[str] = ()
    license: str | None = None
    language: str | None = None
    datasets: Sequence[str] = ()


def write_model_card(output_dir: Path, facts: CardFacts, plots: Sequence[Path] = ()) -> Path:
    """Writes `README.md`, the model card, into the folder of a run.

    Args:
        output_dir: Folder of the run.
        facts: What the card says.
        plots: PNG files inside the folder, shown in the card.
    """
    data = ModelCardData(
        model_name=facts.model_name,
        base_model=facts.base_model,
        library_name=facts.library_name,
        pipeline_tag="text-generation",
        tags=sorted({"hf_sft_plugin", "sft", *facts.tags}),
        license=facts.license,
        language=facts.language,
        datasets=list(facts.datasets) or None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name="held-out rows",
                metric_type=key.removeprefix("eval_"),
                metric_name=name,
                metric_value=facts.after[key],
            )
            for key, name in _figures(facts.after)
            # The Hub reads these figures as JSON, which has no NaN or infinity.
            if math.isfinite(facts.after[key])
        ]
        or None,
    )
    path = output_dir / "README.md"
    content = f"---\n{data.to_yaml()}\n---\n\n{_body(facts, plots, output_dir)}"
    ModelCard(content).save(path)
    return path


def _body(facts: CardFacts, plots: Sequence[Path], output_dir: Path) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    sections = [
        f"# {visible(facts.model_name)}\n",
        "Fine-tuned with hf_sft_plugin from "
        + (base if facts.base_model else "a model without a name")
        + ". The loss was taken over response tokens only.\n",
        _evaluation(facts),
    ]
    for plot in plots:
        relative = plot.relative_to(output_dir).as_posix()
        sections.append(f"![{plot.stem.replace('_', ' ')}]({relative})\n")
    if facts.ledger:
        ledger = visible_lines(facts.ledger)
        # Longer than any in the names of columns, so that it ends where it should.
        fence = max(["```", *(f"{found}`" for found in re.findall("`{3,}", ledger))], key=len)
        sections.append(f"## Training data\n\n{fence}\n{ledger}\n{fence}\n")
    sections.append("## Settings\n\n" + _table(("setting", "value"), facts.settings.items()))
    sections.append("## Versions\n\n" + _table(("library", "version"), facts.versions.items()))
    return "\n".join(section for section in sections if section)


def _evaluation(facts: CardFacts) -> str:
    rows = [
        (name, _figure(facts.before.get(key)), _figure(facts.after[key]))
        for key, name in _figures(facts.after)
    ]
    if not rows:
        return ""
    after = "after training"
    if facts.best_step is not None:
        after = f"after step {facts.best_step:,}, the best"
    return "## Evaluation on held-out rows\n\n" + _table(("", "before training", after), rows)


def _figures(evaluation: Mapping[str, float]) -> list[tuple[str, str]]:
    """The log keys of an evaluation that a card shows, each with its name."""
    figures = []
    for ending, name in _EVAL_NAMES.items():
        for key in evaluation:
            dataset = key.removeprefix("eval_").removesuffix(ending).rstrip("_")
            if key == f"eval_{ending}":
                figures.append((key, name))
            elif key == f"eval_{dataset}_{ending}":
                figures.append((key, f"{name}, {dataset}"))
    return figures


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    lines += [f"| {' | '.join(_in_line(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _in_line(value: Any) -> str:
    """A name or figure as Markdown that shows it, whatever stands in it."""
    text = visible(str(value)).replace("\n", " ")
    return re.sub(r"([\\`\[\]<>|])", r"\\\1", text)
