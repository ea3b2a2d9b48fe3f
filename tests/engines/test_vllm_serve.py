"""`mhconvert serve --engine vllm` as a user runs it: it exports, answers over HTTP, and leaves nothing behind."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.engines.exported_forms import NEW_TOKENS, Forms, in_transformers, prompts
from tests.engines.server import free_port, gone, post, processes_of, running
from tests.engines.vllm_run import PYTHON, needs_vllm

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def forms(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(cli, tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_checkpoint_is_served_and_stopped(
    cli: Cli, forms: Forms, tmp_path: Path, by: signal.Signals
) -> None:
    port = free_port()
    checkpoint, served = forms.portable(128, (512 + 64) / (2 * 8 * 128)), tmp_path / "served"
    words = ["serve", checkpoint, "--engine", "vllm", "--python", PYTHON, "--port", port]
    words += ["--dtype", "float32", "-o", served]
    with running(words, tmp_path / "said.txt", port) as server:
        _, texts = in_transformers(served, prompts())
        for row, tokens in zip(prompts(), texts, strict=True):
            asked = {"model": str(served), "prompt": row, "max_tokens": NEW_TOKENS, "temperature": 0}
            (made,) = post(port, "/v1/completions", asked | {"ignore_eos": True, "return_token_ids": True})[
                "choices"
            ]
            assert made["token_ids"] == tokens
        taken = cli(*words)
        assert (taken.returncode, taken.stdout) == (1, "")
        assert (
            f"127.0.0.1:{port} cannot be served: Address already in use; choose another --port"
            in taken.stderr
        )
        assert processes_of(server.pid)
        server.send_signal(by)
        server.wait(timeout=60)
        assert gone(server.pid)
    assert "Traceback" not in (tmp_path / "said.txt").read_text(encoding="utf-8")
    with socket.socket() as again:  # the port is free
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
