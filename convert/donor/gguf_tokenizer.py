"""The tokenizer of a GGUF model, from its metadata."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mhconvert.errors import UnsupportedError

from .gguf_config import special_ids
from .gguf_reader import GGUFHeader

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that the tokenizer must not split


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_STEPS = _split(_LLAMA3)
# Pre-tokenizers by their name in `tokenizer.ggml.pre`, as in the published tokenizers.
PRE_TOKENIZERS: dict[str, list[Any]] = {
    "gpt-2": _GPT2,
    "smollm": [pre_tokenizers.Digits(individual_digits=True), *_GPT2],
    "llama-bpe": _LLAMA3_STEPS,
    "llama3": _LLAMA3_STEPS,
    "llama-v3": _LLAMA3_STEPS,
    "qwen2": _split(_QWEN2),
}
NFC = ("qwen2",)  # their published tokenizers compose accents first
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def gguf_tokenizer(header: GGUFHeader) -> Any:
    """The tokenizer of the file, with its chat template.

    Raises:
        UnsupportedError: its type is unknown.
    """
    algorithm, pre = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre")
    if algorithm == "llama":  # SentencePiece, which transformers rebuilds exactly
        return AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name)
    if algorithm != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(
            f"{header.path} has tokenizer '{algorithm}' with pre-tokenizer '{pre}'; known are llama, "
            f"and gpt2 with {known}; use the model's safetensors folder"
        )
    tokens = header.metadata["tokenizer.ggml.tokens"]
    special = {name: tokens[index] for name, index in special_ids(header).items() if index is not None}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(header, tokens, pre, special.get("bos")),
        bos_token=special.get("bos"),
        eos_token=special.get("eos"),
        pad_token=special.get("padding"),
        unk_token=special.get("unknown"),
        model_max_length=int(header.hyperparameter("context_length")),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = header.metadata.get("tokenizer.chat_template")
    return fast


def _byte_level(header: GGUFHeader, tokens: list[str], pre: str, bos: str | None) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in header.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3_NAMES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    if pre in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types = header.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in typed if kind == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in typed if kind == USER_DEFINED]
    )
    if bos and header.metadata.get("tokenizer.ggml.add_bos_token", pre in LLAMA3_NAMES):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer
