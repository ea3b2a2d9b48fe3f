"""The tokenizer of a GGUF model, from its metadata."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mhconvert.errors import CheckpointError, MhconvertError, UnsupportedError

from .gguf_config import special_ids
from .gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from .gguf_reader import GGUFHeader

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that the tokenizer must not split


def gguf_tokenizer(header: GGUFHeader) -> Any:
    """The tokenizer of the file, with its chat templates.

    Raises:
        CheckpointError: the file's tokens, merges or ids do not make one.
        UnsupportedError: its type is unknown.
    """
    try:
        return _tokenizer(header)
    except MhconvertError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the tokenizer in {header.path} cannot be made: {type(error).__name__}: {reason}"
        ) from error


def _tokenizer(header: GGUFHeader) -> Any:
    algorithm, pre = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre")
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    special = {name: tokens[index] for name, index in special_ids(header).items() if index is not None}
    if algorithm == "llama":  # SentencePiece, whose merges transformers derives from the scores
        fast = PreTrainedTokenizerFast.from_pretrained(header.path.parent, gguf_file=header.path.name)
        if header.metadata.get("tokenizer.ggml.add_space_prefix") is False:
            _remove_prefix(fast.backend_tokenizer)
    elif algorithm == "gpt2" and pre in PRE_TOKENIZERS:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(header, tokens, PRE_TOKENIZERS[pre], special),
            bos_token=special.get("bos"),
            eos_token=special.get("eos"),
            pad_token=special.get("padding"),
            unk_token=special.get("unknown"),
            clean_up_tokenization_spaces=False,
        )
    else:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(
            f"{header.path} has tokenizer '{algorithm}' with pre-tokenizer '{pre}'; known are llama, "
            f"and gpt2 with {known}; use the model's safetensors folder"
        )
    fast.model_max_length = int(header.hyperparameter("context_length"))
    fast.chat_template = _chat_templates(header)
    return fast


def _chat_templates(header: GGUFHeader) -> str | dict[str, str] | None:
    """The file's template, or where it names several, name -> template."""
    default = header.metadata.get("tokenizer.chat_template")
    names = header.metadata.get("tokenizer.chat_templates", [])
    named = {name: header.metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    more = {name: template for name, template in named.items() if template is not None}
    return {"default": default, **more} if default is not None and more else default


def _remove_prefix(tokenizer: Tokenizer) -> None:
    """Let no space be put before a text, which transformers does even where the file forbids it."""
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):  # Gemma's has none
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def _byte_level(
    header: GGUFHeader, tokens: list[str], known: PreTokenizer, special: dict[str, str]
) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in header.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=known.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(known.steps)
    if known.composed:
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
    _add_ends(tokenizer, header, known, special)
    return tokenizer


def _add_ends(tokenizer: Tokenizer, header: GGUFHeader, known: PreTokenizer, special: dict[str, str]) -> None:
    """Let texts start with bos and end with eos, as the file or else its pre-tokenizer says."""
    starts = header.metadata.get("tokenizer.ggml.add_bos_token", known.starts) and "bos" in special
    ends = header.metadata.get("tokenizer.ggml.add_eos_token", False) and "eos" in special
    before, after = ([special[name]] * on for name, on in (("bos", starts), ("eos", ends)))
    if starts or ends:
        single = [*before, "$A", *after]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *(f"{piece}:1" for piece in (*before, "$B", *after))],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
