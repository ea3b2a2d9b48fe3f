"""A plain installation, without the extras: what works in it, and what the commands say that need more."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
import venv
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mhconvert.extras import EXTRAS
from tests.donors import make_donor

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EVAL = "pip install 'mhconvert[eval]'"
NO_TASKS = f"a suite or a task needs lm-eval: {EVAL}; texts and retrieval do without"
NO_DATASETS = f"'org/texts' is no file, and a dataset needs datasets: {EVAL}; text files do without"
NO_PYARROW = f"needs pyarrow: {EVAL}; text and JSON lines do without"
NEED_EVAL = {"mhconvert.eval.tasks.progress_model", "mhconvert.eval.tasks.vllm_model"}
IMPORT_ALL = """
import importlib, pkgutil
from typer.main import get_command
from typer.testing import CliRunner
import mhconvert
from mhconvert.cli.main import app
for module in pkgutil.walk_packages(mhconvert.__path__, "mhconvert."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name.partition(".")[0])
for name in get_command(app).commands:
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
"""
# Runs command lines, one a line, each as far as it goes, and prints code, stdout and stderr of each.
RUN_ALL = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from mhconvert.cli.main import main
for line in sys.argv.pop().splitlines():
    sys.argv, out, err = ["mhconvert", *line.split()], io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as exit_:
        print(json.dumps([exit_.code or 0, out.getvalue(), err.getvalue()]))
"""

Plain = Callable[..., subprocess.CompletedProcess[str]]


def brought_by(requirements: list[str]) -> dict[str, Distribution]:
    """The distributions that pip installs for `requirements`, by name."""
    found, wanted, seen = {}, [Requirement(each) for each in requirements], set()
    while wanted:
        asked = wanted.pop()
        brought = found.setdefault(asked.name, distribution(asked.name))
        for extra in {"", *asked.extras} - {extra for name, extra in seen if name == asked.name}:
            seen.add((asked.name, extra))
            needed = map(Requirement, brought.requires or [])
            wanted += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Runs Python in an environment with links to what a plain installation has, and nothing else."""
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for each in brought_by(PROJECT["dependencies"]).values():
        for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(each.locate_file(name))))
    (packages / "mhconvert.pth").write_text(str(ROOT), encoding="utf-8")

    def run(*words: str, cwd: Path = folder) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [folder / "bin/python", *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=cwd,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            timeout=300,
            check=False,
        )

    return run


def run_all(plain: Plain, folder: Path, lines: Iterable[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command line, run in `folder`."""
    done = plain("-c", RUN_ALL, "\n".join(lines), cwd=folder)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"{n} boats came home past the town; {n * n} were counted.\n" for n in range(400))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_the_extras_of_pyproject() -> None:
    names = {Requirement(each).name for each in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    assert {Requirement(each).name for each in extras["eval"]} == {"lm-eval", "datasets"}
    assert not names & {"lm-eval", "datasets", "matplotlib", "tensorboard"}
    assert "mhconvert[eval,plot,tensorboard]" in extras["dev"]


def test_each_library_comes_with_its_extra() -> None:
    for library, extra in EXTRAS.items():
        names = brought_by(PROJECT["optional-dependencies"][extra])
        assert library.replace("_", "-") in names
        assert not {library, library.replace("_", "-")} & set(brought_by(PROJECT["dependencies"]))


def test_every_module_but_those_for_tasks_is_imported(plain: Plain) -> None:
    done = plain("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    missing = dict(line.split() for line in done.stdout.splitlines())
    assert {module for module, library in missing.items() if library in EXTRAS} == NEED_EVAL


def test_what_a_first_run_does(plain: Plain, text: Path, tmp_path: Path) -> None:
    """Each command whose work needs no extra, on a tiny donor; the reloads are in the same environment."""
    make_donor(tmp_path / "tiny")
    rows = "--sequence-length 64 --device cpu"
    quick = f"--kv-bits 16 --effort quick --calibration {text} --calibration-tokens 1024 {rows}"
    lines = [
        "inspect tiny",
        f"tiny --to mla {quick} -o small",
        f"curve tiny --to mla {quick} --budgets 0.5 -o curve.json",
        "generate small River --max-new-tokens 4 --device cpu",
        f"eval small --text {text} --sequences 2 {rows} --retrieval --report report.html",
        "bench small --contexts 16 --new-tokens 4 --batch 1 --device cpu",
        f"heal small --tokens 1024 --data {text} --sequence-length 64 -o healed",
        "verify small",
        "tiny --to hydra -o adapter",
        "merge adapter -o merged",
        "export adapter --to lora -o lora",
    ]
    for line, (code, _out, said) in zip(lines, run_all(plain, tmp_path, lines), strict=True):
        assert code == 0, (line, said)
    versions = json.loads((tmp_path / "small/report.json").read_text(encoding="utf-8"))["versions"]
    assert "lm_eval" not in versions


def test_what_needs_an_extra_says_so_before_anything_else(plain: Plain, text: Path, tmp_path: Path) -> None:
    make_donor(tmp_path / "tiny")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    recipe = f"model: tiny\nmethod: mla\noutput: out\ncalibration: {{sources: [{text}]}}\n"
    (tmp_path / "tasks.yaml").write_text(f"{recipe}eval: {{suite: quick}}", encoding="utf-8")
    (tmp_path / "heal.yaml").write_text(
        f"{recipe}heal: {{tokens: 1k, data: {{org/texts: 1}}}}", encoding="utf-8"
    )
    said = {
        "eval absent --suite quick": NO_TASKS,
        "eval absent --tasks piqa --backend vllm": NO_TASKS,
        "eval absent --text a.zst": f"text file a.zst {NO_PYARROW}",
        "tiny --to mla -o out --calibration org/texts": NO_DATASETS,
        "tiny --to mla --dry-run --calibration org/texts": NO_DATASETS,
        "tiny --to mla -o out --calibration a.parquet": f"text file a.parquet {NO_PYARROW}",
        "run tasks.yaml": NO_TASKS,
        "run heal.yaml": NO_DATASETS,
        "curve tiny --to mla -o a.svg": "a.svg needs matplotlib: pip install 'mhconvert[plot]'",
    }
    for (line, wanted), (code, shown, told) in zip(said.items(), run_all(plain, tmp_path, said), strict=True):
        assert (code, shown) == (1, ""), (line, told)
        assert f"mhconvert: {wanted}" in told.splitlines()[-1], line
    assert not list(tmp_path.glob("out*"))


def test_the_exit_code_and_one_line(plain: Plain) -> None:
    done = plain("-m", "mhconvert", "eval", "absent", "--suite", "quick")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"mhconvert: {NO_TASKS}\n")
