"""Config and generation settings of a GGUF model, from its metadata."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mhconvert.errors import CheckpointError, UnsupportedError

from ..families.facts import FAMILIES
from .config_check import require_layers, require_padding, require_ranges
from .gguf_architectures import ARCHITECTURES, FIELDS, FLAGS, REQUIRED, Architecture
from .gguf_reader import GGUFHeader, require_dequantisable
from .gguf_rope import ROPE_KEYS, rope_parameters

SPECIAL_IDS = ("bos", "eos", "padding", "unknown")
ENDS = ("eos", "eot", "eom")  # tokens that end an answer: of the text, of a turn, of a message


def architecture_of(header: GGUFHeader) -> Architecture:
    """The row of `header`'s architecture; raises UnsupportedError with those that can be read where there is none."""
    for row in ARCHITECTURES:
        if row.name == header.architecture and (row.needs is None or header.hyperparameter(row.needs)):
            return row
    known = ", ".join(dict.fromkeys(row.name for row in ARCHITECTURES))
    raise UnsupportedError(
        f"{header.path} has GGUF architecture '{header.architecture}'; GGUF donors can be: {known} "
        "(other families from safetensors)"
    )


def gguf_config(header: GGUFHeader) -> Any:
    """The transformers config of `header`'s model, with dtype float32, to which its tensors are dequantised.

    Raises:
        CheckpointError: the metadata lacks a value that the config needs, or has one that no config can have, such as
            more layers than tensors.
        UnsupportedError: the architecture or a quantisation cannot be read, a value has no place in the config, or the
            file does not state its RoPE scaling in full.
    """
    row = architecture_of(header)
    require_dequantisable(header)
    kind: Any = CONFIG_MAPPING[row.model_type]
    try:
        fields = _stated(header, row, kind()) | _vocabulary(header)
        names = _names(header, row)
        require_ranges(fields, header.path, names)
        require_layers(fields["num_hidden_layers"], header.tensors, header.path)
        head_dim = _head_dim(header, row)
        require_ranges({"head_dim": head_dim}, header.path, names)
        if hasattr(kind(), "head_dim") or head_dim != fields["hidden_size"] // fields["num_attention_heads"]:
            fields["head_dim"] = head_dim
        fields |= _attention(header, row, head_dim)
        require_ranges(fields, header.path, names)
        config = kind(**fields)
        require_padding(config, header.path)
    except KeyError as error:
        raise CheckpointError(f"{header.path} does not state {error}; use another file") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{header.path} describes no {row.model_type} model: {reason}") from error
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.model_type]]
    config.dtype = torch.float32
    return config


def _stated(header: GGUFHeader, row: Architecture, default: Any) -> dict[str, Any]:
    """The fields of the config that the file states, by value or by the presence of a tensor."""
    known = FIELDS | row.fields
    eps = [key for key, field in known.items() if key.endswith("_epsilon") and hasattr(default, field)]
    needed = (*REQUIRED, *row.required, *eps)
    for key in needed:
        if header.hyperparameter(key) is None:
            raise KeyError(f"{header.architecture}.{key}")
    fields = row.fixed | {"num_key_value_heads": header.hyperparameter("attention.head_count")}
    for key, field in known.items():
        value = header.hyperparameter(key)
        if value is not None and hasattr(default, field) and not isinstance(value, list):
            fields[field] = value if value or key in needed else None  # 0 says that the model has none
        elif value and not key.endswith("_epsilon"):  # a norm that the model does not have needs none
            raise UnsupportedError(
                f"{header.path} states {header.architecture}.{key} = {value}, for which {row.model_type} has no place; "
                "use the model's safetensors folder"
            )
    flags = {flag: (tensor in header.tensors) == present for flag, (tensor, present) in FLAGS.items()}
    return fields | {flag: value for flag, value in flags.items() if hasattr(default, flag)}


def _vocabulary(header: GGUFHeader) -> dict[str, Any]:
    ids = special_ids(header)
    return {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
    }


def _names(header: GGUFHeader, row: Architecture) -> dict[str, str]:
    """Field of the config -> key of the file that states it."""
    keys = {field: key for key, field in (FIELDS | row.fields).items()}
    widths = ("attention.key_length", "rope.dimension_count")
    keys["head_dim"] = next((key for key in widths if header.hyperparameter(key) is not None), "head_dim")
    keys |= {f"rope_parameters.{field}": key for field, key in ROPE_KEYS.items()}
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    tokens = {f"{field}_token_id": f"tokenizer.ggml.{name}_token_id" for field, name in ids.items()}
    return {field: f"{header.architecture}.{key}" for field, key in keys.items()} | tokens


def _head_dim(header: GGUFHeader, row: Architecture) -> int:
    stated = header.hyperparameter("attention.key_length")
    if stated is None and not FAMILIES[row.model_type].partial_rotary:
        stated = header.hyperparameter("rope.dimension_count")
    return int(stated or _hidden_a_head(header))


def _hidden_a_head(header: GGUFHeader) -> int:
    return int(header.hyperparameter("embedding_length") // header.hyperparameter("attention.head_count"))


def _attention(header: GGUFHeader, row: Architecture, head_dim: int) -> dict[str, Any]:
    """RoPE, and where the config has them the scale of the scores and the kinds of the layers."""
    rope = rope_parameters(header, head_dim)
    fields: dict[str, Any] = {"rope_parameters": rope}
    if row.local_base is not None:
        local = {"rope_type": "default", "rope_theta": float(header.hyperparameter(*row.local_base))}
        fields["rope_parameters"] = {"sliding_attention": local, "full_attention": rope}
    pattern = header.hyperparameter("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[bool(windowed)] for windowed in pattern]
    if row.largest is not None:
        largest = header.hyperparameter("block_count") == row.largest
        fields["query_pre_attn_scalar"] = _hidden_a_head(header) if largest else head_dim
    return fields


def gguf_generation_config(header: GGUFHeader) -> GenerationConfig:
    """Generation settings with the start, end and padding tokens of the file."""
    ids = special_ids(header)
    stated = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    ends = [end for end in stated if end is not None]
    require_ranges({"eos_token_id": ends}, header.path)
    eos = list(dict.fromkeys(ends))
    return GenerationConfig(
        bos_token_id=ids["bos"],
        eos_token_id=eos if len(eos) > 1 else next(iter(eos), None),
        pad_token_id=ids["padding"],
    )


def special_ids(header: GGUFHeader) -> dict[str, int | None]:
    """The token id of each name in `SPECIAL_IDS`, None where the file has none."""
    return {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in SPECIAL_IDS}
