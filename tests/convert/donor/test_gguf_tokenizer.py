"""A GGUF's tokenizer splits any text as its source does, and as transformers makes it where that is right."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.donor.gguf_pre_tokenizers import PRE_TOKENIZERS
from mhconvert.convert.donor.gguf_reader import read_gguf_header
from mhconvert.convert.donor.gguf_tokenizer import gguf_tokenizer
from mhconvert.errors import UnsupportedError
from tests.donors import CHAT_TEMPLATE, TEXT, make_gguf

# Spaces, Latin with accents, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, kana, Han, Hangul and emoji.
SCRIPTS = ((9, 13), (32, 126), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x6FF))
SCRIPTS += (
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1F64F),
)
PIECES = st.sampled_from(
    ["<|bos|>", "<|eos|>", "<s>", "  ", "\r\n", "\n\n", "'s", "'LL", "12345", "e\u0301", "HTTPServer"]
)
CHARACTERS = st.one_of(*(st.characters(min_codepoint=low, max_codepoint=high) for low, high in SCRIPTS))
STRINGS = st.lists(st.one_of(CHARACTERS, PIECES), max_size=24).map("".join)


@pytest.fixture(scope="module", params=list(PRE_TOKENIZERS))
def byte_level(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path]:
    pre = request.param
    file = make_gguf(tmp_path_factory.mktemp(pre) / "tiny.gguf", pre=pre)
    return pre, gguf_tokenizer(read_gguf_header(file)), file


def test_byte_level_tokenizers_lose_nothing(byte_level: tuple[str, Any, Path], tmp_path: Path) -> None:
    pre, ours, _ = byte_level
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)

    @given(STRINGS)
    @settings(max_examples=60, deadline=None)
    def check(text: str) -> None:
        ids = ours(text).input_ids
        assert again(text).input_ids == ids
        expected = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].composed else text
        assert ours.decode(ids) == expected

    check()


# Names that transformers cuts as the published tokenizers do; others it takes for GPT-2's without a word.
THEIRS = (
    "gpt-2",
    "llama-bpe",
    "falcon3",
    "smaug-bpe",
    "dbrx",
    "qwen2",
    "deepseek-r1-qwen",
    "qwen35",
    "tekken",
    "gpt-4o",
)


def test_byte_level_tokenizers_equal_those_of_transformers(byte_level: tuple[str, Any, Path]) -> None:
    pre, ours, file = byte_level
    if pre not in THEIRS:
        pytest.skip("transformers does not know this pre-tokenizer")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

    @given(STRINGS.map(lambda text: unicodedata.normalize("NFC", text)))  # which theirs does not do
    @settings(max_examples=60, deadline=None)
    def check(text: str) -> None:
        assert ours(text).input_ids == theirs(text).input_ids

    check()
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|bos|>", "<|eos|>", "<|eos|>")
    assert (ours.chat_template, ours.model_max_length) == (theirs.chat_template, 512)


def test_smollm_cuts_digits_apart_before_anything_else(tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "tiny.gguf", pre="smollm")
    tokenizer = open_donor(str(file)).tokenizer()
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("at  42")]
    assert pieces == ["at", "ĠĠ", "4", "2"]  # plain GPT-2 would give "Ġ", "Ġ42"


def test_gguf_with_an_unknown_tokenizer(tmp_path: Path) -> None:
    donor = open_donor(str(make_gguf(tmp_path / "tiny.gguf", pre="viking")))
    with pytest.raises(
        UnsupportedError, match="with pre-tokenizer 'viking'; known are llama, and gpt2 with gpt-2"
    ):
        donor.tokenizer()


def test_text_ends_as_the_file_says(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"tokenizer.ggml.add_eos_token": True}
    tokenizer = gguf_tokenizer(read_gguf_header(make_gguf(tmp_path / "tiny.gguf", facts=facts)))
    assert tokenizer("a").input_ids == [*tokenizer("a", add_special_tokens=False).input_ids, 1]
    both = tokenizer("a", "b")
    assert both.input_ids == [*tokenizer("a").input_ids, *tokenizer("b").input_ids]


def test_several_chat_templates(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "tokenizer.chat_templates": ["rag"],
        "tokenizer.chat_template.rag": "{{ text }}",
    }
    donor = open_donor(str(make_gguf(tmp_path / "tiny.gguf", facts=facts)))
    assert donor.tokenizer().chat_template == {"default": CHAT_TEMPLATE, "rag": "{{ text }}"}


def _words() -> list[str]:
    """Pieces that a BPE finds in texts of several scripts, in the order in which it finds them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained.train_from_iterator([TEXT, "日本語の本、Привет мир, héllo wörld, नमस्ते  שלום " * 3], trainer)
    vocab = trained.get_vocab()
    return sorted(vocab, key=lambda piece: vocab[piece])


WORDS = _words()


def _write_sentencepiece(file: Path, architecture: str, **facts: Any) -> dict[str, float]:
    """A file with a SentencePiece vocabulary; returns piece -> score, the higher the earlier it merges."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [0.0] * len(special) + [-float(rank) for rank in range(len(WORDS))]
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *WORDS])
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in facts.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(zip(WORDS, scores[len(special) :], strict=True))


def _sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: of all neighbours the pair with the best score is joined first; bytes for what is left."""
    pieces = list(text)
    while True:
        joined = enumerate(a + b for a, b in itertools.pairwise(pieces))
        known = [(scores[piece], -at) for at, piece in joined if piece in scores]
        if not known:
            break
        at = -max(known)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    spelled = ([p] if p in scores else [f"<0x{byte:02X}>" for byte in p.encode()] for p in pieces)
    return list(itertools.chain.from_iterable(spelled))


@pytest.mark.parametrize(
    ("architecture", "facts", "prefix"),
    [
        ("llama", {}, "▁"),
        ("llama", {"add_space_prefix": False}, ""),
        ("phi3", {}, "▁"),
        ("gemma", {"add_space_prefix": False}, ""),
        ("gemma2", {"add_space_prefix": False}, ""),
    ],
)
def test_sentencepiece(tmp_path: Path, architecture: str, facts: dict[str, bool], prefix: str) -> None:
    scores = _write_sentencepiece(tmp_path / "tiny.gguf", architecture, **facts)
    ours = gguf_tokenizer(read_gguf_header(tmp_path / "tiny.gguf"))
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")

    @given(st.text(CHARACTERS, max_size=24))
    @settings(max_examples=100, deadline=None)
    def check(text: str) -> None:
        text = f"a{text}"  # before a space at the start, transformers puts none
        expected = ["<s>", *_sentencepiece(prefix + text.replace(" ", "▁"), scores)]
        ids = ours(text).input_ids
        assert ours.convert_ids_to_tokens(ids) == expected
        assert again(text).input_ids == ids
        assert ours.decode(ids, skip_special_tokens=True).strip() == text.strip()

    check()
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
