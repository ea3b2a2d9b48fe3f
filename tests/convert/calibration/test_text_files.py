"""Text as people have it: every format and its compressions give the same documents, the rest is refused by name."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mhconvert.convert.calibration.documents import read, read_file
from mhconvert.errors import TextError

GZIP = partial(gzip.compress, mtime=0)  # without the time: parameters are tests' names
TEXTS = ["first\nof two lines", "zweiter Text: 岩廊", ""]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.txt", LINES),
        ("no suffix", b"\n" + LINES + b"\n\n"),
        ("bom.jsonl", codecs.BOM_UTF8 + LINES),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("utf16.jsonl", LINES.decode().encode("utf-16")),
        ("list.json", json.dumps(RECORDS, indent=2).encode()),
        ("list.jsonl", json.dumps(RECORDS).encode()),
        ("list.txt", json.dumps(RECORDS).encode()),
        ("strings.json", json.dumps(TEXTS).encode()),
        ("a.jsonl.gz", GZIP(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
    ],
)
def test_the_same_documents_in_every_format(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(str(tmp_path / name)) == [TEXTS]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("one\n\ntwo", "one\n\ntwo"),
        ("\ufeffone\r\ntwo", "one\ntwo"),
        ("[INST] hello [/INST]", "[INST] hello [/INST]"),
        ("[1, 2]", "[1, 2]"),
        ('{\n "a": 1\n}', '{\n "a": 1\n}'),
        ("", ""),
    ],
)
@pytest.mark.parametrize("pack", [bytes, GZIP], ids=["plain", "gzip"])
def test_plain_text_stays_as_it_is(
    tmp_path: Path, content: str, text: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.txt").write_bytes(pack(content.encode()))
    assert read_file(tmp_path / "a.txt") == [text]


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "part.PARQUET"
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), file)
    assert read_file(file) == TEXTS
    parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
    with pytest.raises(
        TextError, match=r"part\.PARQUET, row 2: no text in a 'text' or 'messages' field; 'text' is null"
    ):
        read_file(file)
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho", "name": "x"}]]
    parquet.write_table(
        pyarrow.table({"messages": messages}), file
    )  # Arrow gives the first message a name, null
    assert read_file(file, chat=json.dumps) == [json.dumps(turns) for turns in messages]
    parquet.write_table(pyarrow.table({"body": ["a"]}), file)
    with pytest.raises(TextError, match="row 1: no text in a 'text' or 'messages' field; it has 'body'"):
        read_file(file)


def test_damaged_parquet(tmp_path: Path) -> None:
    """The pages, while the footer is whole."""
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    with pytest.raises(TextError, match=r"text file .*a\.parquet cannot be read: "):
        read_file(file)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TextError, match=r"a\.parquet cannot be read without pyarrow: pip install pyarrow"):
        read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04...", "cannot be read: it is a zip archive; give text, JSON lines or Parquet"),
        (b"%PDF-1.7", "cannot be read: it is a PDF"),
        (b"PAR1 and no more", "cannot be read: .*Parquet"),
        (b"text\0text", "cannot be read: it is not text: it has zero bytes"),
        ("café".encode("latin-1"), "cannot be read: it is not UTF-8 text"),
        (GZIP(LINES)[:-20], "cannot be read: Compressed file ended"),
        (b"\x28\xb5\x2f\xfd...", "cannot be read: it is compressed by zstd"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(TextError, match=reason):
        read_file(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("not json", "line 2: not a JSON object with a 'text' or 'messages' field"),
        ('["text"]', "line 2: not a JSON object"),
        ('"text"', "line 2: not a JSON object"),
        ("7", "line 2: not a JSON object"),
        ('{"text": null}', "line 2: no text in a 'text' or 'messages' field; 'text' is null"),
        (
            '{"instruction": "a", "output": "b"}',
            "line 2: no text in a 'text' or 'messages' field; it has 'instruction', 'output'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 2: it has 'messages', and there is no chat template",
        ),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, record: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + record, encoding="utf-8")
    with pytest.raises(TextError, match=rf"text file .*a\.jsonl, {reason}"):
        read_file(tmp_path / "a.jsonl")


def refusing(messages: list[dict[str, Any]]) -> str:
    """A chat template: one system message at most, printed as Python prints it."""
    if [message["role"] for message in messages[1:]].count("system"):
        raise RuntimeError("only the first\nmessage may be of the system")
    return "|".join(f"{message['role']}: {message['content']}" for message in messages)


CHATS: list[tuple[Any, str]] = [
    ([{"role": "user", "content": "a"}], "user: a"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "user: a\nb",
    ),
    ([{"role": "user", "content": "a", "name": None}], "user: a"),
    ("a", "its 'messages' is not a list of messages"),
    ([{"role": "user", "content": None}], "message 1 has no content"),
    (
        [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image"}]}],
        r"message 2 has a part that is not text \(image\)",
    ),
    (
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        "the chat template refuses it: only the first message may be of the system",
    ),
]


@pytest.mark.parametrize(("messages", "expected"), CHATS)
def test_conversations(tmp_path: Path, messages: Any, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    if expected.startswith("user"):
        assert read_file(tmp_path / "a.jsonl", chat=refusing) == [expected]
        return
    with pytest.raises(TextError, match=rf"a\.jsonl, line 1: {expected}"):
        read_file(tmp_path / "a.jsonl", chat=refusing)


def test_bad_records_are_skipped_and_told(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": messages}) for messages, _ in CHATS] + ["{", '{"text": "end"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    told: list[str] = []
    assert read(str(tmp_path / "a.jsonl"), chat=refusing, on_bad=told.append) == [
        ["user: a", "user: a\nb", "user: a", "end"]
    ]
    assert [reason.partition("a.jsonl, ")[2].partition(":")[0] for reason in told] == [
        f"line {number}" for number in (4, 5, 6, 7, 8)
    ]
