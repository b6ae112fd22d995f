"""Where the recipes are, and what their tables say."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import forking
from rich.console import Console
from rich.table import Table


@pytest.fixture
def recipes() -> Path:
    """The folder of the recipes."""
    return Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture
def cells_of() -> Callable[[Table], list[list[str]]]:
    """Reads the rows of a table as they are printed."""

    def read(table: Table) -> list[list[str]]:
        text = StringIO()
        Console(file=text, width=240).print(table)
        lines = [line for line in text.getvalue().splitlines() if line.startswith("\u2502")]
        return [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in lines]

    return read


@pytest.fixture
def forked_contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants begin with everything imported, which takes each of them seconds otherwise."""
    context = forking()
    for module in ("turns", "scaling"):
        forks = SimpleNamespace(get_context=lambda method: context)
        monkeypatch.setattr(f"{module}.multiprocessing", forks)
