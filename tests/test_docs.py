"""What README.md and docs/ name exists: commands, options, files, tests."""

import ast
import dataclasses
import importlib
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

import smollm
from tests.helpers import ROOT
from tests.test_training import options_of

PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# Options of other programs: pip, torchrun
FOREIGN_OPTIONS = {"dist", "help", "no-deps", "quiet", "index-url", "nproc_per_node", "nnodes",
                   "rdzv_backend", "rdzv_endpoint", "shutdown-timeout"}


class Command(NamedTuple):
    page: str
    script: str
    arguments: list[str]


def find_commands() -> list[Command]:
    """All of the form `python SCRIPT ...` and `torchrun ... SCRIPT ...`."""
    pattern = r"\b(?:python3?|torchrun(?: --\S+)*) ([\w/]+\.py)((?: [^`\n&|]+)?)"
    commands = []
    for page, text in PAGES.items():
        for script, arguments in re.findall(pattern, text.replace("\\\n", " ")):
            commands.append(Command(page, script, shlex.split(arguments, comments=True)))
    return commands


COMMANDS = find_commands()


def source_files() -> list[Path]:
    return [path for path in ROOT.rglob("*.py")
            if not {".venv", "out", "data", "runs"} & set(path.relative_to(ROOT).parts)]


@lru_cache
def option_names() -> set[str]:
    """The fields of every class Options."""
    names = set()
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == "Options":
                names |= {field.target.id for field in node.body
                          if isinstance(field, ast.AnnAssign)}
    return names


@lru_cache
def names_of_tests() -> list[str]:
    """What `pytest -k` looks in: files, functions and what a test is parametrized with."""
    names = []
    for path in (ROOT / "test_smollm.py", *sorted((ROOT / "tests").glob("test_*.py"))):
        names.append(path.name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.append(node.name)
    return names


def label(command: Command) -> str:
    return " ".join([command.page, command.script, *command.arguments])[:90]


@pytest.mark.parametrize("command", COMMANDS, ids=label)
def test_commands_of_the_docs_are_understood(command):
    assert (ROOT / command.script).is_file()
    if command.script == "train.py":
        o, _ = options_of(*command.arguments)
        assert o.model in smollm.PRESETS
    elif command.arguments:
        module = importlib.import_module(command.script.removesuffix(".py").replace("/", "."))
        assert dataclasses.is_dataclass(module.Options)
        tyro.cli(module.Options, args=command.arguments, use_underscores=True,
                 config=(tyro.conf.FlagConversionOff,))


def test_the_docs_have_commands_for_all_three_scripts():
    scripts = [command.script for command in COMMANDS if command.page == "README.md"]
    assert {"train.py", "sample.py", "tools/convert.py"} <= set(scripts)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_the_docs_name_exist(page):
    text = PAGES[page]
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (folder / target).exists(), target
    folders = "lib|tools|tests|bench|examples|docs|assets"
    for name in re.findall(rf"`((?:{folders})/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    files = {path.name for path in source_files()}
    for name in re.findall(r"`(\w+\.py)`", text):
        assert name in files, name
    for name in re.findall(r"`([A-Z]\w+\.md|requirements\.txt)`", text):
        assert list(ROOT.rglob(name)), name


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_lead_to_one(page):
    for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", PAGES[page]):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings]
        assert heading in anchors, heading


@pytest.mark.parametrize("page", PAGES)
def test_options_that_the_docs_name_exist(page):
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGES[page]))
    assert named <= option_names() | FOREIGN_OPTIONS


def named_tests(text: str) -> list[str]:
    """After `pytest -k`, in the last column of tables that are about it, and test_... anywhere."""
    named = re.findall(r"pytest (?:\S+ )?-k (\w+)", text)
    for expression in re.findall(r"pytest (?:\S+ )?-k [\"']([^\"']+)[\"']", text):
        named += set(expression.split()) - {"and", "or", "not"}
    is_about_tests = False
    for line in text.splitlines():
        if not line.startswith("|"):
            is_about_tests = False
            continue
        *_, last, _ = line.split("|")
        if "pytest -k" in last:
            is_about_tests = True
        elif is_about_tests:
            named += re.findall(r"`(\w+)`", last)
    named += re.findall(r"`(?:[\w/.]+::)?(test_\w+)`", text)
    return named


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_the_docs_name_exist(page):
    for name in named_tests(PAGES[page]):
        assert any(name in test for test in names_of_tests()), name


def test_the_docs_name_many_tests():
    named = set()
    for text in PAGES.values():
        named |= set(named_tests(text))
    assert len(named) > 20


def test_readme_shows_the_diagram_of_smollm_py():
    lines = smollm.__doc__.splitlines()
    diagram = [line for line in lines if line.startswith("    ")]
    assert len(diagram) > 20
    assert "```\n" + "\n".join(diagram) + "\n```" in PAGES["README.md"]


def test_no_comment_of_an_option_is_cut_in_its_help():
    """The command-line library takes a comment beside an option for its help, but not the next
    lines."""
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == "Options":
                lines = path.read_text().splitlines()[node.lineno:node.end_lineno]
                assert not [line for line in lines if re.match(r" {5,}#", line)], path
