"""Edits of a folder's files as plain data, so that what was found can be kept as JSON and replayed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

Edit = dict[str, Any]
NUMBERS = [0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**9, 10**18, 0.5, -0.5, 1e-300, 1e308]
ODD: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "../x",
    "/",
    "\x1b[31m",
    "\ud800",
    "a" * 300,
    "évil\n---",
    [],
    {},
]
ODD += [[0], [None], ["x"], {"x": 1}, {"": []}, [[[[]]]], float("inf"), float("-inf"), float("nan")]
DEEP = 3000  # levels of a document that no reader by recursion survives


def document_edits(*files: str) -> st.SearchStrategy[Edit]:
    """Edits of one value in a JSON or YAML document, or in the header of a safetensors file."""
    return st.fixed_dictionaries(
        {
            "file": st.sampled_from(files),
            "path": st.lists(st.integers(0, 60), min_size=1, max_size=4),
            "how": st.sampled_from(["set", "set", "set", "delete", "double", "deep"]),
            "value": st.sampled_from(NUMBERS + ODD),
        }
    )


def byte_edits(*files: str, within: int = 1 << 30) -> st.SearchStrategy[Edit]:
    """Edits of bytes among the first `within` of a file."""
    return st.fixed_dictionaries(
        {
            "file": st.sampled_from(files),
            "offset": st.integers(0, within),
            "how": st.sampled_from(["replace", "replace", "insert", "remove", "cut", "ones"]),
            "bytes": st.binary(min_size=1, max_size=12).map(bytes.hex),
        }
    )


def apply(folder: Path, edits: list[Edit]) -> None:
    """Make the edits in `folder`; those that do not fit what earlier ones left are passed over."""
    for edit in edits:
        file = folder / edit["file"]
        file.write_bytes(_edited_bytes(file.read_bytes(), edit) if "bytes" in edit else _edited(file, edit))


def _edited_bytes(content: bytes, edit: Edit) -> bytes:
    new, at = bytes.fromhex(edit["bytes"]), edit["offset"] % (len(content) + 1)
    if edit["how"] == "cut":
        return content[:at]
    if edit["how"] == "ones":
        new = b"\xff" * 8
    behind = {"insert": at, "remove": at + len(new)}.get(edit["how"], at + len(new))
    return content[:at] + (b"" if edit["how"] == "remove" else new) + content[behind:]


def _edited(file: Path, edit: Edit) -> bytes:
    read, write = _FORMS[file.suffix]
    content = file.read_bytes()
    try:
        document, rest = read(content)
    except (ValueError, RecursionError):  # an earlier edit broke it
        return content
    if edit["how"] == "deep":
        return write(document, rest, "[" * DEEP + "]" * DEEP)
    _change(document, edit)
    return write(document, rest, None)


def _change(document: Any, edit: Edit) -> None:
    place, key = None, None
    inner = document
    for step in edit["path"]:
        if not isinstance(inner, dict | list) or not inner:
            break
        keys = sorted(inner, key=str) if isinstance(inner, dict) else range(len(inner))
        place, key = inner, keys[step % len(keys)]
        inner = place[key]
    if place is None:
        return
    if edit["how"] == "delete":
        del place[key]
    elif edit["how"] == "double" and isinstance(place, list):
        place.append(place[key])
    elif edit["how"] == "double":
        place[f"{key}_"] = place[key]
    else:
        place[key] = edit["value"]


def _read_json(content: bytes) -> tuple[Any, bytes]:
    return json.loads(content), b""


def _write_json(document: Any, rest: bytes, deep: str | None) -> bytes:
    text = json.dumps(document)
    return (f'{{"deep": {deep}, {text[1:]}' if deep else text).encode("utf-8", "surrogatepass")


def _read_header(content: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack_from("<Q", content) if len(content) >= 8 else (0,)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write_header(document: Any, rest: bytes, deep: str | None) -> bytes:
    header = _write_json(document, b"", deep)
    return struct.pack("<Q", len(header)) + header + rest


def _read_yaml(content: bytes) -> tuple[Any, bytes]:
    try:
        return yaml.safe_load(content), b""
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _write_yaml(document: Any, rest: bytes, deep: str | None) -> bytes:
    return f"deep: {deep}".encode() if deep else yaml.safe_dump(document, allow_unicode=False).encode()


_FORMS: dict[str, tuple[Callable[[bytes], tuple[Any, bytes]], Callable[[Any, bytes, str | None], bytes]]] = {
    ".json": (_read_json, _write_json),
    ".safetensors": (_read_header, _write_header),
    ".yaml": (_read_yaml, _write_yaml),
}
