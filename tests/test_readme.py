"""What the README shows runs, and what it names exists."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import sft

from hf_sft_plugin import MaskedSFTConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
# The page of each room.
PAGES = sorted((ROOT / "hf_sft_plugin").glob("*/README.md"))
# An example, and what it prints where that is shown.
EXAMPLES = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", flags=re.DOTALL)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL_LINES = [
    line
    for page in (README, RECIPES, *(page.read_text(encoding="utf-8") for page in PAGES))
    for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.curves
def test_the_python_blocks_run_one_after_the_other(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("outputs/quickstart")
    tokenizer.save_pretrained("outputs/quickstart")
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(PYTHON_BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), names)  # noqa: S102
    assert len(PYTHON_BLOCKS) == 3
    assert Path("outputs/adapter/adapter_model.safetensors").is_file()
    assert names["ledger"].num_rows_trained == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_example_of_a_room_runs_and_prints_what_its_page_shows(
    page: Path,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("outputs/quickstart")
    tokenizer.save_pretrained("outputs/quickstart")
    examples = EXAMPLES.findall(page.read_text(encoding="utf-8"))
    assert examples
    for code, printed in examples:
        capsys.readouterr()
        exec(compile(code, str(page), "exec"), {"__name__": "page"})  # noqa: S102
        assert not printed or capsys.readouterr().out == printed


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.findall(r"grep -m 1 '(.*)' README.md", script)
    assert pattern == ["^python3 -m venv .*pytest .*$"]
    commands = [line for line in README.splitlines() if re.search(pattern[0], line)]
    assert len(commands) == 1
    assert commands[0] in SHELL_LINES
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_flag_and_file_of_the_commands_exists() -> None:
    classes = (sft.ModelArguments, sft.DataArguments, MaskedSFTConfig)
    all_fields = [field for class_ in classes for field in dataclasses.fields(class_)]
    aliases = [alias for field in all_fields for alias in field.metadata.get("aliases", ())]
    fields = {field.name for field in all_fields} | {name.removeprefix("--") for name in aliases}
    parts = [line.partition("#")[0].partition("recipes/sft.py") for line in SHELL_LINES]
    commands = [flags for _, script, flags in parts if script]
    flags = {flag for line in commands for flag in re.findall(r"--(\w+)", line)}
    assert flags - {"help"} <= fields
    paths = {path for line in SHELL_LINES for path in re.findall(r"recipes/[\w./]+", line)}
    assert paths
    assert all((ROOT / path).is_file() or (ROOT / path / "__main__.py").is_file() for path in paths)


def test_the_map_leads_to_every_room_and_names_every_recipe() -> None:
    section = README.partition("## Where to read on")[2]
    links = [path.relative_to(ROOT).as_posix() for path in PAGES]
    assert [link for link in links if f"]({link})" not in section] == []
    recipes = (ROOT / "recipes").rglob("*.py")
    assert [path.name for path in recipes if f"{path.name}`" not in RECIPES] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "recipes" / "README.md", *PAGES],
    ids=lambda page: page.parent.name,
)
def test_the_links_of_a_page_are_files_of_the_project(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert all((page.parent / target).exists() for target in targets)
