"""What peft's own tests ask of every method, asked of Hydra: on a custom model and on a decoder, by configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from mhconvert.convert.methods.hydra import HydraConfig, HydraLayer
from tests.convert.methods.hydra.adapted import (
    base_weights,
    difference,
    layers,
    llama,
    mlp,
    randomise,
    relative,
    run_llama,
    run_mlp,
    wrap,
)

Run = Callable[[Any], Tensor]


CASES: list[tuple[str, Callable[..., nn.Module], Run, dict[str, Any]]] = [
    ("one target", mlp, run_mlp, {"target_modules": ["lin0"]}),
    ("two targets", mlp, run_mlp, {"target_modules": ["lin0", "lin1"]}),
    ("parallel", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "r_seq": 0}),
    ("sequential", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "r_par": 0}),
    ("no bias", lambda: mlp(bias=False), run_mlp, {"target_modules": ["lin0", "lin1"]}),
    ("expression", mlp, run_mlp, {"target_modules": "lin[01]"}),
    ("exclusion", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("saved head", mlp, run_mlp, {"target_modules": ["lin0"], "modules_to_save": ["head"]}),
    ("ranks", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": {"r_seq": 0}}}),
    ("scale", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "scale": 3.0}),
    ("dropout", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "dropout": 0.4}),
    ("decoder", llama, run_llama, {}),
    ("decoder, attention", llama, run_llama, {"target_modules": ["q_proj", "v_proj"]}),
    ("decoder, all-linear", llama, run_llama, {"target_modules": "all-linear"}),
    ("decoder, a layer", llama, run_llama, {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    ("decoder, qwen2", lambda: llama(family="qwen2"), run_llama, {"target_modules": ["q_proj", "o_proj"]}),
    ("decoder, gemma2", lambda: llama(family="gemma2"), run_llama, {}),
]
cases = pytest.mark.parametrize(
    ("make", "run", "settings"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)


def exact(tensor: Tensor) -> float:
    """What reordered sums may differ by: relative, by dtype."""
    return 1e-12 if tensor.dtype == torch.float64 else 1e-5


@cases
def test_a_new_adapter_is_the_base(make: Any, run: Run, settings: dict[str, Any]) -> None:
    base = make()
    assert torch.equal(run(wrap(base, settings)), run(base))


@cases
def test_random_weights_are_not_the_base(make: Any, run: Run, settings: dict[str, Any]) -> None:
    base = make()
    model = wrap(base, settings | {"init_weights": False})
    assert relative(run(model), run(base)) > 1e-4


@cases
@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unload(make: Any, run: Run, settings: dict[str, Any], safe: bool) -> None:
    base = make()
    model = wrap(base, settings)
    randomise(model, 7)
    expected = run(model)
    plain = model.merge_and_unload(safe_merge=safe)
    assert type(plain) is type(base)
    assert not any(isinstance(module, HydraLayer) for module in plain.modules())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert relative(run(plain), expected) <= exact(expected)
    assert relative(run(base), expected) > 1e-4


@cases
def test_merge_and_unmerge(make: Any, run: Run, settings: dict[str, Any]) -> None:
    model = wrap(make(), settings)
    randomise(model, 7)
    expected = run(model)
    model.merge_adapter()
    assert relative(run(model), expected) <= exact(expected)
    assert all(layer.merged_adapters == ["default"] for layer in layers(model))
    model.unmerge_adapter()
    assert torch.equal(run(model), expected)
    assert not any(layer.merged for layer in layers(model))


@cases
def test_unload_gives_the_base_back(make: Any, run: Run, settings: dict[str, Any]) -> None:
    base = make()
    model = wrap(base, {key: value for key, value in settings.items() if key != "modules_to_save"})
    randomise(model, 7)
    assert torch.equal(run(model.unload()), run(base))


@cases
def test_disable_adapter(make: Any, run: Run, settings: dict[str, Any]) -> None:
    base = make()
    model = wrap(base, settings)
    randomise(model, 7)
    expected, plain = run(model), run(base)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), expected)
    model.merge_adapter()
    with model.disable_adapter():  # merged weights must not show either
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), expected)


@cases
def test_training_moves_the_adapter_and_nothing_else(make: Any, run: Run, settings: dict[str, Any]) -> None:
    model = wrap(make(), settings).train()
    before = base_weights(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all("hydra_" in name or "modules_to_save" in name for name in trained)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        run(model).square().mean().backward()
        optimiser.step()
    frozen = {name: w for name, w in before.items() if "modules_to_save" not in name}
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], weight) for name, weight in frozen.items())
    assert all(not torch.equal(parameters[name], weight) for name, weight in trained.items())


@cases
def test_save_and_load(make: Any, run: Run, settings: dict[str, Any], tmp_path: Any) -> None:
    base = make()
    model = wrap(base, settings)
    randomise(model, 7)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()
        held = loaded.state_dict()
        assert all(torch.equal(weight, held[name]) for name, weight in model.state_dict().items())
        assert relative(run(loaded), run(model)) <= exact(run(model))  # memory may be aligned otherwise
        assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert all(layer.hydra_scale for layer in layers(trainable))
    assert any(p.requires_grad for p in trainable.parameters())


@cases
def test_two_adapters(make: Any, run: Run, settings: dict[str, Any]) -> None:
    settings = {key: value for key, value in settings.items() if key != "modules_to_save"}
    base = make()
    model = wrap(base, settings)
    model.add_adapter("second", HydraConfig(**settings))
    model.eval()  # the new adapter's dropout
    randomise(model, 7)
    randomise(model, 8, adapter="second")
    first = run(model)
    model.set_adapter("second")
    second = run(model)
    assert relative(first, second) > 1e-4
    model.base_model.set_adapter(["default", "second"])
    both = run(model)
    assert relative(both, first) > 1e-4
    model.merge_adapter()
    assert relative(run(model), both) <= exact(both)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    model.delete_adapter("second")
    assert torch.equal(run(model), first)
    assert list(model.peft_config) == ["default"]
    assert not any("second" in name for name in model.state_dict())
    assert all(set(layer.hydra_scale) == {"default"} for layer in layers(model))


def test_deleting_the_active_adapter_activates_another() -> None:
    model = wrap(mlp(), {"target_modules": ["lin0"]})
    model.add_adapter("second", HydraConfig(target_modules=["lin0"]))
    randomise(model, 7)
    randomise(model, 8, adapter="second")
    model.set_adapter("second")
    expected = run_mlp(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(run_mlp(model), expected)


def test_adapters_on_different_modules() -> None:
    base = mlp()
    model = wrap(base, {"target_modules": ["lin0"]})
    model.add_adapter("second", HydraConfig(target_modules=["lin1"], r_par=2, r_seq=0))
    randomise(model, 7)
    randomise(model, 8, adapter="second")
    first = run_mlp(model)
    model.set_adapter("second")
    second = run_mlp(model)
    model.set_adapter("default")
    assert torch.equal(run_mlp(model), first)
    assert difference(first, second) > 1e-4
    assert relative(run_mlp(model.merge_and_unload(adapter_names=["second"])), second) <= 1e-12
