"""A DHA checkpoint in nemotron-nas blocks: by the meaning of the keys that engines read, and by the shipped class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

import mhconvert
from mhconvert.convert.export.dha import to_nemotron_nas
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import ExportError
from tests.convert.conversions import LLAMA3, YARN, logits, relative, token_ids
from tests.convert.export.dha_exports import Maps, elsewhere, load, make_dha, require_same
from tests.donors import make_donor

# One, two and four KV heads: groups that lie apart, in an order of their own, and in the donor's.
LAYERED: Maps = [
    ([0, 0, 0, 0], [0, 0, 0, 0]),
    ([0, 1, 1, 0], [1, 0, 0, 1]),
    ([0, 1, 2, 3], [3, 1, 0, 2]),
]
UNEQUAL: Maps = [([0, 0, 1, 1], [0, 0, 0, 0]), ([0, 0, 0, 1], [0, 0, 0, 1]), ([0, 0, 1, 1], [0, 0, 1, 1])]


def mlp_width(ffn_mult: float, hidden_size: int) -> int:
    """As vLLM, SGLang, TensorRT-LLM and llama.cpp compute it: rounded up to a multiple of 256."""
    return math.ceil(int(2 * ffn_mult * hidden_size / 3) / 256) * 256


def layer_config(config: dict[str, Any], block: dict[str, Any]) -> LlamaConfig:
    """One block as a Llama's. Old keys of RoPE, as SGLang and llama.cpp read them."""
    assert not any(block[part][key] for part in block for key in ("no_op", "replace_with_linear"))
    rope = (config["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": config["rope_theta"]}
    own = LlamaConfig(
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_attention_heads"] // block["attention"]["n_heads_in_group"],
        head_dim=config["head_dim"],
        intermediate_size=mlp_width(block["ffn"]["ffn_mult"], config["hidden_size"]),
        hidden_act=config["hidden_act"],
        rms_norm_eps=config["rms_norm_eps"],
        attention_bias=config["attention_bias"],
        mlp_bias=config["mlp_bias"],
        max_position_embeddings=config["max_position_embeddings"],
        rope_parameters=rope,
    )
    own._attn_implementation = "eager"
    return own


@torch.no_grad()
def rebuilt_logits(folder: Path, ids: Tensor) -> Tensor:
    """The model that config.json and the weights describe to an engine, out of Llama's layers."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    hidden = weights.pop("model.embed_tokens.weight")[ids]
    head = weights.pop("lm_head.weight") if not config["tie_word_embeddings"] else None
    positions = torch.arange(ids.shape[1])[None]
    mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)[None, None]
    for index, block in enumerate(config["block_configs"]):
        own = layer_config(config, block)
        layer, prefix = LlamaDecoderLayer(own, 0).eval(), f"model.layers.{index}."
        state = {n.removeprefix(prefix): weights.pop(n) for n in list(weights) if n.startswith(prefix)}
        layer.load_state_dict(state, strict=True)
        rotary = LlamaRotaryEmbedding(own)(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    norm = LlamaRMSNorm(config["hidden_size"], config["rms_norm_eps"])
    norm.weight = nn.Parameter(weights.pop("model.norm.weight"))
    assert not weights
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    return norm(hidden) @ (embedding if head is None else head).T


def engine_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names that vLLM and SGLang load, before they join q, k, v and gate, up; biases where the config asks."""
    hidden, queries = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for index, block in enumerate(config["block_configs"]):
        heads = config["num_attention_heads"] // block["attention"]["n_heads_in_group"]
        width = mlp_width(block["ffn"]["ffn_mult"], hidden)
        matrices = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (heads * config["head_dim"], hidden),
            "self_attn.v_proj": (heads * config["head_dim"], hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }
        for name, shape in matrices.items():
            found[f"model.layers.{index}.{name}.weight"] = shape
            if config["attention_bias" if name.startswith("self_attn") else "mlp_bias"]:
                found[f"model.layers.{index}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{index}.{name}.weight"] = (hidden,)
    return found


@pytest.mark.parametrize(
    "donor",
    [
        {},
        {"tied": False, "attention_bias": True, "rope": LLAMA3},
        {"head_dim": 24, "mlp_bias": True, "rope": YARN},
        {"hidden": 128, "rope": {"rope_type": "linear", "factor": 2.0}},
        {"family": "qwen2", "tied": False},
        {"family": "mistral", "sliding_window": None, "dtype": torch.bfloat16},
    ],
)
def test_engines_find_the_checkpoint(tmp_path: Path, donor: dict[str, Any]) -> None:
    checkpoint, out = make_dha(tmp_path, LAYERED, **donor), tmp_path / "out"
    report = to_nemotron_nas.export_checkpoint(str(checkpoint), str(out))
    assert (report["architecture"], report["heads_by_layer"]) == ("DeciLMForCausalLM", [1, 2, 4])
    assert (report["duplicated_heads"], report["exact"]) == (0, True)
    assert report["kv_bytes_per_token"]["export"] == report["kv_bytes_per_token"]["checkpoint"]
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert [b["attention"]["n_heads_in_group"] for b in config["block_configs"]] == [4, 2, 1]
    held = {name: tuple(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()}
    assert held == engine_shapes(config)
    ids = token_ids(3, 40)
    assert relative(rebuilt_logits(out, ids), logits(load(checkpoint), ids)) <= 2e-6
    require_same(checkpoint, out, report)


def test_a_wrong_block_would_show(tmp_path: Path) -> None:
    """The comparison above sees which KV head a query head reads."""
    checkpoint, out = make_dha(tmp_path, LAYERED[1:2]), tmp_path / "out"
    to_nemotron_nas.export_checkpoint(str(checkpoint), str(out))
    ids, weights = token_ids(3, 40), load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name].roll(16, 0)
    save_file(weights, out / "model.safetensors")
    assert relative(rebuilt_logits(out, ids), logits(load(checkpoint), ids)) > 1e-2


def test_a_stranger_loads_it(tmp_path: Path) -> None:
    checkpoint = make_dha(tmp_path, LAYERED)
    report = to_nemotron_nas.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    found = elsewhere(checkpoint, tmp_path / "out", tmp_path)
    assert (found["model_class"], found["module"]) == ("DeciLMForCausalLM", "transformers_modules")
    assert found["relative_logit_error"] <= 2e-6
    assert found["cache"]["bytes_per_token"] == report["kv_bytes_per_token"]["export"] == 2 * 7 * 16 * 4


def test_engines_read_the_blocks_as_attributes(tmp_path: Path) -> None:
    """vLLM: config.block_configs[i].attention.n_heads_in_group; what is saved again is the same."""
    checkpoint, out = make_dha(tmp_path, LAYERED, rope=LLAMA3), tmp_path / "out"
    to_nemotron_nas.export_checkpoint(str(checkpoint), str(out))
    config: Any = AutoConfig.from_pretrained(out, trust_remote_code=True)
    blocks = config.block_configs
    assert [block.attention.n_heads_in_group for block in blocks] == [4, 2, 1]
    assert not any(block.attention.no_op or block.ffn.no_op for block in blocks)
    assert not hasattr(blocks[0].ffn, "hidden_act")  # vLLM asks, and takes the model's
    assert config.rope_parameters == LLAMA3 | {"rope_theta": 10000.0}
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    first = json.loads((out / "config.json").read_text())
    assert again["block_configs"] == first["block_configs"]


def test_llama_cpp_and_sglang_read_rope_outside_its_dictionary(tmp_path: Path) -> None:
    checkpoint, out = make_dha(tmp_path, LAYERED, rope=LLAMA3 | {"rope_theta": 5e5}), tmp_path / "out"
    to_nemotron_nas.export_checkpoint(str(checkpoint), str(out))
    config = json.loads((out / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, LLAMA3)
    assert config["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("width", "hidden"),
    [
        (11008, 4096),
        (14336, 4096),
        (8192, 2048),
        (28672, 8192),
        (8960, 1536),
        (256, 96),
        (5632, 2048),
        (3072, 1000),
    ],
)
def test_engines_round_to_the_width(width: int, hidden: int) -> None:
    assert mlp_width(to_nemotron_nas.ffn_mult(width, hidden), hidden) == width


def test_an_mlp_is_filled_up_with_units_that_compute_nothing(tmp_path: Path) -> None:
    checkpoint, out = make_dha(tmp_path, LAYERED, hidden=96, heads=4, head_dim=24), tmp_path / "out"
    report = to_nemotron_nas.export_checkpoint(str(checkpoint), str(out))
    assert report["mlp_width"] == {"checkpoint": 192, "export": 256}
    weights = load_file(out / "model.safetensors")
    assert not weights["model.layers.1.mlp.gate_proj.weight"][192:].any()
    assert not weights["model.layers.1.mlp.down_proj.weight"][:, 192:].any()
    wide = to_nemotron_nas.export_checkpoint(
        str(make_dha(tmp_path / "wide", LAYERED, hidden=128)), str(tmp_path / "b")
    )
    assert wide["mlp_width"] == {"checkpoint": 256, "export": 256}


def test_copies_of_heads_where_they_are_wanted(tmp_path: Path) -> None:
    checkpoint, out = make_dha(tmp_path, UNEQUAL), tmp_path / "out"
    with pytest.raises(ExportError, match=r"layer 0: .*--duplicate caches 5 heads.*: 704 -> 1024 KV bytes"):
        to_nemotron_nas.export_checkpoint(str(checkpoint), str(out))
    assert not out.exists()
    report = to_nemotron_nas.export_checkpoint(str(checkpoint), str(out), duplicate=True)
    assert (report["heads_by_layer"], report["duplicated_heads"]) == ([2, 4, 2], 5)
    assert relative(rebuilt_logits(out, token_ids(3, 40)), logits(load(checkpoint), token_ids(3, 40))) <= 2e-6
    require_same(checkpoint, out, report)


def test_a_uniform_checkpoint_too(tmp_path: Path) -> None:
    """It is its donor's class already; SGLang, which wants one number of KV heads, loads it."""
    checkpoint = make_dha(tmp_path, [([0, 0, 1, 1], [0, 0, 1, 1])] * 2)
    report = to_nemotron_nas.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert report["heads_by_layer"] == [2, 2]
    assert report["biases"] == []
    assert all(loads(report).values())
    assert loads(report).keys() == {"transformers", "vLLM", "SGLang", "llama.cpp", "MLX", "exllamav3"}
    require_same(checkpoint, tmp_path / "out", report)


def loads(report: dict[str, Any]) -> dict[str, bool]:
    return {engine: served for engine, served, _ in report["engines"]}


def test_which_engines_load_it(tmp_path: Path) -> None:
    plain = to_nemotron_nas.export_checkpoint(str(make_dha(tmp_path / "a", LAYERED)), str(tmp_path / "plain"))
    assert [engine for engine, served in loads(plain).items() if not served] == ["SGLang"]
    wide = to_nemotron_nas.export_checkpoint(
        str(make_dha(tmp_path / "b", LAYERED, head_dim=24)), str(tmp_path / "wide")
    )
    yarn = to_nemotron_nas.export_checkpoint(
        str(make_dha(tmp_path / "c", LAYERED, rope=YARN)), str(tmp_path / "yarn")
    )
    assert not loads(wide)["llama.cpp"]
    assert not loads(wide)["MLX"]
    assert not loads(yarn)["llama.cpp"]
    assert "| SGLang | no | wants the same number" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(
    ("donor", "said"),
    [
        (
            {"family": "gemma2", "sliding_window": 8},
            r"nemotron-nas cannot hold \S+: gemma2 blocks are not Llama's",
        ),
        (
            {"family": "mistral", "sliding_window": 8},
            r"nemotron-nas cannot hold \S+: layer 0 sees the last 8 tokens",
        ),
        ({"hidden_act": "gelu"}, r"nemotron-nas cannot hold \S+: hidden_act=gelu, engines have silu"),
    ],
)
def test_what_blocks_cannot_hold(tmp_path: Path, donor: dict[str, Any], said: str) -> None:
    checkpoint = make_dha(tmp_path, LAYERED, **donor)
    with pytest.raises(ExportError, match=said):
        to_nemotron_nas.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_an_export_is_not_exported_again(tmp_path: Path) -> None:
    checkpoint = make_dha(tmp_path, LAYERED)
    to_nemotron_nas.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(ExportError, match="is an export itself; export the checkpoint"):
        to_nemotron_nas.export_checkpoint(str(tmp_path / "out"), str(tmp_path / "again"))


def test_equal_heads_are_surveyed_priced_and_exported(tmp_path: Path) -> None:
    """A conversion whose layers a survey divides, and a plan of {"kv_heads": 4}: both go to nemotron-nas."""
    donor = make_donor(tmp_path / "donor", layers=3, heads=4, kv_heads=4)
    few = Calibration(tokens=512, sequence_length=64, held_out=2)
    common: dict[str, Any] = {"calibration": few, "fit_steps": 0, "verify": False, "device": "cpu"}
    settings = DHASettings(0.6, equal_heads=True)  # 14 of 24 heads: 2, 4 or 8 in a layer
    recipe = Recipe(
        str(donor), "dha", settings=settings, output=str(tmp_path / "a"), effort="default", **common
    )
    planned = mhconvert.plan(recipe, survey=True)
    cost = planned["equal_heads_cost"]
    assert cost["heads"]["equal_heads"] in (12, 14)
    assert cost["heads"]["free"] == 14
    assert cost["predicted_kl"]["equal_heads"] > 0
    assert planned["notice"].startswith("as many K as V heads in every layer: the survey predicts a KL of")
    report = mhconvert.convert(recipe)
    assert report["equal_heads_cost"]["heads"] == cost["heads"]
    assert report["equal_heads_cost"]["predicted_kl"] == pytest.approx(cost["predicted_kl"])
    assert all(layer["k_heads"] == layer["v_heads"] for layer in report["layers"])
    plan = Recipe(
        str(donor),
        "dha",
        settings=DHASettings(plan=[{"kv_heads": n} for n in (4, 2, 4)], equal_heads=True),
        output=str(tmp_path / "b"),
        effort="quick",
        **common,
    )
    assert [layer["k_heads"] for layer in mhconvert.convert(plan)["layers"]] == [2, 1, 2]
    for name in ("a", "b"):
        exported = to_nemotron_nas.export_checkpoint(
            str(tmp_path / name), str(tmp_path / f"{name}-out"), engine="vllm"
        )
        require_same(tmp_path / name, tmp_path / f"{name}-out", exported)
        assert exported["duplicated_heads"] == 0
        assert len(set(exported["kv_bytes_per_token"].values())) == 1


def test_free_heads_are_what_the_refusal_says_to_do_without(tmp_path: Path) -> None:
    checkpoint = make_dha(tmp_path, UNEQUAL)
    with pytest.raises(ExportError, match="or convert again with --equal-heads, or with --uniform"):
        to_nemotron_nas.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
