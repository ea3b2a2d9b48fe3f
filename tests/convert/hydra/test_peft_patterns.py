"""What peft's own tests ask of every method, asked of Hydra: on a custom model and on a decoder, by configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from torch import Tensor, nn

from mhconvert.convert.errors import AdapterError
from mhconvert.convert.hydra import HydraConfig, HydraLayer
from tests.convert.hydra.adapted import (
    base_weights,
    difference,
    inputs,
    layers,
    llama,
    mlp,
    randomise,
    relative,
    tokens,
)

Run = Callable[[Any], Tensor]


def run_mlp(model: Any) -> Tensor:
    return model(inputs(dtype=next(model.parameters()).dtype))


def run_llama(model: Any) -> Tensor:
    return model(input_ids=tokens()).logits


CASES: list[tuple[str, Callable[..., nn.Module], Run, dict[str, Any]]] = [
    ("one target", mlp, run_mlp, {"target_modules": ["lin0"]}),
    ("two targets", mlp, run_mlp, {"target_modules": ["lin0", "lin1"]}),
    ("parallel", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "r_seq": 0}),
    ("sequential", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "r_par": 0}),
    ("no bias", lambda: mlp(bias=False), run_mlp, {"target_modules": ["lin0", "lin1"]}),
    ("expression", mlp, run_mlp, {"target_modules": "lin[01]"}),
    ("all linear", mlp, run_mlp, {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
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
cases = pytest.mark.parametrize(("make", "run", "settings"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])


def wrap(base: nn.Module, settings: dict[str, Any], **options: Any) -> Any:
    return get_peft_model(copy.deepcopy(base), HydraConfig(**settings), **options).eval()


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
    with pytest.warns(RuntimeWarning, match="absent_proj"):
        wrap(llama(), {"rank_pattern": {"absent_proj": {"r_par": 1}}})


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
