"""A model in vLLM, in a process of its own: that of this environment or of another, which has other libraries."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from mhconvert.errors import MhconvertError

from ...convert.checkpoint import identity
from ...convert.open_model import OpenModel
from . import child as vllm_child

logger = logging.getLogger(__name__)

RUN = "0.32.0"  # the version that these requests were tried with


class EngineError(MhconvertError):
    """vLLM is missing, does not load a model, or fails in a request."""


class Engine:
    """vLLM with one model, until `close`; a context manager.

    Attributes:
        model: its folder.
        about: version, device, and cache_bytes_per_token as vLLM plans it.
    """

    def __init__(self, model: Path | str, *, python: str | None = None, **arguments: Any):
        """
        Args:
            model: a folder that vLLM loads.
            python: the interpreter of an environment with vLLM; None: this one.
            arguments: of vllm.LLM, such as dtype, max_model_len, kv_cache_dtype and trust_remote_code.
        Raises:
            EngineError: vLLM is not there, or refuses the model.
        """
        self.model = str(model)
        self._said = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [_interpreter(python), "-I", vllm_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
        )
        try:
            self.about = self._ask({"model": self.model} | arguments)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process. Does nothing the second time."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def score(self, rows: Sequence[list[int]], adapter: Path | None = None) -> list[dict[str, Any]]:
        """Of each row of token ids, from its second token on: logprobs, and best (no other token is more likely)."""
        return self._rows(rows, {"max_tokens": 1, "temperature": 0}, True, adapter)

    def generate(
        self,
        rows: Sequence[list[int]],
        sampling: dict[str, Any] | list[dict[str, Any]],
        adapter: Path | None = None,
    ) -> list[dict[str, Any]]:
        """tokens and text that continue each row; `sampling`: arguments of vllm.SamplingParams, or one for each row."""
        return self._rows(rows, sampling, False, adapter)

    def timed(self, rows: Sequence[list[int]], new_tokens: int, spare: int) -> dict[str, Any]:
        """prefill: seconds until each row has its first new token; steps: seconds of each of `new_tokens` after it.

        A row has room for `spare` tokens more, as the first ones go on while others are read."""
        request = {"rows": list(rows), "new_tokens": new_tokens, "spare": spare}
        found: dict[str, Any] = self._ask(request)["timed"]
        return found

    def _rows(self, rows: Sequence[list[int]], sampling: Any, scored: bool, adapter: Path | None) -> Any:
        request = {"rows": list(rows), "sampling": sampling, "scored": scored}
        return self._ask(request | {"adapter": str(adapter) if adapter else None})["rows"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a line. Raises EngineError where there is none, or it is an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is in its last answer
        line = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in said:
            self._log()
            raise EngineError(f"vllm does not take {self.model}: {_in_one_line(said['error'])}")
        return said

    def _last_words(self) -> str:
        status = self._process.wait()
        return f"its process ended with status {status}; --debug shows what it said"

    def _log(self) -> None:
        self._said.seek(0)
        logger.debug("vllm said:\n%s", self._said.read())


def _interpreter(python: str | None) -> str:
    return str(Path(python).expanduser()) if python else sys.executable


@cache
def installed(python: str | None) -> dict[str, str]:
    """Versions of vllm, torch and transformers of the interpreter `python` (None: this one).

    Raises EngineError where it has no vLLM."""
    name = _interpreter(python)
    try:
        done = subprocess.run(
            [name, "-I", vllm_child.__file__, "--version"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        raise EngineError(f"--python {name} cannot be run: {error.strerror}") from None
    if done.returncode:
        where = "here" if python is None else f"for {python}"
        raise EngineError(
            f"--backend vllm needs vllm, which is not installed {where}; name the Python of an environment that has it "
            f"by --python, or use --backend hf (vllm {RUN} was tried)"
        )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def loadable(opened: OpenModel) -> Path:
    """The folder of a model that vLLM may load. Raises EngineError for a GGUF, an adapter, and our own classes."""
    if opened.adapter is not None:
        raise EngineError(
            f"{opened.reference} is an adapter; merge it for vllm: mhconvert merge {opened.reference}"
        )
    folder = opened.folder if opened.donor is None else opened.donor.model_files()
    if not folder.is_dir():
        raise EngineError(f"{opened.reference} is no folder of safetensors, which vllm would load")
    method = identity.converted_method(str(folder))
    if method is None or identity.exported(str(folder)):
        return folder
    remedy = (
        "no export makes it a form that vllm has; use --backend hf"
        if method == "moh"
        else f"evaluate an export of it: mhconvert export {opened.reference} --to auto"
    )
    raise EngineError(
        f"{opened.reference} has mhconvert's own class of {method}, which vllm does not load; {remedy}"
    )


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:500]
