"""README and docs: the generated pages are current, every command line parses, every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from mhconvert.cli.main import app, arguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    ROOT / "examples/README.md",
    *PAGES,
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(mhconvert [^`\n]+)`")
LINK = re.compile(r"(?<!\\)\[[^]]*\]\(([^)\s]+)\)")
MODULES = {"mhconvert.heal": ["heal"], "mhconvert.cli.main": [], "mhconvert": []}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shell_lines(text: str) -> Iterator[str]:
    """Logical lines of shell blocks, and of README's indented blocks."""
    for language, body in FENCE.findall(text):
        if language in ("sh", "bash", "shell", "console"):
            yield from body.replace("\\\n", " ").splitlines()
    without_fences = FENCE.sub("", text)
    yield from (line.strip() for line in without_fences.splitlines() if line.startswith("    mhconvert "))


def command_words(line: str) -> list[str] | None:
    """The words behind `mhconvert` of a shell line that runs it, directly or as a module."""
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:
        pytest.fail(f"not a shell line: {line}")
    words = words[: next((n for n, word in enumerate(words) if word in (">", "|", "&&", ";")), None)]
    if words[:1] == ["mhconvert"]:
        return words[1:]
    if "-m" in words:
        index = words.index("-m") + 1
        if words[index] in MODULES:
            return MODULES[words[index]] + words[index + 1 :]
    return None


def parse(words: list[str]) -> None:
    """Raises what the command line's parser raises; runs nothing."""
    group: Any = typer.main.get_command(app)
    words, name = arguments(words), "mhconvert"
    context = group.context_class(group, info_name=name)
    while hasattr(group, "commands"):
        assert words, f"{name} needs a command"
        name, words = words[0], words[1:]
        group = group.commands[name]
        parent, context = context, None
        if hasattr(group, "commands"):
            context = group.context_class(group, info_name=name, parent=parent)
        else:
            group.make_context(name, words, parent=parent)


def options_of(words: list[str]) -> set[str]:
    """Every option of the command that `words` begin with."""
    command: Any = typer.main.get_command(app)
    for word in arguments(words):
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def commands_in(paths: list[Path]) -> list[tuple[str, str]]:
    found = []
    for path in paths:
        for line in shell_lines(path.read_text(encoding="utf-8")):
            if command_words(line):
                found.append((path.relative_to(ROOT).as_posix(), line.strip()))
    return found


@pytest.mark.parametrize("page", ["cli.md", "options.md", "families.md"])
def test_generated_pages_are_what_the_code_says(page: str) -> None:
    pages = generator().pages()
    path = DOCS / "reference" / page
    assert path.read_text(encoding="utf-8") == pages[path], "run python docs/generate.py"


def test_there_are_commands() -> None:
    assert len(commands_in(TEXTS)) > 40


@pytest.mark.parametrize(("page", "line"), commands_in(TEXTS))
def test_every_command_parses(page: str, line: str) -> None:
    words = command_words(line)
    assert words is not None
    parse(words)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_in_a_sentence_has_only_known_options(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for span in INLINE.findall(text):
        words = shlex.split(span.replace("…", "x"))[1:]
        if any(word.startswith("--") for word in words):
            unknown = (
                {word for word in words if word.startswith("--")}
                - options_of(words)
                - {"--help", "--version"}
            )
            assert not unknown, f"{span} in {path.name}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if not target.startswith(("http:", "https:", "mailto:", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), f"{target} in {path.name}"


def test_navigation_has_every_page_once() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)

    def entries(tree: Any) -> Iterator[str]:
        for entry in tree:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else entries(value)

    listed = list(entries(config["nav"]))
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_included_files_exist() -> None:
    for page in PAGES:
        for name in re.findall(r'^--8<-- "([^":]+)', page.read_text(encoding="utf-8"), re.MULTILINE):
            assert (ROOT / name).is_file(), f"{name} in {page.name}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
