"""A running llama-server: scores, continuations, and the cache that it says it has made."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

START_SECONDS = 300
CACHE = re.compile(
    r"llama_kv_cache\S*: size = .*?\(\s*(\d+) cells.*K \((\w+)\):\s*([\d.]+) MiB, V \((\w+)\):\s*([\d.]+) MiB"
)


class LlamaServerError(Exception):
    """The server ended or did not answer; with the end of its log."""


@dataclass(frozen=True)
class Cache:
    """What the server's log says of its cache; bytes for each token."""

    kinds: tuple[str, str]
    keys: float
    values: float

    @property
    def bytes(self) -> float:
        return self.keys + self.values


class LlamaServer:
    """`program` serving `file` while in a `with`; `options` go to its command line."""

    def __init__(self, program: str, file: Path, *options: object):
        self._port = free_port()
        self._log = file.with_suffix(".log")
        self._command = [program, "--model", str(file), "--host", "127.0.0.1", "--port", str(self._port)]
        self._command += ["-np", "1", "-t", "1", "-lv", "4", *map(str, options)]

    def __enter__(self) -> LlamaServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            wait_for(self._port, self._process, self._log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return request(self._port, path, body)

    def get(self, path: str) -> Any:
        return request(self._port, path)

    def score(self, row: list[int], vocab: int) -> list[float]:
        """Log-probabilities of the row's tokens from the second on; each token is decoded after those before it."""
        return [self._next(row[:n], vocab, True)[row[n]] for n in range(1, len(row))]

    def last(self, row: list[int], vocab: int) -> float:
        """Log-probability of the last token after one pass over those before it."""
        return self._next(row[:-1], vocab, False)[row[-1]]

    def _next(self, row: list[int], vocab: int, cached: bool) -> dict[int, float]:
        # A letter is made the next token, which leaves the log-probabilities: none are told after half a character.
        asked = {"prompt": row, "n_predict": 1, "n_probs": vocab, "logit_bias": [[self._letter, 1000]]}
        (found,) = self.post("/completion", asked | {"cache_prompt": cached})["completion_probabilities"]
        return {each["id"]: each["logprob"] for each in found["top_logprobs"]}

    @cached_property
    def _letter(self) -> int:
        first: int = self.post("/tokenize", {"content": "a"})["tokens"][-1]
        return first

    def greedy(self, row: list[int], new: int) -> list[int]:
        asked = {"prompt": row, "n_predict": new, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        tokens: list[int] = self.post("/completion", asked | {"cache_prompt": False})["tokens"]
        return tokens

    @property
    def cache(self) -> Cache:
        """Of all layers, from the last line of the log about it."""
        found = CACHE.findall(self._log.read_text(encoding="utf-8", errors="replace"))
        if not found:
            raise LlamaServerError(f"{self._log} does not say how large the cache is")
        cells, of_keys, keys, of_values, values = found[-1]
        size = 2**20 / int(cells)
        return Cache((of_keys, of_values), float(keys) * size, float(values) * size)


def about(program: str) -> dict[str, Any]:
    """Name, version and device of `program`. Raises LlamaServerError where it cannot be run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise LlamaServerError(f"{program} is no llama-server that runs: {error}") from None
    built = re.search(r"version: (\d+)", done.stderr + done.stdout)
    return {"name": "llama.cpp", "version": f"b{built[1]}" if built else "of unknown build", "device": "cpu"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def request(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that the server answers; with a `body` that is posted."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=600) as answer:
        return json.load(answer)


def wait_for(port: int, process: subprocess.Popen[Any], log: Path) -> None:
    """Return when the server has loaded its model."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            request(port, "/health")
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
        else:
            return
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise LlamaServerError(f"llama-server did not start (exit code {process.poll()}):\n{tail}")
