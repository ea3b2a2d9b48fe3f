"""Which file may import which: one direction, no circle, and forms that every tool follows in a checkout."""

from __future__ import annotations

import ast
import re
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
# The same inside convert/, by folder; the files on top are those that are opened first.
CONVERT_FLOORS = (
    ("storage",),
    ("validation",),
    ("bare_process",),
    ("families",),
    ("attention",),
    ("methods",),
    ("donor",),
    ("recipe",),
    ("calibration",),
    ("checkpoint",),
    ("layer_pass",),
    ("adapters",),
    ("open_model",),
    ("finished_conversion",),
    ("export",),
    ("pipeline",),
    ("planned_chain",),
)
ABOVE_ALL = ("mhconvert", "mhconvert.__main__")  # the public names and the script know every floor
METHODS = tuple(path.parent.name for path in sorted(ROOT.glob("convert/methods/*/info.py")))
# Modules that are named in a string and imported when they are needed, against the floors: (who names, what is named).
NAMED_LATER = (
    (
        re.compile(r"mhconvert\.convert\.methods\.\w+\.info"),
        "mhconvert.convert.export",
    ),  # the writers of forms
    (re.compile(r"mhconvert\.(convert|heal)"), "mhconvert.api"),  # what `make_callable` calls
)
DOTTED = re.compile(r"mhconvert(\.\w+)+")


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


def folder(module: str) -> str | None:
    """The folder of FOLDERS that a module lies in."""
    return next((top for top in FOLDERS if f"{module}.".startswith(f"mhconvert.{top}.")), None)


def floor(module: str) -> int:
    """The number of a module's floor in FLOORS."""
    word = module.split(".")[1] if module.count(".") else "mhconvert"
    word = word if word in (*FOLDERS, "api") else "mhconvert"
    return next(index for index, names in enumerate(FLOORS) if word in names)


def convert_floor(module: str) -> int:
    """The number of a module's floor in CONVERT_FLOORS, of a module in convert/."""
    parts = module.split(".")[2:]
    if not parts:  # the folder's own __init__.py
        return len(CONVERT_FLOORS)
    return next(index for index, names in enumerate(CONVERT_FLOORS) if parts[0] in names)


