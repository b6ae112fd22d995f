"""Recipes are programs: their folder is where they find each other."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))


@pytest.fixture
def recipes() -> Path:
    """The folder of the recipes."""
    return RECIPES
