"""Sizes as people write them."""

from __future__ import annotations

import pytest

from mhconvert.convert.storage.byte_size import byte_size
from mhconvert.errors import OutputError


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), ("2GiB", 2**31), ("100", 100), ("7b", 7)],
)
def test_byte_size(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1GB", "5TB", "GB", "5 G B", "1e9", "5I", "0.5B", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OutputError, match=f"max_shard_size '{text}' is not a size such as 5GB or 500MB"):
        byte_size(text)
