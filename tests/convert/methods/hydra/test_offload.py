"""Base models whose weights lie in main memory or on disk until a layer computes, as accelerate places them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mhconvert.convert.methods.hydra import HydraConfig
from tests.convert.methods.hydra.adapted import adapted, layers, llama, randomise, relative, tokens
from tests.donors import make_donor


def offloaded(base: Any, how: str, folder: Path) -> Any:
    model, device = copy.deepcopy(base), torch.device("cpu")
    if how == "memory":
        return cpu_offload(model, execution_device=device)
    disk_offload(model, str(folder), execution_device=device)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["memory", "disk"])
def test_an_offloaded_base(how: str, tied: bool, tmp_path: Path) -> None:
    base = llama(tied=tied, attention_bias=True)
    plain = base(tokens()).logits
    model = get_peft_model(offloaded(base, how, tmp_path), HydraConfig()).eval()
    [layer, *_] = layers(model)
    assert layer.get_base_layer().weight.device.type == "meta"
    assert all(p.device.type == "cpu" for name, p in model.named_parameters() if "hydra_" in name)
    assert torch.equal(model(tokens()).logits, plain)
    randomise(model, 5)
    expected = model(tokens()).logits
    assert relative(expected, plain) > 1e-3
    model.merge_adapter()
    assert layer.get_base_layer().weight.device.type == "meta"
    assert relative(model(tokens()).logits, expected) <= 1e-5
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, plain)
    assert torch.equal(model(tokens()).logits, expected)
    merged = model.merge_and_unload()
    assert relative(merged(tokens()).logits, expected) <= 1e-5


def on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str = "disk"
) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """An adapter loaded on a base whose second layer lies in `place`, its logits, and how it was loaded."""
    monkeypatch.chdir(tmp_path)  # peft puts its rewritten shards below the working directory
    if place == "disk" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("before 0.21 peft finds no lm_head among the offloaded modules")
    donor = make_donor(tmp_path / "tiny", tied=False)
    model = adapted(AutoModelForCausalLM.from_pretrained(donor), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    expected = model(tokens()).logits
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"model.layers.1": place, "lm_head": "cpu"}
    options: dict[str, Any] = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    base = AutoModelForCausalLM.from_pretrained(donor, **options)
    options["device_map"] = {f"base_model.model.{name}": device for name, device in places.items()}
    return PeftModel.from_pretrained(base, tmp_path / "adapter", **options).eval(), expected, options


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_saved_adapter_on_a_base_with_a_device_map(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, expected, _ = on_disk(tmp_path, monkeypatch, place)
    down = loaded.base_model.model.model.layers[1].mlp.down_proj
    assert down.hydra_seq_A["default"].device.type == "cpu"
    assert down.get_base_layer().weight.device.type == ("meta" if place == "disk" else "cpu")
    assert relative(loaded(tokens()).logits, expected) <= 1e-5
    loaded.merge_adapter()
    assert relative(loaded(tokens()).logits, expected) <= 1e-5
    loaded.unmerge_adapter()
    assert relative(loaded(tokens()).logits, expected) <= 1e-6


@pytest.mark.parametrize("how", ["add_adapter", "load_adapter"])
def test_a_second_adapter_on_a_base_with_layers_on_disk(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, expected, options = on_disk(tmp_path, monkeypatch)
    if how == "add_adapter":
        loaded.add_adapter("second", HydraConfig(task_type="CAUSAL_LM", init_weights=False))
    else:
        loaded.load_adapter(tmp_path / "adapter", adapter_name="second", **options)
    loaded.eval()
    assert relative(loaded(tokens()).logits, expected) <= 1e-5
    loaded.set_adapter("second")
    second = loaded(tokens()).logits
    assert (relative(second, expected) <= 1e-5) == (how == "load_adapter")
    loaded.merge_adapter()
    assert relative(loaded(tokens()).logits, second) <= 1e-5
    loaded.save_pretrained(tmp_path / "again")
    before, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")
    )
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_model_that_is_offloaded_with_its_adapter(tmp_path: Path) -> None:
    model = adapted(llama())
    expected = model(tokens()).logits
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    [layer, *_] = layers(model)
    assert layer.hydra_par_A["default"].device.type == "meta"
    for _ in range(2):
        assert relative(model(tokens()).logits, expected) <= 1e-6
        assert layer.hydra_par_A["default"].device.type == "cpu"
    assert layer.get_base_layer().weight.device.type == "meta"


def test_the_kept_weights_of_an_offloaded_layer_leave_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: moved.append(tensor.to("cpu", copy=True)) or moved[-1]
    )
    base = llama(attention_bias=True)
    for model, expected in ((offloaded(base, "memory", tmp_path), 2 + 1), (copy.deepcopy(base), 0)):
        moved.clear()
        wrapped = get_peft_model(model, HydraConfig(layers_to_transform=[0]))
        wrapped.merge_adapter()
        kept = {id(own) for layer in layers(wrapped) for own in layer.own_values().values()}
        assert len(kept) == 3  # two weights and a bias
        assert len(kept & {id(tensor) for tensor in moved}) == expected
