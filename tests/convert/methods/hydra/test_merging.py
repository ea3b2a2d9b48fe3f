"""Merging into a whole model: every layer or none, in float32, and saving and calling meanwhile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from torch import nn

from mhconvert.convert.methods.hydra import HydraConfig
from mhconvert.convert.methods.hydra.branches import merged_weight
from mhconvert.errors import AdapterError
from tests.convert.methods.hydra.adapted import adapted, layers, llama, mlp, randomise, tokens

since_0_21 = pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="peft asks the method what to save from 0.21 on"
)


def nan(model: Any) -> None:
    with torch.no_grad():
        layers(model)[1].hydra_par_B["default"][0, 0] = float("nan")


def float8(model: Any) -> None:
    base: Any = layers(model)[1].get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "safe", "message"),
    [
        (nan, True, "lin1: merging default gives weights that are not finite.*nothing was merged"),
        (float8, True, r"lin1: the base layer is quantised \(Linear\)"),
        (float8, False, r"lin1: the base layer is quantised \(Linear\)"),
    ],
)
def test_what_one_layer_refuses_changes_none(change: Any, safe: bool, message: str) -> None:
    model = adapted(mlp(dtype=torch.float32), target_modules=["lin0", "lin1"])
    change(model)
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=message):
            merge(safe_merge=safe)
    assert [layer.merged for layer in layers(model)] == [False, False]
    after = model.state_dict()
    assert all(
        torch.equal(after[name].float().nan_to_num(), before[name].float().nan_to_num()) for name in before
    )


def test_a_safe_merge_sees_the_bias() -> None:
    base = mlp()
    with torch.no_grad():
        base.lin0.bias[3] = float("inf")
    model = adapted(base, target_modules=["lin0"])
    [layer] = layers(model)
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(AdapterError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(AdapterError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    model.merge_adapter()
    assert torch.isfinite(layer.get_base_layer().weight).all()  # so it was the bias


def test_a_safe_merge_counts_what_is_merged_already() -> None:
    model = adapted(mlp(dtype=torch.float16), target_modules=["lin0"], scale=1.0)
    model.add_adapter("second", HydraConfig(target_modules=["lin0"], r_par=4, r_seq=0))
    randomise(model, 5, adapter="second")
    [layer] = layers(model)
    with torch.no_grad():
        for name in ("default", "second"):
            layer.hydra_par_A[name].fill_(100.0)
            layer.hydra_par_B[name].fill_(100.0)  # 4 · 100 · 100 fits float16 once and not twice
    model.merge_adapter(["default"], safe_merge=True)
    with pytest.warns(UserWarning, match="additionally"), pytest.raises(AdapterError, match="leaves float16"):
        layer.merge(safe_merge=True, adapter_names=["second"])
    with pytest.raises(AdapterError, match="leaves float16"):
        model.merge_adapter(["second"], safe_merge=True)
    assert layer.merged_adapters == ["default"]


def test_autocast_does_not_round_a_merge() -> None:
    model = adapted(llama(attention_bias=True))
    [layer, *_] = layers(model)
    own: Any = layer.get_base_layer()
    expected = merged_weight(own.weight.detach(), [layer.branches("default")])
    delta = layer.get_delta_weight("default")
    model.merge_adapter()
    bias = own.bias.detach().clone()
    assert torch.equal(own.weight, expected)
    model.unmerge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), delta)
        model.merge_adapter()
    assert torch.equal(own.weight, expected)
    assert torch.equal(own.bias, bias)


def test_no_adapters_by_row() -> None:
    model = adapted(llama(), task_type="CAUSAL_LM")
    for call in (model, model.generate):
        with pytest.raises(
            AdapterError, match="no other adapter for each row of a batch; choose one for all"
        ):
            call(input_ids=tokens(), adapter_names=["default", "__base__"])
    model(input_ids=tokens(), adapter_names=None)


@since_0_21
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["o_proj"], "bias": "hydra_only"},
        {"target_modules": ["o_proj"], "bias": "all"},
        {"target_modules": ["o_proj", "lm_head"]},
    ],
)
def test_saving_while_merged_saves_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    base = llama(tied=False, attention_bias=True)
    model = adapted(base, task_type="CAUSAL_LM", **settings)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    merged = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.state_dict().items())
    before, saved = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged")
    )
    assert any(name.endswith(("base_layer.bias", "base_layer.weight")) for name in before)
    assert before.keys() == saved.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged").eval()
    assert torch.equal(loaded(tokens()).logits, expected)
