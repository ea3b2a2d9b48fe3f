"""Streams that are closed, or that cannot show every character; SIGTERM ends as Ctrl-C does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mhconvert.cli.process_faults import Terminated, sigterm_raises
from tests.conftest import Cli
from tests.donors import make_donor


def test_a_stream_of_ascii_gets_whole_json_and_readable_words(cli: Cli, tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "modèle-小")
    told = cli("inspect", folder, "--json", PYTHONIOENCODING="ascii")
    assert told.stdout.isascii()
    assert json.loads(told.stdout)["reference"] == str(folder)
    shown = cli("inspect", folder, PYTHONIOENCODING="ascii")
    assert (shown.returncode, "Traceback" in shown.stderr) == (0, False)
    assert "mod?le-?" in shown.stdout


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_closed_streams_do_not_matter(closed: tuple[int, ...]) -> None:
    words = [sys.executable, "-m", "mhconvert.cli.main", "donors"]
    done = subprocess.run(words, preexec_fn=lambda: [os.close(fd) for fd in closed], check=False)
    assert done.returncode == 0


def test_sigterm_is_raised_once_and_handled_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "words", [("generate", "x", "\udce9"), ("\udce9", "--to", "mla"), ("push", "x", "a/\udce9")]
)
def test_an_argument_that_is_no_utf8_is_wrong_usage(here: Cli, words: tuple[str, ...]) -> None:
    done = here(*words)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "\\udce9' is not UTF-8 text: character " in done.stderr
