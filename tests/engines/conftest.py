"""The table that engine tests fill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.engines_table import EnginesTable


@pytest.fixture(scope="session")
def engines() -> Iterator[EnginesTable]:
    """Collects rows, and writes them into the file that MHCONVERT_ENGINES names, if it names one."""
    table = EnginesTable()
    yield table
    if path := os.environ.get("MHCONVERT_ENGINES"):
        table.write(Path(path))
