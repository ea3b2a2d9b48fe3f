"""The table that engine tests fill."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.engines_table import EnginesTable

ENGINES = {"test_vllm.py": "vLLM", "test_llamacpp.py": "llama.cpp"}  # the one that a file's tests run
TABLE = EnginesTable()
_unselected: set[str] = set()
_outcomes: dict[str, list[str]] = defaultdict(list)


@pytest.fixture(scope="session")
def engines() -> EnginesTable:
    """Collects rows; they go into the file that MHCONVERT_ENGINES names, if it names one, when all tests have run."""
    return TABLE


def pytest_deselected(items: list[pytest.Item]) -> None:
    _unselected.update(item.path.name for item in items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    engine = ENGINES.get(item.path.name)
    if engine and (report.when == "call" or report.outcome != "passed"):
        _outcomes[engine].append(report.outcome)
        form = getattr(item, "callspec", None) and item.callspec.params.get("form")  # type: ignore[attr-defined]
        if form and report.outcome == "failed":
            TABLE.failed(engine, getattr(form, "title", form.name))
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("MHCONVERT_ENGINES")
    if not path:
        return
    asked_for_one = any("::" in word for word in session.config.args)
    for file, engine in ENGINES.items():
        items = [item for item in session.items if item.path.name == file]
        ran = [outcome for outcome in _outcomes[engine] if outcome != "skipped"]
        if items and len(ran) >= len(items) and file not in _unselected and not asked_for_one:
            TABLE.whole(engine)
    TABLE.write(Path(path))
