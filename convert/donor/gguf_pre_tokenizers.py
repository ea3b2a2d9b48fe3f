"""How llama.cpp's named pre-tokenizers cut text before the merges of a byte-level BPE, as in the published tokenizers.

Not transformers' GGUF_PRE_TOKENIZER_SPLITS: it has none that cut digits apart, and cuts text of a name that it does not
know as GPT-2's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One pre-tokenizer.

    Attributes:
        steps: of the `tokenizers` library.
        ignore_merges: whether a word that is a token skips the merges.
        starts: whether text gets a bos where the file does not say.
        composed: whether the published tokenizers compose accents first (NFC).
    """

    steps: list[Any]
    ignore_merges: bool = False
    starts: bool = False
    composed: bool = False


def _split(regex: str, **settings: bool) -> PreTokenizer:
    steps = [
        pre_tokenizers.Split(Regex(regex), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return PreTokenizer(steps, **settings)


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = PreTokenizer([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_LLAMA3_BPE = _split(_LLAMA3, ignore_merges=True, starts=True)

# By their name in `tokenizer.ggml.pre`; of several names of one kind, the exporter writes the first.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer([_GPT2]),
    "olmo": PreTokenizer([_GPT2], composed=True),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3_BPE,
    "llama3": _LLAMA3_BPE,
    "llama-v3": _LLAMA3_BPE,
    "falcon3": _LLAMA3_BPE,
    "smaug-bpe": _split(_LLAMA3),
    "dbrx": _split(_LLAMA3),
    "qwen2": _split(_QWEN2, composed=True),
    "stablelm2": _split(_QWEN2),
    "deepseek-r1-qwen": _split(_QWEN2),
    "megrez": _split(_QWEN2),
    "qwen35": _split(_QWEN35, composed=True),
    "tekken": _split(_TEKKEN, ignore_merges=True, starts=True),
    "gpt-4o": _split(_GPT4O),
    "llama4": _split(_GPT4O),
}