def named_modules(text: str) -> Iterator[tuple[str, int]]:
    """(the module, the line) of every string that is the dotted name of one of our modules, or of a name in one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            name = node.value
            while name not in SOURCES:
                name = name.rpartition(".")[0]
            if name != "mhconvert":
                yield name, node.lineno


def against_the_floors(module: str, name: str) -> list[str]:
    """What is wrong with it that `module` knows the module `name`; nothing where there is none of that name."""
    if name not in SOURCES:
        return []
    found = []
    if module not in ABOVE_ALL and floor(name) > floor(module):
        found.append(f"upward import of {name}")
    if folder(module) == folder(name) == "convert" and convert_floor(name) > convert_floor(module):
        found.append(f"upward import of {name} inside convert/")
    method = next((each for each in METHODS if f".methods.{each}." in f"{module}."), None)
    other = next((each for each in METHODS if f".methods.{each}." in f"{name}."), None)
    # One that is named by two others combines them.
    if method is not None and other is not None and other not in (method, *method.split("_")):
        found.append(f"a method knows another: {name}")
    return found


def faults(module: str, text: str, is_package: bool = False) -> list[str]:
    """What the imports of one file do against the rules."""
    found = []
    own = folder(module)
    for name, level, node in imports(module, text, is_package):
        where = f"{module}:{node.lineno}"
        if name.split(".")[0] in FOLDERS:
            found.append(f"{where}: a bare import of {name} makes a second copy of the package")
        if name.split(".")[0] != "mhconvert":
            continue
        if name not in SOURCES:
            found.append(f"{where}: there is no module {name}")
        target = folder(name)
        if own is not None and target is not None and not level:
            found.append(f"{where}: {name} is imported by its absolute name; use dots")
        if level and (own is None or target is None):
            found.append(f"{where}: {name} is imported with dots across the package's root")
        if name == "mhconvert" and module not in ABOVE_ALL and floor(module) < floor("mhconvert.api"):
            found.append(f"{where}: a public name of mhconvert lies above this module; import its own module")
        found += [f"{where}: {fault}" for fault in against_the_floors(module, name)]
    for name, line in named_modules(text):
        if not any(who.fullmatch(module) and f"{name}.".startswith(f"{what}.") for who, what in NAMED_LATER):
            found += [f"{module}:{line}: in a string, {fault}" for fault in against_the_floors(module, name)]
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
        ("mhconvert.convert.methods.mla.method", "from ..hydra import layer", "a method knows another"),
        ("mhconvert.convert.methods.mla.method", "from ..mla_swa import method", "a method knows another"),
        ("mhconvert.convert.methods.mla_swa.method", "from ..dha import method", "a method knows another"),
        ("mhconvert.heal.run", "from mhconvert import evaluate", "a public name of mhconvert lies above"),
        ("mhconvert.heal.run", "import mhconvert", "a public name of mhconvert lies above"),
        ("mhconvert.heal.run", "a = 'mhconvert.api'", "in a string, upward import of mhconvert.api"),
        (
            "mhconvert.eval.inspection",
            "import_module('mhconvert.run.stages')",
            "in a string, upward import of mhconvert.run.stages",
        ),
        (
            "mhconvert.convert.donor.donor",
            "a = 'mhconvert.convert.export.forms.writer'",
            "in a string, upward import of mhconvert.convert.export.forms inside convert/",
        ),
        (
            "mhconvert.convert.methods.mla.info",
            "a = 'mhconvert.eval.fidelity'",
            "in a string, upward import of mhconvert.eval.fidelity",
        ),
        (
            "mhconvert.convert.methods.mla.info",
            "a = 'mhconvert.convert.methods.dha'",
            "in a string, a method knows another",
        ),
    ],
)
def test_what_is_against_the_rules_is_found(module: str, text: str, said: str) -> None:
    assert any(said in fault for fault in faults(module, text))


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("mhconvert.convert", "from ..eval import fidelity", ["upward import of mhconvert.eval.fidelity"]),
        ("mhconvert.eval", "from ..cli import main", ["upward import of mhconvert.cli.main"]),
        (
            "mhconvert.convert.storage",
            "from ..donor import donor",
            ["upward import of mhconvert.convert.donor.donor"],
        ),
        ("mhconvert.convert.methods.mla", "from ..dha import method", ["a method knows another"]),
        ("mhconvert", "from mhconvert.run.run_recipe import run", []),
        ("mhconvert.run", "from mhconvert import evaluate", []),
        ("mhconvert.heal", "make_callable(__name__, 'mhconvert.api')", []),
        ("mhconvert.eval", "name = 'mhconvert.api'", ["in a string, upward import of mhconvert.api"]),
    ],
)
def test_the_rules_hold_for_packages(module: str, text: str, said: list[str]) -> None:
    found = faults(module, text, is_package=True)
    assert len(found) == len(said)
    assert all(part in fault for part, fault in zip(said, found, strict=True))


def test_an_import_of_a_package_is_upward_too() -> None:
    said = ["mhconvert.convert.pipeline:1: upward import of mhconvert.cli"]
    assert faults("mhconvert.convert.pipeline", "from ..cli import nothing") == said


def test_a_name_that_begins_alike_lies_in_no_folder() -> None:
    assert [folder(name) for name in ("mhconvert.running", "mhconvert.run", "mhconvert.run.stages")] == [
        None,
        "run",
        "run",
    ]
    assert faults("mhconvert.progress", "import mhconverted") == []


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


def graph_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules that each of `modules` imports."""
    return {
        module: {
            name
            for name, _, _ in imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
            if name in SOURCES and name != module
        }
        for module, path in modules.items()
    }


def by_folder(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """`graph` between the folders of convert/, and the files that lie in convert/ itself."""
    folders: dict[str, set[str]] = {}
    for module, names in graph.items():
        if module.startswith("mhconvert.convert."):
            inside = [name for name in names if name.startswith("mhconvert.convert.")]
            own = module.split(".")[2]
            folders.setdefault(own, set()).update({name.split(".")[2] for name in inside} - {own})
    return folders


def test_there_is_no_circle() -> None:
    graph = graph_of({module: path for module, path in SOURCES.items() if module not in ABOVE_ALL})
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_there_is_no_circle_between_the_folders_of_convert() -> None:
    graph = graph_of(SOURCES)
    assert circles(by_folder(graph)) == []
    facts, refusals = "mhconvert.convert.families.facts", "mhconvert.convert.methods.refusals"
    assert refusals in graph, "the module that lies above the families' facts"
    assert circles(by_folder(graph | {facts: {refusals}})) == [["attention", "families", "methods"]]
