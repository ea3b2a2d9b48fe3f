"""Modules that no adapter may be put on: the model stays as it was, and takes another adapter afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mhconvert.convert.methods.hydra import HydraConfig
from mhconvert.errors import AdapterError
from tests.convert.methods.hydra.adapted import adapted, inputs, layers, llama, mlp, randomise, tokens


def split_over_processes(base: Any) -> None:
    base.model.layers[1].mlp.down_proj._hf_tp_plan = "rowwise"


def tied_by_the_weight_alone(base: Any) -> None:
    base.config.tie_word_embeddings = False


def tied_by_the_config_alone(base: Any) -> None:
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        (None, "lm_head", "'lm_head' is tied to the input embedding"),
        (tied_by_the_config_alone, "lm_head", "'lm_head' is tied to the input embedding"),
        (tied_by_the_weight_alone, "lm_head", "'lm_head' shares its weight with model.embed_tokens.weight"),
        (None, "norm", "'model.norm' is a LlamaRMSNorm"),
        (split_over_processes, "down_proj", "'model.layers.1.mlp.down_proj' is split over processes"),
    ],
)
def test_a_refused_target_leaves_the_base_as_it_was(change: Any, target: str, message: str) -> None:
    base = llama(tied=True)
    if change is not None:
        change(base)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with pytest.raises(AdapterError, match=message):
        get_peft_model(base, HydraConfig(target_modules=["o_proj", target]))
    assert layers(base) == []
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    model = get_peft_model(base, HydraConfig(target_modules=["o_proj"]))
    assert len(layers(model)) == 2
    assert model.get_nb_trainable_parameters()[0] == 2 * (8 * (64 + 64) + 8 * 2 * 64)


def test_a_refused_second_adapter_leaves_the_first_alone() -> None:
    model = adapted(llama(), target_modules=["o_proj"])
    expected = model(tokens()).logits
    with pytest.raises(AdapterError, match=r"'model.norm' is a LlamaRMSNorm"):
        model.add_adapter("second", HydraConfig(target_modules=["o_proj", "norm"]))
    assert [list(layer.hydra_scale) for layer in layers(model)] == [["default"]] * 2
    assert torch.equal(model(tokens()).logits, expected)


class Shared(nn.Module):
    """Two linear layers, of which the second shares with the first what `what` says."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.second = self.first if what == "all" else nn.Linear(10, 10)
        if what != "all":
            setattr(self.second, what, getattr(self.first, what))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("wanted", [["first"], ["first", "second"], "all-linear"])
@pytest.mark.parametrize(("what", "shared"), [("weight", "weight"), ("bias", "bias"), ("all", "weight")])
def test_a_tensor_that_another_module_holds_too(what: str, shared: str, wanted: Any) -> None:
    base = Shared(what)
    with pytest.raises(
        AdapterError, match=rf"'first' shares its {shared} with second\.{shared}, which merging"
    ):
        get_peft_model(base, HydraConfig(target_modules=wanted))
    assert layers(base) == []


def test_a_layer_of_another_method() -> None:
    base = mlp()
    lora = get_peft_model(base, LoraConfig(target_modules=["lin0"], init_lora_weights=False)).eval()
    expected = lora(inputs())
    with pytest.raises(
        AdapterError,
        match=r"'lin0' has an adapter of another method \(peft\.tuners\.lora.*merge that one first",
    ):
        get_peft_model(base, HydraConfig(target_modules=["lin0", "lin1"]))
    assert layers(base) == []
    assert torch.equal(lora(inputs()), expected)
    assert len(layers(get_peft_model(base, HydraConfig(target_modules=["lin1"])))) == 1


def test_the_same_name_again_replaces_the_adapter() -> None:
    base = mlp()
    plain = base(inputs())
    get_peft_model(base, HydraConfig(target_modules=["lin0"], init_weights=False, dropout=0.5))
    model = get_peft_model(base, HydraConfig(target_modules=["lin0"], r_par=0, r_seq=4))
    assert torch.equal(model(inputs()), plain)
    assert model.get_nb_trainable_parameters()[0] == 4 * 2 * 20
    [layer] = layers(model)
    held = {name: list(getattr(layer, name)) for name in layer.adapter_layer_names}
    assert held == {
        "hydra_par_A": [],
        "hydra_par_B": [],
        "hydra_seq_A": ["default"],
        "hydra_seq_B": ["default"],
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": None}, "scale=None is not a finite number"),
        ({"scale": "1"}, "scale='1' is not a finite number"),
        ({"scale": True}, "scale=True is not a finite number"),
        ({"dropout": None}, "dropout=None is outside"),
        ({"dropout": float("nan")}, "dropout=nan is outside"),
        ({"rank_pattern": None}, "rank_pattern=None is not ranks by module"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\] is not ranks by module"),
        ({"rank_pattern": {"[": {"r_par": 1}}}, r"rank_pattern '\[' is no regular expression"),
        ({"target_modules": "["}, r"target_modules '\[' is no regular expression"),
        ({"target_modules": 5}, "target_modules=5 is neither names in a list nor an expression"),
        ({"exclude_modules": [1]}, r"exclude_modules=\[1\] is neither"),
        ({"r_par": 99_999_999_999}, "r_par=99999999999 is not a rank: a whole number from 0 to 65536"),
    ],
)
def test_settings_of_the_wrong_kind(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        HydraConfig(**settings)


def test_an_adapter_on_every_module_but_the_head() -> None:
    model = get_peft_model(llama(tied=True), HydraConfig(target_modules="All-Linear"))
    assert len(layers(model)) == 2 * 7
    randomise(model, 3)
    expected = model.eval()(tokens()).logits
    assert (copy.deepcopy(model).merge_and_unload()(tokens()).logits - expected).abs().max() < 1e-4
