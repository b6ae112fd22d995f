"""Where the recipes are."""

from pathlib import Path

import pytest


@pytest.fixture
def recipes() -> Path:
    """The folder of the recipes."""
    return Path(__file__).parent.parent.parent / "recipes"
