"""What cannot be adapted, loaded or merged: the fault, the place and the way out; and nothing is changed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mhconvert.convert.families.facts import FAMILIES
from mhconvert.convert.methods.hydra import HydraConfig, HydraLayer, layer, model, targets
from mhconvert.errors import AdapterError
from tests.convert.methods.hydra.adapted import adapted, inputs, layers, llama, mlp, tokens
from tests.donors import make_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r_par": 0, "r_seq": 0}, "r_par=0 and r_seq=0 leave nothing to train; give at least one of them"),
        ({"r_par": -1}, "r_par=-1 is not a rank"),
        ({"r_seq": 2.5}, "r_seq=2.5 is not a rank"),
        ({"r_seq": True}, "r_seq=True is not a rank"),
        (
            {"rank_pattern": {"o_proj": {"r_par": 0, "r_seq": 0}}},
            r"rank_pattern\['o_proj'\]: r_par=0 and r_seq=0",
        ),
        (
            {"r_seq": 0, "rank_pattern": {"o_proj": {"r_par": 0}}},
            r"rank_pattern\['o_proj'\]: r_par=0 and r_seq=0",
        ),
        (
            {"rank_pattern": {"o_proj": 4}},
            r"rank_pattern\['o_proj'\]=4 is not ranks by name, such as \{'r_par'",
        ),
        ({"rank_pattern": {"o_proj": {"r": 4}}}, "is not ranks by name"),
        ({"scale": float("nan")}, "scale=nan is not a finite number"),
        ({"dropout": 1.0}, r"dropout=1.0 is outside \[0, 1\)"),
        ({"bias": "lora_only"}, "bias='lora_only' is not one of none, all, hydra_only"),
        ({"target_modules": ".*o_proj", "layers_to_transform": [0]}, "layers_to_transform goes with a list"),
        ({"target_modules": ["o_proj"], "layers_pattern": "h"}, "give both or neither"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        HydraConfig(**settings)
    assert isinstance(caught.value, ValueError)  # what peft users catch


def test_a_refused_name_says_why() -> None:
    for name, reason in (
        ("h", "'h' is a part of 'hydra_', with which"),
        ("a.b", r"'a\.b' has a dot in it: peft"),
    ):
        with pytest.raises(AdapterError, match=reason), nullcontext() if "." in name else pytest.warns():
            get_peft_model(mlp(), HydraConfig(target_modules=["lin0"]), adapter_name=name)


@pytest.mark.parametrize("name", ["hydra", "hydra_", "h", "y", "", "ra_", "with.dot"])
def test_names_that_collide_with_the_prefix(name: str) -> None:
    base = mlp()
    with (
        pytest.warns() if name in "hydra_" else nullcontext(),
        pytest.raises(AdapterError, match="choose another"),
    ):
        get_peft_model(base, HydraConfig(target_modules=["lin0"]), adapter_name=name)
    assert not any(isinstance(module, HydraLayer) for module in base.modules())
    wrapped = get_peft_model(mlp(), HydraConfig(target_modules=["lin0"]))
    with (
        pytest.warns() if name in "hydra_" else nullcontext(),
        pytest.raises(AdapterError, match="choose another"),
    ):
        wrapped.add_adapter(name, HydraConfig(target_modules=["lin0"]))
    assert list(wrapped.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["down_prj"], r"'down_prj' match nothing in LlamaForCausalLM: .* are down_proj, "),
        (["attn.o_proj"], "are .*self_attn.o_proj"),
        (["zzz"], "nearest names of linear modules are down_proj, gate_proj, k_proj, lm_head, o_proj"),
        ("down_proj", "a string is an expression for whole names, a list holds names or their ends"),
    ],
)
def test_targets_that_match_nothing_show_the_nearest(wanted: Any, message: str) -> None:
    base = llama()
    with pytest.raises(AdapterError, match=message):
        get_peft_model(base, HydraConfig(target_modules=wanted))
    assert not any(isinstance(module, HydraLayer) for module in base.modules())


def test_one_target_of_several_that_matches_nothing_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="'up_prj' match nothing .* are up_proj"):
        get_peft_model(llama(), HydraConfig(target_modules=["o_proj", "up_prj"]))


def test_a_model_type_without_defaults() -> None:
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt_neox", hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=50
        )
    )
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, HydraConfig())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_defaults_of_every_family_match(family: str) -> None:
    more = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 16, "pad_token_id": 0}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(make_config(family=family, **more))
    wrapped = get_peft_model(base, HydraConfig(), low_cpu_mem_usage=True)
    found = {name.rpartition(".")[2] for name in wrapped.base_model.targeted_module_names}
    assert found == set(targets.DEFAULT_TARGETS[family])


def test_conv1d_and_embeddings() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=16, n_head=2, n_layer=1, vocab_size=20)
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        AdapterError, match=r"'transformer.h.0.mlp.c_proj' is a Conv1D, whose weight lies transposed"
    ):
        get_peft_model(base, HydraConfig(target_modules=["c_proj"], exclude_modules=".*attn.*"))
    with pytest.raises(
        AdapterError, match=r"'model.embed_tokens' is a Embedding, .* Hydra adapts torch.nn.Linear"
    ):
        get_peft_model(llama(tied=False), HydraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match=r"'model.norm' is a LlamaRMSNorm, not a linear layer"):
        get_peft_model(llama(), HydraConfig(target_modules=["norm"]))


def test_the_projection_inside_multihead_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

    with pytest.raises(AdapterError, match="without calling it"):
        get_peft_model(Attends(), HydraConfig(target_modules=["out_proj"]))


def test_a_tied_head_is_refused_and_an_untied_one_is_not() -> None:
    with pytest.raises(AdapterError, match="'lm_head' is tied to the input embedding"):
        get_peft_model(llama(tied=True), HydraConfig(target_modules=["lm_head"]))
    base = llama(tied=False)
    wrapped = adapted(base, target_modules=["lm_head"])
    expected = wrapped(tokens()).logits
    assert (wrapped.merge_and_unload()(tokens()).logits - expected).abs().max() < 1e-4


def test_tensor_parallel_layers() -> None:
    base = mlp()
    base.lin1._hf_tp_plan = "rowwise"  # type: ignore[assignment]
    with pytest.raises(AdapterError, match=r"'lin1' is split over processes"):
        get_peft_model(base, HydraConfig(target_modules=["lin1"]))


class Int8Linear(nn.Linear):
    """A quantised layer as bitsandbytes makes them: a Linear whose weight is not made of floats."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, source.bias is not None)
        self.step = source.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((source.weight / self.step).round().to(torch.int8), requires_grad=False)
        if source.bias is not None:
            self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def quantised() -> nn.Module:
    base = mlp(dtype=torch.float32)
    base.lin1 = Int8Linear(base.lin1)
    return base


