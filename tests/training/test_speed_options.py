"""The settings that decide on speed say what they can be."""

import pytest

from hf_sft_plugin.training.speed_options import SpeedOptions


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("fused_head", "auto, on or off"),
        ("padding_free", "auto, on or off"),
        ("shared_prompts", "auto or off"),
        ("trained_positions_only", "auto or off"),
        ("fused_layers", "auto or off"),
    ],
)
def test_a_switch_that_is_neither_names_its_choices(name: str, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'true'; choose {choices}. In YAML"):
        SpeedOptions(**{name: "true"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "kept"), [("4096", 4096), (7, 7), ("auto", "auto"), (None, None)]
)
def test_a_budget_may_come_as_text(given: int | str | None, kept: int | str | None) -> None:
    assert SpeedOptions(max_tokens_per_microbatch=given).max_tokens_per_microbatch == kept
