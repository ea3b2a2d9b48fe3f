"""Which file may import which: one direction, no circle, and forms that every tool follows in a checkout."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "convert",
    "cli",
    "eval",
    "heal",
    "hub",
    "run",
)  # the package's parts that lie beside its root folder

# From the bottom up. A file imports its own floor and those below it.
FLOORS = (
    ("mhconvert",),  # the root: errors, progress, device, versions; api is a floor of its own
    ("convert",),
    ("eval", "heal"),
    ("hub",),
    ("api",),
    ("run",),
    ("cli",),
)
# The same inside convert/, by folder; the two files on top are those that are opened first.
CONVERT_FLOORS = (
    ("storage",),
    ("validation",),
    ("methods/settings",),  # settings.py, info.py, method_info.py and the registry: without torch
    ("recipe",),
    ("bare_process",),
    ("families",),
    ("attention",),
    ("donor",),
    ("calibration",),
    ("methods",),
    ("checkpoint",),
    ("layer_pass",),
    ("adapters",),
    ("open_model",),
    ("export",),
    ("pipeline",),
)
METHODS = tuple(path.parent.name for path in sorted(ROOT.glob("convert/methods/*/method.py")))


def module_of(path: Path) -> str:
    """The import name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "mhconvert" else ("mhconvert", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """Every file of the package, by its import name."""
    files = [path for top in ("mhconvert", *FOLDERS) for path in sorted((ROOT / top).rglob("*.py"))]
    return {module_of(path): path for path in files}


SOURCES = sources()


def imports(
    module: str, text: str, is_package: bool
) -> Iterator[tuple[str, int, ast.ImportFrom | ast.Import]]:
    """(absolute name, dots of the statement, the statement) of every import of our own in a file's text."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in SOURCES else base, node.level, node)


def floor(module: str) -> int:
    """The number of a module's floor in FLOORS."""
    word = module.split(".")[1] if module.count(".") else "mhconvert"
    word = word if word in (*FOLDERS, "api") else "mhconvert"
    return next(index for index, names in enumerate(FLOORS) if word in names)


def convert_floor(module: str) -> int:
    """The number of a module's floor in CONVERT_FLOORS, of a module in convert/."""
    parts = module.split(".")[2:]
    torch_free = parts[-1] in ("settings", "info", "method_info", "registry") or parts == ["methods"]
    word = "methods/settings" if parts[0] == "methods" and torch_free else parts[0]
    return next(index for index, names in enumerate(CONVERT_FLOORS) if word in names)


def faults(module: str, text: str, is_package: bool = False) -> list[str]:
    """What the imports of one file do against the rules."""
    found = []
    own = next((top for top in FOLDERS if module.startswith(f"mhconvert.{top}")), None)
    for name, level, node in imports(module, text, is_package):
        where = f"{module}:{node.lineno}"
        if name.split(".")[0] in FOLDERS:
            found.append(f"{where}: a bare import of {name} makes a second copy of the package")
        if not name.startswith("mhconvert"):
            continue
        if name not in SOURCES:
            found.append(f"{where}: there is no module {name}")
        target = next((top for top in FOLDERS if name.startswith(f"mhconvert.{top}")), None)
        if own is not None and target is not None and not level:
            found.append(f"{where}: {name} is imported by its absolute name; use dots")
        if level and (own is None or target is None):
            found.append(f"{where}: {name} is imported with dots across the package's root")
        if is_package or name not in SOURCES:
            continue
        if (
            SOURCES[name].name == "__init__.py" and name != "mhconvert.api"
        ):  # the others import nothing of a floor
            continue
        if module != "mhconvert.__main__" and floor(name) > floor(module):
            found.append(f"{where}: upward import of {name}")
        if own == target == "convert" and convert_floor(name) > convert_floor(module):
            found.append(f"{where}: upward import of {name} inside convert/")
        method = next((each for each in METHODS if f".methods.{each}." in f"{module}."), None)
        other = next((each for each in METHODS if f".methods.{each}." in f"{name}."), None)
        if method is not None and other is not None and method != other:
            found.append(f"{where}: a method knows another: {name}")
    return found


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_file_imports_what_lies_below_it(module: str) -> None:
    path = SOURCES[module]
    assert faults(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("mhconvert.convert.pipeline", "from .statistics import observe", "there is no module"),
        ("mhconvert.convert.pipeline", "import convert.donor", "second copy"),
        ("mhconvert.convert.pipeline", "from eval import fidelity", "second copy"),
        ("mhconvert.convert.pipeline", "from mhconvert.convert.recipe import recipe", "absolute name"),
        ("mhconvert.convert.pipeline", "from ..errors import MhconvertError", "across the package's root"),
        (
            "mhconvert.convert.pipeline",
            "from ..eval import fidelity",
            "upward import of mhconvert.eval.fidelity",
        ),
        ("mhconvert.run.stages", "from ..cli import main", "upward import of mhconvert.cli.main"),
        ("mhconvert.heal.run", "from mhconvert.api import convert", "upward import of mhconvert.api"),
        ("mhconvert.convert.storage.byte_size", "from ..donor import donor", "inside convert/"),
        ("mhconvert.convert.methods.mla.method", "from ..dha import method", "a method knows another"),
    ],
)
def test_what_is_against_the_rules_is_found(module: str, text: str, said: str) -> None:
    assert any(said in fault for fault in faults(module, text))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, each sorted."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in graph.get(waiting.pop(), set()) - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    reach = {module: reached(module) for module in graph}
    rings = {tuple(sorted(b for b in reach[a] if a in reach.get(b, set()))) for a in graph if a in reach[a]}
    return sorted(map(list, rings))


def test_there_is_no_circle() -> None:
    graph = {
        module: {
            name
            for name, _, _ in imports(module, path.read_text(encoding="utf-8"), False)
            if name in SOURCES and name != module and SOURCES[name].name != "__init__.py"
        }
        for module, path in SOURCES.items()
        if path.name != "__init__.py"
    }
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
