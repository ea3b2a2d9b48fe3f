"""One Hydra layer and one model at a time: safe merges, dtypes, ranks, biases, copies, what peft reports."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status
from peft.tuners.tuners_utils import BaseTuner

from mhconvert.convert.methods.hydra import HydraConfig, HydraLayer
from mhconvert.errors import AdapterError
from tests.convert.methods.hydra.adapted import (
    difference,
    layers,
    llama,
    mlp,
    randomise,
    relative,
    run_llama,
    run_mlp,
    tokens,
    wrap,
)

since_0_21 = pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_learnable_bias_state_dict"), reason="peft can do this from 0.21 on"
)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite(bad: float) -> None:
    model = wrap(mlp(), {"target_modules": ["lin0"]})
    randomise(model, 7)
    [layer] = layers(model)
    with torch.no_grad():
        layer.hydra_seq_B["default"][0, 0] = bad
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(AdapterError, match="merging default gives weights that are not finite"):
        model.merge_and_unload(safe_merge=True)
    with pytest.raises(ValueError, match="nothing was merged"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged
    model.merge_adapter()  # unasked, as LoRA does
    assert not torch.isfinite(layer.get_base_layer().weight).all()
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_a_safe_merge_sees_what_leaves_float16() -> None:
    base = mlp(dtype=torch.float16)
    model = wrap(base, {"target_modules": ["lin0"], "scale": 1e5})
    randomise(model, 7, std=20.0)
    with pytest.raises(AdapterError, match="the result leaves float16"):
        model.merge_adapter(safe_merge=True)


def test_merging_twice_is_merging_once() -> None:
    model = wrap(mlp(), {"target_modules": ["lin0"]})
    randomise(model, 7)
    model.merge_adapter()
    weight = layers(model)[0].get_base_layer().weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(layers(model)[0].get_base_layer().weight, weight)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        model.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_dtypes(dtype: torch.dtype, upcast: bool) -> None:
    base = llama(dtype, attention_bias=True)
    model = wrap(base, {}, autocast_adapter_dtype=upcast)
    kinds = {p.dtype for name, p in model.named_parameters() if "hydra_" in name}
    assert kinds == {torch.float32 if upcast else dtype}
    randomise(model, 7, std=0.1)
    logits = run_llama(model)
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(run_llama(model), logits) < 0.05
    model.train()(input_ids=tokens()).logits.float().square().mean().backward()


def test_the_layer_keeps_the_dtype_of_the_base_layer() -> None:
    model = wrap(llama(torch.bfloat16), {})
    [layer, *_] = layers(model)
    assert layer(torch.randn(2, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_input_casting_can_be_switched_off() -> None:
    from peft.helpers import disable_input_dtype_casting

    model = wrap(llama(torch.bfloat16), {})
    randomise(model, 7)
    [layer, *_] = layers(model)
    x = torch.randn(2, layer.in_features, dtype=torch.bfloat16)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    layer(x)


def test_repr() -> None:
    text = repr(wrap(mlp(), {"target_modules": ["lin0"]}))
    assert "hydra.HydraLinear" in text
    assert "hydra_seq_A" in text


def test_status() -> None:
    model = wrap(mlp(), {"target_modules": ["lin0", "lin1"], "r_par": 2, "r_seq": 1})
    model.add_adapter("second", HydraConfig(target_modules=["lin0"]))
    status = get_model_status(model)
    assert status.adapter_model_type == "HydraModel"
    assert status.peft_types == {"default": "HYDRA", "second": "HYDRA"}
    assert status.num_adapter_layers == 2
    assert status.available_adapters == ["default", "second"]
    expected = 2 * (10 + 20) + 2 * 1 * 20 + 2 * (20 + 20) + 2 * 1 * 20
    assert status.trainable_params == expected
    assert model.get_nb_trainable_parameters()[0] == expected
    [first, second] = get_layer_status(model)
    assert (first.name, first.module_type) == ("model.lin0", "hydra.HydraLinear")
    assert second.available_adapters == ["default"]


def test_per_pattern_ranks() -> None:
    patterns = {"layers.0.mlp.down_proj": {"r_par": 5}, r".*\.1\..*o_proj": {"r_seq": 0, "r_par": 2}}
    model = wrap(llama(), {"target_modules": ["o_proj", "down_proj"], "rank_pattern": patterns})
    found = {
        name: tuple(len(m[key]["default"]) if "default" in m[key] else 0 for key in ("par", "seq"))
        for name, layer in model.named_modules()
        if isinstance(layer, HydraLayer)
        for m in [{"par": layer.hydra_par_A, "seq": layer.hydra_seq_A}]
    }
    short = {name.split("layers.")[1]: ranks for name, ranks in found.items()}
    assert short == {
        "0.self_attn.o_proj": (8, 8),
        "0.mlp.down_proj": (5, 8),
        "1.self_attn.o_proj": (2, 0),
        "1.mlp.down_proj": (8, 8),
    }


@since_0_21
def test_a_rank_pattern_that_matches_nothing_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="absent_proj"):
        wrap(llama(), {"rank_pattern": {"absent_proj": {"r_par": 1}}})


@since_0_21
@pytest.mark.parametrize("kind", ["all", "hydra_only"])
def test_trained_base_biases(kind: str, tmp_path: Any) -> None:
    base = llama(attention_bias=True)
    model = wrap(base, {"target_modules": ["o_proj"], "bias": kind})
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    per_layer = {"hydra_only": {"o"}, "all": {"q", "k", "v", "o"}}[kind]
    assert {name.split("self_attn.")[1][0] for name in trained} == per_layer
    randomise(model, 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.3)
    expected = run_llama(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(run_llama(loaded), expected)
    assert relative(run_llama(loaded.merge_and_unload()), expected) <= 1e-5
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("second", HydraConfig(target_modules=["o_proj"], bias=kind))  # type: ignore[arg-type]


def test_biases_that_peft_would_not_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=False)
    with pytest.raises(AdapterError, match="would train biases and not save them; that needs peft 0.21"):
        wrap(mlp(), {"target_modules": ["lin0"], "bias": "all"})


def test_a_deep_copy_of_a_merged_model_unmerges_by_itself() -> None:
    model = wrap(mlp(), {"target_modules": ["lin0"]})
    randomise(model, 7)
    expected = run_mlp(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    assert layers(twin)[0].merged
    twin.unmerge_adapter()
    assert torch.equal(run_mlp(twin), expected)


def test_a_merged_model_that_was_cast_unmerges_in_its_new_dtype() -> None:
    model = wrap(mlp(dtype=torch.float32), {"target_modules": ["lin0"]})
    own = layers(model)[0].get_base_layer().weight.clone()
    randomise(model, 7)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].get_base_layer().weight, own.bfloat16())


def test_the_delta_weight_is_the_merged_weight_less_the_base() -> None:
    model = wrap(mlp(), {"target_modules": ["lin0"]})
    randomise(model, 7)
    [layer] = layers(model)
    delta, own = layer.get_delta_weight("default"), layer.get_base_layer().weight.clone()
    model.merge_adapter()
    assert difference(layer.get_base_layer().weight - own, delta) <= 1e-14
    assert torch.equal(layer.get_delta_weight("default"), delta)  # read off the base weight, merged or not
