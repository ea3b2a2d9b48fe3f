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
ZSTD = partial(pyarrow.compress, codec="zstd", asbytes=True)
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
        ("a.jsonl.zst", ZSTD(LINES)),
        ("frames.jsonl.zst", ZSTD(LINES[:30]) + ZSTD(LINES[30:])),
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
        ("[]", "[]"),
        ('{"text": "a"}\nand no JSON', '{"text": "a"}\nand no JSON'),
        ('{"text": "a"}\n{"level": "info"}', '{"text": "a"}\n{"level": "info"}'),
        ('[{"text": "a"}, {"level": "info"}]', '[{"text": "a"}, {"level": "info"}]'),
        ("PAR1 is what Parquet begins with", "PAR1 is what Parquet begins with"),
        ("BZh and BZh9 are what bzip2 begins with", "BZh and BZh9 are what bzip2 begins with"),
        ("ARROW1 is a sign", "ARROW1 is a sign"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, GZIP, ZSTD], ids=["plain", "gzip", "zstd"])
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
    with pytest.raises(TextError, match=r"part\.PARQUET, row 2: no text in 'text', .*; 'text' is null"):
        read_file(file)
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho", "name": "x"}]]
    parquet.write_table(
        pyarrow.table({"messages": messages}), file
    )  # Arrow gives the first message a name, null
    assert read_file(file, chat=json.dumps) == [json.dumps(turns) for turns in messages]
    turns = [
        [{"from": "human", "value": "hi", "weight": None}],
        [{"from": "gpt", "value": "ho", "weight": 1}],
    ]
    parquet.write_table(pyarrow.table({"conversations": turns, "source": ["a", "b"]}), file)
    assert read_file(file, chat=refusing) == ["user: hi", "assistant: ho"]
    parquet.write_table(pyarrow.table({"body": ["a"]}), file)
    with pytest.raises(TextError, match="row 1: no text in 'text', 'messages', .*; it has 'body'"):
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
    with pytest.raises(TextError, match=r"a\.parquet needs pyarrow: pip install 'mhconvert\[eval\]'"):
        read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04...", "cannot be read: it is a zip archive; give text, JSON lines or Parquet"),
        (b"%PDF-1.7", "cannot be read: it is a PDF"),
        (b"PAR1 and no footer PAR1", "cannot be read: .*Parquet"),
        (bz2.compress(b"")[:-4], "cannot be read: Compressed data ended"),
        (b"text\0text", "cannot be read: it is not text: it has zero bytes"),
        ("café".encode("latin-1"), "cannot be read: it is not UTF-8 text"),
        (GZIP(LINES)[:-20], "cannot be read: Compressed file ended"),
        (ZSTD(LINES)[:-20], "cannot be read: Truncated compressed stream"),
        (b"\x28\xb5\x2f\xfd...", "cannot be read: "),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(TextError, match=reason):
        read_file(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("not json", "line 2: not a JSON object with a text or a conversation"),
        ('["text"]', "line 2: not a JSON object"),
        ('"text"', "line 2: not a JSON object"),
        ("7", "line 2: not a JSON object"),
        ('{"text": null}', "line 2: no text in 'text', .*; 'text' is null"),
        (
            '{"question": "a", "answer": "b"}',
            "line 2: no text in 'text', 'messages', 'conversations', or 'instruction' and 'output'; it has 'question'",
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


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "add", "input": "1 2", "output": "3"}, "user: add\n\n1 2|assistant: 3"),
    ({"instruction": "add", "input": "", "output": "3"}, "user: add|assistant: 3"),
    ({"instruction": "add", "output": "3", "system": "sum"}, "system: sum|user: add|assistant: 3"),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "GPT", "value": "b"},
            ]
        },
        "system: s|user: a|assistant: b",
    ),
    ({"conversations": [{"from": "user", "value": "a"}], "system": "s"}, "system: s|user: a"),
    ({"conversations": [{"role": "user", "content": "a"}]}, "user: a"),
    ({"instruction": 1, "output": "3"}, "its 'instruction', 'input' and 'output' are not all text"),
    ({"instruction": "a", "output": None}, "its 'instruction', 'input' and 'output' are not all text"),
    ({"conversations": "a"}, "its 'conversations' is not a list of messages"),
    (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "message 1 is from 'narrator', not from one of human, ",
    ),
    ({"conversations": [{"value": "a"}]}, "message 1 is from None, not from one of"),
    ({"conversations": [{"from": "human", "value": None}]}, "message 1 has no content"),
]


@pytest.mark.parametrize(("record", "expected"), FORMS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_conversations_of_other_forms(tmp_path: Path, record: Any, expected: str, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(record), encoding="utf-8")
    if ": " in expected:
        assert read_file(tmp_path / name, chat=refusing) == [expected]
        with pytest.raises(
            TextError, match="line 1: it has '(conversations|instruction)', and there is no chat"
        ):
            read_file(tmp_path / name)
        return
    with pytest.raises(TextError, match=rf"{name}, line 1: {expected}"):
        read_file(tmp_path / name, chat=refusing)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"text": "good"}\n{"text": "bad \\ud800"}', "line 2"),
        ("a.jsonl", '{"text": "good"}\n{"messages": [{"role": "user", "content": "\\udc00"}]}', "line 2"),
        ("a.jsonl", '{"instruction": "a", "output": "\\udc00\\ud800"}', "line 1"),
        ("a.json", '["good", "bad \\udfff"]', "item 2"),
    ],
)
def test_half_a_character_is_refused_by_its_place(
    tmp_path: Path, name: str, content: str, place: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TextError, match=rf"{name}, {place}: its text cannot be used: character \d+ is \\ud"):
        read_file(path, chat=refusing)
    bad: list[str] = []
    read_file(path, chat=refusing, on_bad=bad.append)
    assert len(bad) == 1


def test_a_pair_of_escapes_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "whole \U0001f600"}))
    assert read_file(tmp_path / "a.jsonl") == ["whole \U0001f600"]


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
