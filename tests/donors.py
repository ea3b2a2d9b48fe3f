"""Tiny random donors, written to disk as people publish them: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "The cache of a transformer holds the keys and the values of every token it has read. "
    "A latent holds less, and from it both can be had again. The river ran slowly past the town, "
    "and in the evening the boats came home; nobody counted them, for there were always enough. "
    "Water boils at 100 degrees at sea level, and at 95 degrees on a mountain of 1500 metres.\n"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)

DEFAULTS = {"max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def make_tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab` ≥ 258 tokens; 0 is <|bos|>, 1 is <|eos|> (also the padding)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(
    *,
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    head_dim: int | None = None,
    layers: int = 2,
    vocab: int = 320,
    tied: bool = True,
    rope: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A config of `family` (its model_type). `rope` updates rope_parameters; `settings` go in as they are."""
    return AutoConfig.for_model(
        family,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=hidden,
        head_dim=head_dim or hidden // heads,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        **(DEFAULTS | {"rope_parameters": DEFAULT_ROPE | (rope or {})} | settings),
    )


def make_model(config: Any, *, seed: int = 0, std: float = 0.15) -> Any:
    """A random fp32 model in eval mode: matrices N(0, std²); vectors shifted by N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * std if weight.dim() > 1 else weight + 0.1 * noise)
    return model


def make_donor(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
    std: float = 0.15,
    **config: Any,
) -> Path:
    """Write a donor folder at `path` and return it; `config` goes to `make_config`.

    shards=1: model.safetensors; more: that many shards and an index. Tied donors store no lm_head.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    settings = make_config(**config)
    model = make_model(settings, seed=seed, std=std).to(dtype)
    settings.dtype = dtype
    settings.architectures = [type(model).__name__]
    settings.save_pretrained(path)
    model.generation_config.save_pretrained(path)
    make_tokenizer(settings.vocab_size).save_pretrained(path)
    (path / "LICENSE").write_text("Tiny test licence\n", encoding="utf-8")
    write_weights(path, stored_weights(model), shards)
    return path


def stored_weights(model: Any) -> dict[str, Tensor]:
    """The tensors a publisher writes: without lm_head when it is tied."""
    tied = model.config.tie_word_embeddings
    return {
        name: weight.detach().clone().contiguous()
        for name, weight in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def write_weights(path: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    """`weights` as model.safetensors, or dealt out to `shards` files with an index."""
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    place = {name: files[n * shards // len(weights)] for n, name in enumerate(weights)}
    for file in files:
        save_file(
            {k: w for k, w in weights.items() if place[k] == file}, path / file, metadata={"format": "pt"}
        )
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def make_gguf(
    path: Path,
    *,
    quantization: str = "F32",
    seed: int = 0,
    std: float = 0.15,
    architecture: str | None = None,
    pre: str = "gpt-2",
    facts: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    part: int = 0,
    **config: Any,
) -> Path:
    """Write a GGUF file at `path` as llama.cpp's converters do and return it; `config` goes to `make_config`.

    Matrices are stored in `quantization`, vectors in F32. Row lengths must divide by 32 for the quantised types.
    architecture (of the family unless given), pre (the pre-tokenizer's name), facts (numbers and text) and tensors go
    into the file as they are. part: how many tensors are in each part of a split file, whose parts lie beside `path`.
    """
    import gguf

    settings = make_config(**config)
    model = make_model(settings, seed=seed, std=std)
    family = settings.model_type
    name = architecture or GGUF_ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(str(path), name, split_max_tensors=part)
    write_gguf_facts(writer, settings)
    _write_gguf_tokenizer(writer, settings, pre)
    for key, value in (facts or {}).items():
        add = {
            str: writer.add_string,
            float: writer.add_float32,
            bool: writer.add_bool,
            list: writer.add_array,
        }
        add.get(type(value), writer.add_uint32)(key, value)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, array in gguf_arrays(model).items():
        if array.ndim > 1 and quantization not in ("F32", "F16"):
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.astype(np.float16) if kind == 1 and array.ndim > 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


GGUF_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
}
PERMUTED = ("llama", "mistral", "mixtral", "olmo", "granite", "granitemoe", "arcee")


def gguf_arrays(model: Any) -> dict[str, np.ndarray]:
    """llama.cpp's name -> array of each tensor of `model`.

    q and k are permuted, 1 is added to Gemma's norms, experts' gate and up are apart, axes of length 1 are dropped.
    """
    import gguf

    config, family = model.config, model.config.model_type
    name_of = GGUF_ARCHITECTURES.get(family, family)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == name_of)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    arrays = {}
    for name, weight in stored_weights(model).items():
        array = weight.numpy()
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if family in PERMUTED and ".q_proj." in name:
            array = _interleave(array, config.num_attention_heads)
        if family in PERMUTED and ".k_proj." in name:
            array = _interleave(array, config.num_key_value_heads)
        name = name.replace("block_sparse_moe.router", "mlp.gate").replace("block_sparse_moe", "mlp")
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), np.split(array, 2, axis=1), strict=True):
                arrays[f"{known.get_name(name.replace('gate_up_proj', part))}.weight"] = half
            continue
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        suffix = "" if theirs.endswith((".weight", ".bias")) else ".weight"
        arrays[theirs + suffix] = array.squeeze()
    return arrays


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of one head: halves (r0 r1 … | i0 i1 …) -> pairs (r0 i0 r1 i1 …), llama.cpp's RoPE layout."""
    rows = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))


