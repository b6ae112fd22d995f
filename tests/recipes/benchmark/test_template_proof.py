"""Real templates are tried on conversations in which every word has one owner."""

from pathlib import Path

import template_proof
from rich.console import Console

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_each_template_has_a_line_with_what_became_of_each_conversation(tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text(CHATML)
    (tmp_path / "refusing.jinja").write_text("{{ raise_exception('no') }}")
    (tmp_path / "silent.jinja").write_text(CHATML.replace("m.content", "'so'"))
    # Inference stops at the header of the next turn.
    headers = CHATML.replace("<|im_start|>{{ m.role }}", "<|{{ m.role }}|>").replace(
        "<|im_end|>\n", ""
    )
    headers = headers.replace("<|im_start|>assistant", "<|assistant|>")
    (tmp_path / "stops_later.jinja").write_text(headers)
    plain, refusing, silent, later = template_proof.prove_templates(tmp_path)
    assert plain.results["single"] == "1 exact, 1 ex."
    assert {plain.results[name] for name in ("multi", "echo", "emoji", "spaces", "control")} == {
        "2 exact, 1 ex."
    }
    assert set(refusing.results.values()) == {"refused by the chat template"}
    dropped = "the chat template drops a content of a response"
    assert set(silent.results.values()) == {dropped}
    assert later.results["single"] == "1 exact, 1 ex."
    assert later.results["multi"] == "2 exact, 1 ex."
    assert [proof.num_leaks for proof in (plain, refusing, silent, later)] == [0, 0, 0, 0]
    console = Console(width=200, record=True)
    console.print(template_proof.proof_table([plain, refusing, silent]))
    assert "The masks of 3 chat templates" in console.export_text()


def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    # The template repeats the question within the answer's turn, where it is trained.
    leaking = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{{ messages[0].content }} {% endif %}{{ m.content }}",
    )
    (tmp_path / "leaking.jinja").write_text(leaking)
    (proof,) = template_proof.prove_templates(tmp_path)
    assert proof.num_leaks or "disagree" in proof.results["single"]
