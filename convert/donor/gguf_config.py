"""Config, tokenizer and generation settings of a GGUF model, from its metadata."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from mhconvert.errors import CheckpointError, UnsupportedError

from .gguf_reader import ROPE_FACTORS, GGUFHeader, dequantise, require_readable

SPECIAL_IDS = ("bos", "eos", "padding", "unknown")
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that the tokenizer must not split

_GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_STEPS = [
    pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]
# Pre-tokenizers by their name in `tokenizer.ggml.pre`, as in the published tokenizers.
PRE_TOKENIZERS: dict[str, list[Any]] = {
    "gpt-2": _GPT2,
    "smollm": [pre_tokenizers.Digits(individual_digits=True), *_GPT2],
    "llama-bpe": _LLAMA3_STEPS,
    "llama3": _LLAMA3_STEPS,
    "llama-v3": _LLAMA3_STEPS,
}
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def gguf_config(header: GGUFHeader) -> Any:
    """The transformers config of `header`'s model, with dtype float32, to which its tensors are dequantised.

    Raises:
        CheckpointError: the metadata lacks a value that the config needs.
        UnsupportedError: the file cannot be read, or does not state its RoPE scaling in full.
    """
    require_readable(header)
    ids = special_ids(header)
    try:
        hidden, heads = (
            int(header.hyperparameter("embedding_length")),
            int(header.hyperparameter("attention.head_count")),
        )
        head_dim = int(
            header.hyperparameter(
                "attention.key_length", header.hyperparameter("rope.dimension_count", hidden // heads)
            )
        )
        common: dict[str, Any] = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": header.num_key_value_heads,
            "head_dim": head_dim,
            "num_hidden_layers": int(header.hyperparameter("block_count")),
            "intermediate_size": int(header.hyperparameter("feed_forward_length")),
            "vocab_size": header.tensors["token_embd.weight"].shape[0],
            "max_position_embeddings": int(header.hyperparameter("context_length")),
            "rms_norm_eps": float(header.hyperparameter("attention.layer_norm_rms_epsilon")),
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["padding"],
        }
        config: Any
        if header.architecture == "gemma3":
            config = _gemma3_config(header, common)
        else:
            config = LlamaConfig(**common, rope_parameters=_rope(header, head_dim))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{header.path} lacks a fact about its model ({error}); use another file"
        ) from error
    config.architectures = ["LlamaForCausalLM" if header.architecture == "llama" else "Gemma3ForCausalLM"]
    config.dtype = torch.float32
    return config


GEMMA3_27B_LAYERS = 62  # the only size whose scores are not divided by √head_dim


def _gemma3_config(header: GGUFHeader, common: dict[str, Any]) -> Gemma3TextConfig:
    """The config of a Gemma 3 model: every sixth layer has full attention, the others are local with their own RoPE."""
    hidden, heads, head_dim = (common[key] for key in ("hidden_size", "num_attention_heads", "head_dim"))
    largest = common["num_hidden_layers"] == GEMMA3_27B_LAYERS
    local = {
        "rope_type": "default",
        "rope_theta": float(header.hyperparameter("rope.freq_base_swa", 10000.0)),
    }
    return Gemma3TextConfig(
        **common,
        query_pre_attn_scalar=hidden // heads if largest else head_dim,
        sliding_window=int(header.hyperparameter("attention.sliding_window")),
        rope_parameters={"sliding_attention": local, "full_attention": _rope(header, head_dim)},
    )


def gguf_generation_config(header: GGUFHeader) -> GenerationConfig:
    """Generation settings with the start, end and padding tokens of the file."""
    ids = special_ids(header)
    return GenerationConfig(bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["padding"])


def special_ids(header: GGUFHeader) -> dict[str, int | None]:
    """The token id of each name in `SPECIAL_IDS`, None where the file has none."""
    return {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in SPECIAL_IDS}


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


def _rope(header: GGUFHeader, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(header.hyperparameter("rope.freq_base", 10000.0)),
    }
    rotated = int(header.hyperparameter("rope.dimension_count", head_dim))
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    scaling = header.hyperparameter("rope.scaling.type", "none")
    if scaling == "linear":
        return rope | {"rope_type": "linear", "factor": float(header.hyperparameter("rope.scaling.factor"))}
    if scaling != "none":
        raise UnsupportedError(
            f"{header.path} scales RoPE by '{scaling}', which GGUF does not state in full; "
            "use the model's safetensors folder"
        )
    if ROPE_FACTORS in header.tensors:
        rope |= _llama3_scaling(header, rope["rope_theta"], head_dim)
    return rope


def _llama3_scaling(header: GGUFHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """The `llama3` RoPE parameters that reproduce the file's divisors of the rotary frequencies.

    Raises:
        UnsupportedError: no factor reproduces the divisors with Llama 3's other parameters.
    """
    divisors = dequantise(header.path, header.tensors[ROPE_FACTORS])
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor = float(divisors.max())
    wavelengths = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((8192 / wavelengths - 1.0) / 3.0).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if expected.shape != divisors.shape or not torch.allclose(expected, divisors.double(), rtol=1e-4):
        raise UnsupportedError(
            f"{header.path} carries RoPE factors (rope_freqs) other than Llama 3's; "
            "use the model's safetensors folder"
        )
    return {"rope_type": "llama3", "factor": factor, **known}
