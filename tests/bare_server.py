"""Bare processes without the seconds that their imports take: one process has torch and transformers, and forks.

A fork runs `child.py` as `python -I` would: mhconvert was never imported, and no module of a checkpoint or of a model's
family was. `tests/convert/bare_process` starts whole interpreters too, and so do commands in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mhconvert.convert.bare_process import child

SERVER = """
import json, os, runpy, sys, traceback
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel, dynamic_module_utils

for line in sys.stdin:
    words, said, folder, environment = json.loads(line)
    fork = os.fork()
    if fork == 0:
        status = 1
        try:
            for descriptor, file in enumerate((os.devnull, said + "/stdout", said + "/stderr")):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = words
            dynamic_module_utils.HF_MODULES_CACHE = words[-1]  # read from the environment by the import above
            runpy.run_path(words[0], run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
"""


class WarmSubprocess:
    """Stands in for the module `subprocess` in `reload.py`: what runs `child.py` is forked, all else is as it was."""

    CompletedProcess, DEVNULL = subprocess.CompletedProcess, subprocess.DEVNULL

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[:3] != [sys.executable, "-I", child.__file__]:
            return subprocess.run(command, **options)
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-I", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory(prefix="mhconvert-bare-") as said:
            self._server.stdin.write(json.dumps([command[2:], said, os.getcwd(), dict(os.environ)]) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            printed = [(Path(said) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(command, status, *printed)

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()
