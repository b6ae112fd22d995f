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
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL_LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
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
    assert len(PYTHON_BLOCKS) == 5
    assert Path("outputs/adapter/adapter_model.safetensors").is_file()
    assert names["ledger"].num_rows_trained == 2
    assert names["loss"].item() > 0


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
    assert all((ROOT / path).is_file() for path in paths)


def test_the_map_names_every_module() -> None:
    modules = [
        path
        for folder in ("hf_sft_plugin", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    section = README.partition("## Map of the package")[2]
    assert [path.name for path in modules if f"{path.name}`" not in section] == []


def test_the_links_of_the_readme_are_files_of_the_project() -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert all((ROOT / target).exists() for target in targets)
