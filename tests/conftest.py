"""What all tests share: no network, few threads, and the measuring data where there is some."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"TQDM_DISABLE": "1", "MHCONVERT_EVAL_CACHE": tempfile.mkdtemp(prefix="mhconvert-eval-")}
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on a CPU; read when triton is imported

import pytest
import torch

atexit.register(shutil.rmtree, os.environ["MHCONVERT_EVAL_CACHE"], ignore_errors=True)

Cli = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[..., int]
Interrupted = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real texts and checkpoints that MHCONVERT_DATA names."""
    folder = os.environ.get("MHCONVERT_DATA")
    if not folder:
        pytest.skip("MHCONVERT_DATA names no folder with real data")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def warm_reloads() -> Iterator[None]:
    """Reloads in a bare process are forks of one that has transformers already; where forks are safe, on Linux."""
    from mhconvert.convert.bare_process import reload
    from tests.bare_server import WarmSubprocess

    warm = WarmSubprocess()
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr(reload, "subprocess", warm)
        yield
    warm.close()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Runs `mhconvert WORD ...` in a process of its own; stdout and stderr apart."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mhconvert.cli.main", *map(str, words)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=os.environ | {"COLUMNS": "120"} | environment,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def interrupted() -> Interrupted:
    """Runs `mhconvert WORD ...` and sends Ctrl-C, or another signal, at the first progress line that begins with
    `line`; its exit code and what it said on stderr afterwards."""

    def run(line: str, *words: object, by: int = signal.SIGINT) -> tuple[int, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mhconvert.cli.main", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            # A test run in the background of a script ignores Ctrl-C, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stderr is not None
        for said in process.stderr:
            if said.startswith(line):
                process.send_signal(by)
                break
        _, rest = process.communicate(timeout=120)
        return process.returncode, rest

    return run


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """Runs `mhconvert WORD ...` in this process and returns its exit code; capsys has what it printed."""

    def run(*words: object) -> int:
        from mhconvert.cli.main import main as entry

        monkeypatch.setattr(sys, "argv", ["mhconvert", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            entry()
        return int(exit_.value.code or 0)

    return run


@pytest.fixture
def here(main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """What `cli` does, in this process."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        for name, value in ({"COLUMNS": "120"} | environment).items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = main(*words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(["mhconvert", *map(str, words)], code, said.out, said.err)

    return run