def test_a_quantised_base_trains_and_does_not_merge() -> None:
    wrapped = adapted(quantised(), target_modules=["lin1"])
    [adapter] = layers(wrapped)
    x = inputs(dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in adapter.hydra_par_A.values())
    wrapped(x).sum().backward()
    assert adapter.hydra_seq_A["default"].grad is not None
    before, weight = wrapped(x), adapter.get_base_layer().weight.clone()
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(
            AdapterError, match=r"base layer is quantised \(Int8Linear\).*load the base model unquant"
        ):
            merge()
    assert torch.equal(adapter.get_base_layer().weight, weight)
    assert torch.equal(wrapped(x), before)


def test_a_backend_of_peft_s_is_named_when_a_merge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        backend_name = "bnb 4bit"
        layer_type = "linear"

    def found(base: nn.Module, **_: Any) -> Backend | None:
        return Backend() if type(base).__name__ == "Packed" else None

    class Packed(nn.Module):
        """Neither a Linear nor a float weight; only a backend tells what it is."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bias = 20, 20, None
            self.qweight = nn.Parameter(torch.zeros(20, 5, dtype=torch.int32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    base = mlp(dtype=torch.float32)
    base.lin1 = Packed()  # type: ignore[assignment]
    with pytest.raises(AdapterError, match="'lin1' is a Packed, not a linear layer"):
        get_peft_model(base, HydraConfig(target_modules=["lin1"]))
    monkeypatch.setattr(layer, "resolve_quantization_backend", found)
    monkeypatch.setattr(model, "resolve_quantization_backend", found)
    wrapped = adapted(base, target_modules=["lin1"])
    wrapped(inputs(dtype=torch.float32))
    with pytest.raises(AdapterError, match=r"quantised \(bnb 4bit\)"):
        wrapped.merge_adapter()


def test_an_adapter_of_another_shape(tmp_path: Path) -> None:
    adapted(llama(hidden=64), task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*hydra_par_A.default.*\[4, 128\].*\[4, 64\]"):
        PeftModel.from_pretrained(llama(hidden=32), tmp_path)
