"""Nothing grows with a number in a GGUF header: counts, lengths, offsets and sizes are within the file, or refused."""

from __future__ import annotations

import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.donor.gguf_reader import read_gguf_header
from mhconvert.errors import CheckpointError, UnsupportedError
from tests.conftest import Main
from tests.donors import make_gguf

HUGE = ((1 << 32), (1 << 63), (1 << 64) - 1)
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", quantization="Q8_0")


@pytest.fixture(scope="module")
def plain(whole: Path) -> bytes:
    return whole.read_bytes()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def value_at(content: bytes, key: str) -> int:
    """Where the value of a metadata key, or the number of axes of a tensor, begins."""
    place = content.index(string(key)) + 8 + len(key)
    return place if key.endswith((".weight", ".bias")) else place + 4


def patched(content: bytes, place: int, layout: str, value: Any) -> bytes:
    new = struct.pack("<" + layout, value)
    return content[:place] + new + content[place + len(new) :]


def tensor_field(content: bytes, name: str, field: str) -> int:
    """Where the entry of a tensor has its first axis, its type or its offset."""
    place = value_at(content, name)
    axes = struct.unpack_from("<I", content, place)[0]
    return {"axes": place, "shape": place + 4, "type": place + 4 + 8 * axes, "offset": place + 8 + 8 * axes}[
        field
    ]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("kind", ["tensors", "metadata", "string", "strings", "numbers", "lists", "axis"])
def test_a_count_beyond_the_file(tmp_path: Path, plain: bytes, count: int, kind: str) -> None:
    content = {
        "tensors": patched(plain, 8, "Q", count - 1),
        "metadata": patched(plain, 16, "Q", count - 1),
        "string": patched(plain, value_at(plain, "general.architecture"), "Q", count - 1),
        "axis": patched(plain, tensor_field(plain, "blk.0.attn_q.weight", "shape"), "Q", count - 32),
        **{
            name: b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + string("k")
            + struct.pack("<IIQ", ARRAY, item, count - 1)
            for name, item in (("strings", STRING), ("numbers", 5), ("lists", ARRAY))
        },
    }[kind]
    file = written(tmp_path / "liar.gguf", content)
    tracemalloc.start()
    with pytest.raises(
        CheckpointError, match=r"liar\.gguf is truncated|tensor blk\.0\.attn_q\.weight in .*liar\.gguf"
    ):
        read_gguf_header(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_metadata_that_is_nested_too_deeply(tmp_path: Path) -> None:
    lists = struct.pack("<IQ", ARRAY, 1) * 100_000
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<I", ARRAY)
    with pytest.raises(
        CheckpointError, match=r"deep\.gguf is not a valid GGUF file \(its metadata is nested too"
    ):
        read_gguf_header(written(tmp_path / "deep.gguf", head + lists))


NAME = "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("field", "layout", "change", "words"),
    [
        ("offset", "Q", -ALIGNMENT, "overlaps tensor "),
        ("offset", "Q", -1, "overlaps tensor |is not directly behind tensor "),
        ("offset", "Q", ALIGNMENT, "is not directly behind tensor "),
        ("offset", "Q", 1 << 40, "is not directly behind tensor "),
        ("axes", "I", 3, "has 5 axes"),
        ("axes", "I", -2, "has 0 axes"),
        ("type", "I", 9000, "is of type 9008, which there is not"),
        ("shape", "Q", 1, "has rows of 65, and Q8_0 has blocks of 32"),
        ("shape", "Q", -32, "blk|is not directly behind"),
    ],
)
def test_a_tensor_that_is_not_where_and_what_the_header_says(
    tmp_path: Path, plain: bytes, field: str, layout: str, change: int, words: str
) -> None:
    place = tensor_field(plain, NAME, field)
    value = struct.unpack_from("<" + layout, plain, place)[0]
    file = written(tmp_path / "moved.gguf", patched(plain, place, layout, value + change))
    with pytest.raises(CheckpointError, match=words) as refused:
        read_gguf_header(file)
    assert "tensor blk." in str(refused.value)