# Field of a config -> GGUFWriter's method that llama.cpp's converters call with it.
GGUF_FACTS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "head_count",
    "num_key_value_heads": "head_count_kv",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "layer_norm_rms_eps",
    "layer_norm_eps": "layer_norm_eps",
    "norm_epsilon": "layer_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "clip_qkv": "clamp_kqv",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
WINDOW_STATED = ("gemma2", "gemma3_text", "phi3", "olmo3")
ROTATED_STATED = ("llama", "mistral", "mixtral", "granite", "granitemoe", "arcee", "phi3", "stablelm")
HEAD_DIM_STATED = ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text")


def write_gguf_facts(writer: Any, config: Any) -> None:
    values = {
        method: getattr(config, field, None) for field, method in GGUF_FACTS.items() if hasattr(config, field)
    }
    for method, value in values.items():
        if value is not None:
            getattr(writer, f"add_{method}")(value)
    family, even = config.model_type, config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", even)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if family not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if family == "olmo":
        writer.add_layer_norm_eps(1e-5)
    if family in HEAD_DIM_STATED or head_dim != even:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ROTATED_STATED:
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    if family in WINDOW_STATED:
        writer.add_sliding_window(config.sliding_window or 0)
    if family == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _write_gguf_tokenizer(writer: Any, config: Any, pre: str) -> None:
    tokenizer = json.loads(make_tokenizer(config.vocab_size).backend_tokenizer.to_str())
    vocab = tokenizer["model"]["vocab"]
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens += [f"<|unused_{n}|>" for n in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 5 if t.startswith("<|unused") else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def make_checkpoint(path: Path, method: str = "mla", settings: Any = None) -> Path:
    """Write a donor beside `path`, convert it into `path`, and return that; `settings`: 16-bit mla unless given."""
    from mhconvert import api
    from mhconvert.convert.methods.mla.settings import MLASettings
    from mhconvert.convert.recipe.recipe import Calibration, Recipe

    calibration = Calibration(tokens=512, sequence_length=64, held_out=2)
    recipe = Recipe(
        model=str(make_donor(path.parent / "donor")),
        method=method,
        settings=settings or MLASettings(kv_budget=0.4, kv_bits="16"),
        output=str(path),
        **({} if method == "hydra" else {"effort": "quick", "calibration": calibration, "verify": False}),
    )
    api.convert(recipe)
    return path
