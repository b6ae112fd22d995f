"""The house stays as it was drawn: small files, short functions, a test beside every module."""

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_sft_plugin

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_sft_plugin"
RECIPES = ROOT / "recipes"
ROOMS = (
    "batches",
    "checkpoints",
    "cli",
    "encoding",
    "evaluation",
    "loss",
    "masks",
    "models",
    "preparation",
    "preview",
    "reporting",
    "rows",
    "shards",
    "tokens",
    "training",
    "verification",
)
SOURCES = sorted(path for folder in (PACKAGE, RECIPES) for path in folder.rglob("*.py"))
MODULES = [path for path in SOURCES if not path.name.startswith("__")]
MAX_FILES = 12
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def modules_of(room: str) -> list[Path]:
    return [path for path in MODULES if path.is_relative_to(PACKAGE / room)]


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES
    lengths = {function.name: num_lines(function) for function in functions(path)}
    assert [name for name, length in lengths.items() if length > MAX_FUNCTION_LINES] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_code_is_ascii(path: Path) -> None:
    assert path.read_bytes().isascii()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_its_test_file(path: Path) -> None:
    inside = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.relative_to(ROOT)
    assert (ROOT / "tests" / inside.parent / f"test_{path.name}").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_the_init_of_a_room_holds_a_docstring_and_nothing_else(room: str) -> None:
    (docstring,) = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_few_files(room: str) -> None:
    assert 0 < len(modules_of(room)) <= MAX_FILES


@pytest.mark.parametrize("room", ROOMS)
def test_the_page_of_a_room_begins_with_its_sentence_and_names_its_files(room: str) -> None:
    page = (PACKAGE / room / "README.md").read_text(encoding="utf-8")
    module = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    sentence = (ast.get_docstring(module) or "").splitlines()[0]
    assert page.splitlines()[0] == sentence
    assert sentence.endswith(".")
    assert [path.name for path in modules_of(room) if path.name not in page] == []


def test_the_package_has_the_rooms_of_the_design_and_no_others() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "types.py"}


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "util", "helpers", "common", "misc", "tools"}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.py")), ids=name_of)
def test_recipes_use_only_what_the_package_offers_at_its_top(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    assert not [module for module in modules if module.startswith("hf_sft_plugin.")]


def test_contracts_name_one_module_in_each_line() -> None:
    """Import-linter takes a list with commas for one module, which nobody imports."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    contracts = [config[name] for name in config.sections() if name.startswith("importlinter:")]
    assert len(contracts) >= 5
    lists = [value for each in contracts for key, value in each.items() if key.endswith("modules")]
    assert not [value for value in lists if "," in value]


def test_type_checkers_find_an_editable_installation() -> None:
    """Setuptools installs it as a path then; without it as a finder, which runs in Python only."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["options"]["package_dir"].split() == ["=", "."]
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_stands_in_one_place() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: hf_sft_plugin.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_sft_plugin.__version__)


def test_the_tested_versions_are_exact_and_the_others_are_minimums() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    tested = config["options.extras_require"]["tested"].split()
    required = config["options"]["install_requires"].split()
    assert tested == [
        "torch==2.13.0",
        "transformers==5.24.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "peft==0.21.2",
        "evaluate==0.4.6",
    ]
    assert {line.split(">=")[0] for line in required} >= {line.split("==")[0] for line in tested}
    assert all(">=" in line for line in required)
    extras = {"tested", "report", "triton", "deepspeed", "test", "bench"}
    assert set(config["options.extras_require"]) == extras