def test_what_lies_behind_the_last_tensor_or_is_there_twice(tmp_path: Path, plain: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"behind\.gguf has \d+ bytes behind its last tensor"):
        read_gguf_header(written(tmp_path / "behind.gguf", plain + bytes(ALIGNMENT)))
    twice = plain.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_up\.weight is there twice"):
        read_gguf_header(written(tmp_path / "twice.gguf", twice))
    key = plain.replace(b"llama.feed_forward_length", b"llama.embedding_lengthxxx").replace(
        b"lengthxxx", b"lengthyyy"
    )
    with pytest.raises(CheckpointError, match=r"does not state 'llama\.feed_forward_length'"):
        open_donor(str(written(tmp_path / "key.gguf", key)))


NUMBERS = [
    (
        "tokenizer.ggml.padding_token_id",
        "I",
        320,
        "has pad_token_id=320, and with vocab_size=320 the last token is",
    ),
    (
        "llama.attention.layer_norm_rms_epsilon",
        "f",
        math.inf,
        "layer_norm_rms_epsilon=Infinity is not a number above",
    ),
    (
        "llama.attention.layer_norm_rms_epsilon",
        "f",
        0.0,
        "layer_norm_rms_epsilon=0.0 is not a number above 0",
    ),
    ("llama.rope.freq_base", "f", -1.0, "llama.rope.freq_base=-1.0 is not a number above 1"),
    ("llama.rope.freq_base", "f", math.nan, "llama.rope.freq_base=NaN is not a number above 1"),
    (
        "llama.block_count",
        "I",
        (1 << 32) - 1,
        "llama.block_count=4294967295 is not a whole number from 1 to 4,096",
    ),
    ("llama.block_count", "I", 3, "says that there are 3 layers, and its weights have tensors of 2"),
    ("llama.block_count", "I", 0, "llama.block_count=0 is not a whole number from 1"),
    ("llama.attention.head_count", "I", 0, "llama.attention.head_count=0 is not a whole number from 1"),
    (
        "llama.embedding_length",
        "I",
        (1 << 32) - 1,
        "llama.embedding_length=4294967295 is not a whole number from 1",
    ),
    (
        "llama.rope.dimension_count",
        "I",
        (1 << 32) - 1,
        "llama.rope.dimension_count=4294967295 is not a whole",
    ),
    (
        "tokenizer.ggml.eos_token_id",
        "I",
        (1 << 32) - 1,
        "tokenizer.ggml.eos_token_id=4294967295 is not a whole",
    ),
]


@pytest.mark.parametrize(("key", "layout", "value", "words"), NUMBERS)
def test_a_number_out_of_range(
    main: Main,
    tmp_path: Path,
    plain: bytes,
    capsys: pytest.CaptureFixture[str],
    key: str,
    layout: str,
    value: Any,
    words: str,
) -> None:
    file = written(tmp_path / "odd.gguf", patched(plain, value_at(plain, key), layout, value))
    assert main(file, "--to", "mla", "-o", tmp_path / "out") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "odd.gguf" in said
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_a_token_behind_the_vocabulary(tmp_path: Path, plain: bytes) -> None:
    place = value_at(plain, "tokenizer.ggml.bos_token_id")
    donor = open_donor(str(written(tmp_path / "token.gguf", patched(plain, place, "I", 99_999))))
    with pytest.raises(CheckpointError, match=r"the tokenizer in .*token\.gguf cannot be made"):
        donor.tokenizer()


def refusal(file: Path) -> str:
    """Why the weights of a donor cannot be read, or its path where they can."""
    try:
        donor = open_donor(str(file))
        donor.layout.check(donor.source, file)
    except (CheckpointError, UnsupportedError) as error:
        return str(error)
    return str(file)


@settings(max_examples=60, deadline=None)
@given(drawn=st.data())
def test_damaged_bytes_are_refused_in_words_or_change_nothing_of_the_layout(
    drawn: st.DataObject, whole: Path
) -> None:
    plain = whole.read_bytes()
    end = plain.index(string("output_norm.weight")) + 60
    places = drawn.draw(
        st.lists(st.tuples(st.integers(0, end), st.binary(min_size=1, max_size=9)), max_size=3)
    )
    content = bytearray(plain)
    for place, new in places:
        content[place : place + len(new)] = new
    file = written(whole.with_name("fuzzed.gguf"), bytes(content))
    assert "fuzzed.gguf" in refusal(file)
