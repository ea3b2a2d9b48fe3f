"""What the wheel holds is what the tree holds, and what a checkpoint ships needs nothing of ours."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import mhconvert
from mhconvert.convert.checkpoint import provenance

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("mhconvert", "convert", "cli", "eval", "heal", "hub", "run", "recipes")


def code_folders() -> dict[str, str]:
    """Import name -> folder, of every folder of ours that holds a Python file."""
    found = {}
    for top in FOLDERS:
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
            place = folder.relative_to(ROOT).as_posix()
            name = place.replace("/", ".")
            found[name if name.startswith("mhconvert") else f"mhconvert.{name}"] = place
    return found


def test_packages_are_the_tree() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(code_folders())
    assert setuptools["package-dir"] == code_folders()


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
    ]
    built = subprocess.run([*map(str, command), str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {"mhconvert/py.typed"}
    for name, place in code_folders().items():
        files = [
            file for kind in ("py", "yaml", "jsonl", "sha256") for file in (ROOT / place).glob(f"*.{kind}")
        ]
        data = [
            file
            for folder in (ROOT / place).iterdir()
            if folder.is_dir() and not any(folder.glob("*.py")) and folder.name != "__pycache__"
            for file in folder.iterdir()
            if file.is_file()
        ]
        expected |= {f"{name.replace('.', '/')}/{file.relative_to(ROOT / place)}" for file in [*files, *data]}
    assert held == expected


def shipped_files() -> list[Path]:
    """Of every method its modeling file and what a checkpoint has beside it."""
    files = [path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("convert/**/modeling_*.py")]
    modules = [f"mhconvert.{'.'.join(path.parts)}" for path in files]
    found = {file for module in modules for file in provenance.shipped_files(module)}
    return sorted(ROOT / file.resolve().relative_to(ROOT) for file in found)


def test_the_shipped_files_are_found() -> None:
    names = {path.name for path in shipped_files() if path.parent.name == "moh"}
    assert names == {"configuration_moh.py", "head_router.py", "modeling_moh.py"}
    routed = provenance.shipped_files("mhconvert.convert.methods.routed.modeling_moh_dha")
    assert names < {file.name for file in routed}
    assert len({file.name for file in routed}) == len(routed)
    assert ROOT / "convert/methods/dha/modeling_dha.py" in {file.resolve() for file in routed}


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.name)
def test_shipped_files_need_nothing_of_ours(path: Path) -> None:
    allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    # What transformers asks for before it loads a file of the Hub; it leaves out imports in a `try`.
    assert set(get_imports(path)) <= allowed
    if path.name == "coded_kernel.py":
        allowed.add("triton")  # imported in a `try`, and only where the kernel is asked for
    siblings = {other.stem for other in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert {node.module} <= siblings or (
                node.module is None and {alias.name for alias in node.names} <= siblings
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.module.split(".")[0] in allowed


def test_one_version() -> None:
    assert mhconvert.__version__ == importlib.metadata.version("mhconvert")


def test_packages_that_are_functions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from mhconvert import api

    for name in ("convert", "heal"):
        monkeypatch.setattr(api, name, lambda *arguments, **options: (arguments, options))
        assert getattr(mhconvert, name)("recipe", force=True) == (("recipe",), {"force": True})
    from mhconvert.errors import MhconvertError

    assert mhconvert.MhconvertError is MhconvertError


def test_the_public_names_exist() -> None:
    for name in mhconvert.__all__:
        assert getattr(mhconvert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = mhconvert.absent


def test_what_editors_see_is_what_there_is() -> None:
    """The names for type checkers are the names at run time, and every public function is typed."""
    tree = ast.parse((ROOT / "mhconvert" / "__init__.py").read_text(encoding="utf-8"))
    typed = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    names = {a.asname for n in typed.body if isinstance(n, ast.ImportFrom) for a in n.names}
    names |= {n.id for n in ast.walk(typed) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert names | {"__version__"} == set(mhconvert.__all__)
    functions = [getattr(mhconvert, name) for name in names]
    for function in filter(inspect.isfunction, functions):
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function.__name__
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{function.__name__}: {parameter}"
    assert mhconvert.convert_model in functions
