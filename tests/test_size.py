"""How long a function and a module may be, so that each can be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mhconvert", "convert", "cli", "eval", "heal", "hub", "run")
FUNCTION_LINES = 50
MODULE_LINES = 250
SHIPPED_MODULE_LINES = 400  # modeling_*.py: one file that travels with the checkpoint, whatever it holds


def sources() -> list[Path]:
    """Every file of the package, by its folder in the repository; a link to a folder is not followed."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def too_long(name: str, text: str) -> list[str]:
    """What in one file's text is longer than allowed.

    Args:
        name: The file's name, which tells a shipped modeling file.
        text: The file's source.

    Returns:
        A line per module and function over its limit, with the number of its lines.
    """
    is_shipped = name.startswith("modeling_")
    limit = SHIPPED_MODULE_LINES if is_shipped else MODULE_LINES
    lines = len(text.splitlines())
    over = [f"{lines} lines in the module, over {limit}"] if lines > limit else []
    if is_shipped:
        return over
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                over.append(f"{lines} lines in {node.name}, over {FUNCTION_LINES}")
    return over


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short(path: Path) -> None:
    assert too_long(path.name, path.read_text(encoding="utf-8")) == []


def test_what_is_too_long_is_told() -> None:
    def function(lines: int) -> str:
        return "def long():\n" + "    pass\n" * (lines - 1)

    assert too_long("a.py", function(50)) == []
    assert too_long("a.py", function(51)) == ["51 lines in long, over 50"]
    assert too_long("a.py", "pass\n" * 251) == ["251 lines in the module, over 250"]
    assert too_long("modeling_a.py", function(400)) == []
    assert too_long("modeling_a.py", "pass\n" * 401) == ["401 lines in the module, over 400"]
