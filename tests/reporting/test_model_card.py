"""The model card: valid front matter, and nothing in it but what was measured or set."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_sft_plugin.reporting.model_card import CardFacts, write_model_card

BEFORE = {"eval_loss": 6.30834, "eval_perplexity": 549.12096, "eval_token_accuracy": 0.0}
AFTER = {
    "eval_loss": 0.02994,
    "eval_perplexity": 1.03039,
    "eval_token_accuracy": 0.99275,
    "eval_exact_match": 0.9675,
    "eval_runtime": 1.25,
    "step": 875,
}


def make_facts(**overrides: Any) -> CardFacts:
    facts = {
        "model_name": "tiny-model",
        "base_model": "some-lab/base-model",
        "library_name": "transformers",
        "settings": {"learning rate": 0.003, "schedule": "cosine"},
        "versions": {"torch": "2.13.0"},
        **overrides,
    }
    return CardFacts(**facts)


def write(folder: Path, plots: Any = (), **overrides: Any) -> ModelCard:
    path = write_model_card(folder, make_facts(**overrides), plots)
    assert path == folder / "README.md"
    return ModelCard.load(path)


def front_matter(folder: Path) -> Any:
    _, block, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(block)


def test_the_front_matter_is_exactly_what_the_hub_reads(tmp_path: Path) -> None:
    write(
        tmp_path,
        library_name="peft",
        after=AFTER,
        tags=["demo", "sft"],
        license="apache-2.0",
        language="en",
        datasets=["some-lab/rows"],
    )
    assert front_matter(tmp_path) == {
        "base_model": "some-lab/base-model",
        "datasets": ["some-lab/rows"],
        "language": "en",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["demo", "hf_sft_plugin", "sft"],
        "model-index": [
            {
                "name": "tiny-model",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "held-out rows", "type": "held-out"},
                        "metrics": [
                            metric("loss", 0.02994, "Loss (nats per response token)"),
                            metric("perplexity", 1.03039, "Perplexity"),
                            metric("token_accuracy", 0.99275, "Token accuracy"),
                            metric("exact_match", 0.9675, "Exact match of generated responses"),
                        ],
                    }
                ],
            }
        ],
    }


def metric(kind: str, value: float, name: str) -> dict[str, Any]:
    return {"type": kind, "value": value, "name": name}


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    card = write(tmp_path, base_model=None)
    assert front_matter(tmp_path) == {
        "library_name": "transformers",
        "model_name": "tiny-model",
        "pipeline_tag": "text-generation",
        "tags": ["hf_sft_plugin", "sft"],
    }
    assert "from a model without a name." in card.text
    assert "](" not in card.text
    assert "Evaluation" not in card.text
    assert "Training data" not in card.text


def test_the_body_shows_figures_before_and_after_and_links_the_base_model(tmp_path: Path) -> None:
    card = write(
        tmp_path,
        plots=[tmp_path / "report" / "token_entropy.png"],
        before=BEFORE,
        after=AFTER,
        ledger="rows    2 in = 2 trained",
    )
    assert card.text.strip() == (
        "# tiny-model\n\n"
        "Fine-tuned with hf_sft_plugin from "
        "[some-lab/base-model](https://huggingface.co/some-lab/base-model). "
        "The loss was taken over response tokens only.\n\n"
        "## Evaluation on held-out rows\n\n"
        "|  | before training | after training |\n"
        "| --- | --- | --- |\n"
        "| Loss (nats per response token) | 6.3083 | 0.0299 |\n"
        "| Perplexity | 549.1210 | 1.0304 |\n"
        "| Token accuracy | 0.0000 | 0.9928 |\n"
        "| Exact match of generated responses | - | 0.9675 |\n\n"
        "![token entropy](report/token_entropy.png)\n\n"
        "## Training data\n\n```\nrows    2 in = 2 trained\n```\n\n"
        "## Settings\n\n"
        "| setting | value |\n| --- | --- |\n| learning rate | 0.003 |\n| schedule | cosine |\n\n"
        "## Versions\n\n"
        "| library | version |\n| --- | --- |\n| torch | 2.13.0 |"
    )


def test_the_card_says_where_the_weights_of_the_best_step_were_taken(tmp_path: Path) -> None:
    card = write(tmp_path, after=AFTER, best_step=1500)
    assert "|  | before training | after step 1,500, the best |" in card.text
    assert "after training" not in card.text


@pytest.mark.parametrize("before", [{}, BEFORE])
def test_without_an_evaluation_after_training_there_is_no_table(
    before: Mapping[str, float], tmp_path: Path
) -> None:
    card = write(tmp_path, before=before)
    assert "Evaluation" not in card.text
    assert "model-index" not in front_matter(tmp_path)


def test_figures_that_are_not_finite_are_shown_but_kept_from_the_index(tmp_path: Path) -> None:
    after = {"eval_loss": math.nan, "eval_perplexity": math.inf, "eval_token_accuracy": 0.5}
    card = write(tmp_path, after=after)
    assert "| Loss (nats per response token) | - | nan |" in card.text
    assert "| Perplexity | - | inf |" in card.text
    (result,) = front_matter(tmp_path)["model-index"][0]["results"]
    assert result["metrics"] == [metric("token_accuracy", 0.5, "Token accuracy")]
    write(tmp_path, after={"eval_loss": math.nan})
    assert "model-index" not in front_matter(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "a: b",
        "null",
        "yes",
        "123",
        "1e3",
        "- item",
        "---",
        "#1",
        "*alias",
        "&anchor",
        "!tag",
        "[list]",
        "{map}",
        "@at",
        "100%",
        "back\\slash",
        "quotes \" and '",
        "pipe | cell",
        "\u00e4 \u6f22 \U0001f600",
        " space around ",
        "x" * 200,
    ],
)
def test_no_name_breaks_the_front_matter(name: str, tmp_path: Path) -> None:
    card = write(tmp_path, model_name=name, after=AFTER, tags=[name], license=name, datasets=[name])
    block = front_matter(tmp_path)
    assert block["model-index"][0]["name"] == name
    assert block["license"] == name
    assert block["datasets"] == [name]
    assert name in block["tags"]
    assert card.data.model_name == name
    assert card.data.eval_results[0].metric_value == 0.02994
    assert f"# {name}\n" in card.text


def test_names_from_data_break_neither_tables_nor_fences_nor_terminals(tmp_path: Path) -> None:
    ledger = "columns messages: ```\n# Heading\x1b[2J"
    key = "eval_a|b<script>\n\u202e_loss"
    body = write(tmp_path, after={"eval_loss": 1.0, key: 2.0}, ledger=ledger).text
    (line,) = [line for line in body.splitlines() if "script" in line]
    assert line.startswith("| Loss (nats per response token), a\\|b\\<script\\>")
    assert line.endswith("\\<U+202E\\> | - | 2.0000 |")
    assert "\n````\ncolumns messages: ```\n# Heading\u241b[2J\n````\n" in body
    assert "\x1b" not in body


def test_a_second_card_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, model_name="first")
    write(tmp_path, model_name="second")
    text = (tmp_path / "README.md").read_text()
    assert "first" not in text
    assert text.count("# second") == 1
