"""Reads a text file into records, in a format known by its content: text, JSON, JSON lines or Parquet, also packed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mhconvert import extras
from mhconvert.errors import TextError

from ..storage.regular_file import require_regular
from .conversations import FIELDS, is_record

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
TEXT_SUFFIXES = (".txt", ".raw", ".md", ".parquet", *JSON_SUFFIXES, *PACKED_SUFFIXES)
PARQUET = b"PAR1"  # at both ends
ZSTD = rb"\x28\xb5\x2f\xfd"


def _unzstd(content: bytes) -> bytes:
    import pyarrow

    unpacked: bytes = pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd").read()
    return unpacked


# What a file begins with; as much of it as no text has.
UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    rb"\x1f\x8b\x08": gzip.decompress,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.decompress,  # of a block, or of the end where there is none
    rb"\xfd7zXZ\x00": lzma.decompress,
    ZSTD: _unzstd,
}
REFUSED = {
    rb"PK\x03\x04": "a zip archive",
    rb"%PDF-\d": "a PDF",
    rb"ARROW1\x00\x00": "an Arrow file",
}
DAMAGED = (EOFError, ValueError, zlib.error, lzma.LZMAError)


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record in the file.

    A record is a document of its own if it is a string, otherwise what JSON or Parquet has there, None for a line that
    is not JSON. A place is "line 3", "item 3" of a list or "row 3" of a table, and "" for a file of plain text.

    Raises:
        TextError: the file cannot be read, or is of a format that is not understood.
    """
    require_regular(path, TextError)
    try:
        content = path.read_bytes()
        _require_library(path, content)
        if _is_parquet(path, content):
            yield from _rows(path)
            return
        content = _unpacked(content)
        _require_text(content)
        yield from _text_records(path, _decoded(content))
    except OSError as error:
        raise _unreadable(path, error) from error
    except DAMAGED as error:
        raise TextError(f"text file {path} cannot be read: {' '.join(str(error).split())}") from error


def require_reader(path: Path) -> None:
    """Raises TextError where it cannot be read, or begins as a file that pyarrow reads, and that is not installed."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(PARQUET))
    except OSError as error:
        raise _unreadable(path, error) from error
    _require_library(path, begin)


def _unreadable(path: Path, error: OSError) -> TextError:
    return TextError(f"text file {path} cannot be read: {error.strerror or error}")


def _require_library(path: Path, content: bytes) -> None:
    """Raises TextError for content, or its beginning, that pyarrow reads, where that is not installed."""
    if content.startswith(PARQUET) or re.match(ZSTD, content):
        extras.require("pyarrow", f"text file {path}", "text and JSON lines do without", TextError)


def _is_parquet(path: Path, content: bytes) -> bool:
    """Whether it is Parquet by its content; of a file that calls itself so, the beginning is enough."""
    whole = content.endswith(PARQUET) or path.suffix.lower() == ".parquet"
    return content.startswith(PARQUET) and whole


def _unpacked(content: bytes) -> bytes:
    """The content, unpacked if it is compressed."""
    unpack = next((unpack for magic, unpack in UNPACK.items() if re.match(magic, content)), bytes)
    return unpack(content)


def _require_text(content: bytes) -> None:
    """Raises ValueError for a known format that is not text."""
    for magic, name in REFUSED.items():
        if re.match(magic, content):
            raise ValueError(f"it is {name}; give text, JSON lines or Parquet, plain or as .gz")


def _decoded(content: bytes) -> str:
    """The text with line breaks "\\n" and without a byte order mark; raises ValueError if it is not UTF-8 or UTF-16."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    if "\0" in text:
        raise ValueError("it is not text: it has zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The records of JSON or JSON lines; the whole text as one where its name does not say JSON and not all of its
    values are records."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED_SUFFIXES]
    stated = bool(suffixes) and suffixes[-1] in JSON_SUFFIXES
    whole = _json(text)
    if isinstance(whole, list) and (stated or _are_records(whole)):
        return ((f"item {number}", item) for number, item in enumerate(whole, start=1))
    if isinstance(whole, dict) and stated:
        return iter([("line 1", whole)])
    lines = enumerate(text.split("\n"), start=1)  # splitlines() would also split at other characters
    numbered = [(number, _object(line)) for number, line in lines if line.strip()]
    if not stated and not _are_records([value for _, value in numbered]):
        return iter([("", text)])
    return ((f"line {number}", value) for number, value in numbered)


def _are_records(values: list[Any]) -> bool:
    return bool(values) and all(map(is_record, values))


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none."""
    value = _json(line)
    return value if isinstance(value, dict) else None


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, of which only the columns of documents are read."""
    from pyarrow import parquet

    table = parquet.ParquetFile(path)
    columns = [name for name in FIELDS if name in table.schema_arrow.names]
    rows = (row for batch in table.iter_batches(columns=columns or None) for row in batch.to_pylist())
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def told_apart(paths: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """A name for each of different `paths`: of the file alone, or the path where that name is another's or `taken`."""
    names = [*taken, *(Path(path).name for path in paths)]
    return [
        name if names.count(name) == 1 else f"./{path}" if path in taken else path
        for name, path in zip(names[len(taken) :], paths, strict=True)
    ]
