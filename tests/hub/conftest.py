"""A Hub that can be written to, and a checkpoint to write there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tests.donors import make_checkpoint
from tests.hub.stand_in_write_hub import TOKEN, WriteHub, write_hub


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint; only to be read."""
    return make_checkpoint(tmp_path_factory.mktemp("push") / "tiny-mla")


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A converted checkpoint that a test may change."""
    return Path(shutil.copytree(converted, tmp_path / "tiny-mla"))


@pytest.fixture
def slept() -> list[float]:
    """Seconds that were waited, without waiting."""
    return []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slept: list[float]) -> Iterator[WriteHub]:
    """An empty Hub that takes TOKEN, and huggingface_hub set to it; its own waits are in `slept` too."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=slept.append))
    with write_hub() as running:
        # huggingface_hub reads HF_ENDPOINT once, when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
