"""The exact checks: what Hydra computes, merges and equals. Tolerances are rounding's, dtype × a few products deep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from mhconvert.convert.methods.hydra import HydraConfig, HydraLinear
from mhconvert.convert.methods.hydra.branches import (
    Branches,
    as_lora,
    bias_delta,
    merged_bias,
    merged_weight,
    weight_delta,
)
from tests.convert.methods.hydra.adapted import (
    TARGETS,
    adapted,
    difference,
    formula,
    inputs,
    layers,
    llama,
    mlp,
    randomise,
    relative,
    tokens,
)

SMALL = st.integers(1, 12)


def random_branches(
    r_par: int, r_seq: int, wide: int, narrow: int, generator: torch.Generator, scale: float = 0.7
) -> Branches:
    """An adapter in float64 for a layer with out_features `wide` and in_features `narrow`."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    par = (draw(r_par, narrow), draw(wide, r_par)) if r_par else None
    return Branches(scale, par, (draw(r_seq, wide), draw(wide, r_seq)) if r_seq else None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_adapter_changes_nothing(tied: bool, dtype: torch.dtype) -> None:
    base = llama(dtype, tied=tied, attention_bias=True)
    expected = base(tokens()).logits
    model = get_peft_model(base, HydraConfig(target_modules=[*TARGETS, "q_proj"]))
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(4, 3), (0, 3), (4, 0)])
def test_the_forward_is_the_formula(bias: bool, ranks: tuple[int, int]) -> None:
    model = adapted(mlp(bias=bias), target_modules=["lin1"], r_par=ranks[0], r_seq=ranks[1])
    [layer] = layers(model)
    x = torch.randn(7, 20, dtype=torch.float64)
    assert difference(layer(x), formula(layer, x, ["default"])) <= 1e-12
    assert difference(layer(x), layer.base_layer(x)) > 1e-2


@settings(max_examples=60, deadline=None)
@given(SMALL, SMALL, st.integers(0, 6), st.integers(0, 6), st.booleans(), st.integers(0, 2**31))
def test_merging_is_the_forward(
    wide: int, narrow: int, r_par: int, r_seq: int, bias: bool, seed: int
) -> None:
    if r_par + r_seq == 0:
        r_par = 1
    torch.manual_seed(seed)
    base = nn.Linear(narrow, wide, bias=bias, dtype=torch.float64)
    layer = HydraLinear(base, "one", (r_par, r_seq), HydraConfig(scale=1.3, init_weights=False, bias="none"))
    x = torch.randn(3, narrow, dtype=torch.float64)
    before = layer(x)
    own = base.weight.data.clone()
    layer.merge()
    assert difference(layer(x), before) <= 1e-12 * (1 + before.abs().max().item())
    assert difference(base(x), before) <= 1e-12 * (1 + before.abs().max().item())
    layer.unmerge()
    assert torch.equal(base.weight, own)


@settings(max_examples=40, deadline=None)
@given(SMALL, SMALL, st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_the_rank_of_a_merge_is_at_most_the_ranks(o: int, i: int, r_par: int, r_seq: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=generator, dtype=torch.float64)
    adapter = random_branches(r_par, r_seq, o, i, generator)
    delta = merged_weight(weight, [adapter]) - weight
    expected = min(o, i, r_par + min(r_seq, o, i))
    assert torch.linalg.matrix_rank(delta, rtol=1e-11).item() <= expected
    assert adapter.rank == r_par + r_seq


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_model_gives_the_same_logits(dtype: torch.dtype, limit: float, bias: bool) -> None:
    base = llama(dtype, attention_bias=bias, mlp_bias=bias)
    model = adapted(base, target_modules=[*TARGETS, "q_proj", "gate_proj"], std=0.05)
    before = model(tokens()).logits
    assert relative(base(tokens()).logits, before) > 3 * limit
    model.merge_adapter()
    assert relative(model(tokens()).logits, before) <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_gives_back_every_bit(dtype: torch.dtype) -> None:
    model = adapted(llama(dtype, attention_bias=True, mlp_bias=True), target_modules=TARGETS)
    before, state = model(tokens()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, state[k])]
    assert len(changed) == 8  # weight and bias of two targets in two layers
    model.unmerge_adapter()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(tokens()).logits, before)


def test_the_base_weight_follows_from_the_merged_one() -> None:
    """Woodbury: W = V − s B (I + s A B)⁻¹ A V with V = W' − s B_p A_p, an independent way back."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    adapter = random_branches(4, 3, 16, 24, generator)
    adapter = Branches(0.1, adapter.par, adapter.seq)  # small enough for a well-conditioned inverse
    assert adapter.par is not None
    assert adapter.seq is not None
    (down_p, up_p), (down_s, up_s), s = adapter.par, adapter.seq, adapter.scale
    v = merged_weight(weight, [adapter]) - s * up_p @ down_p
    inner = torch.eye(3, dtype=torch.float64) + s * down_s @ up_s
    assert difference(v - s * up_s @ torch.linalg.solve(inner, down_s @ v), weight) <= 1e-12


def test_the_base_bias_is_part_of_what_the_sequential_branch_reads() -> None:
    base = mlp()
    model = adapted(base, target_modules=["lin1"], r_par=0, r_seq=5)
    [layer] = layers(model)
    adapter, before = layer.branches("default"), model(inputs())
    model.merge_adapter()
    merged_bias = layer.get_base_layer().bias
    assert adapter.seq is not None
    expected = base.lin1.bias + 0.7 * adapter.seq[1] @ adapter.seq[0] @ base.lin1.bias
    assert difference(merged_bias, expected) <= 1e-14
    assert difference(merged_bias, base.lin1.bias) > 1e-2
    assert difference(model(inputs()), before) <= 1e-12
    with torch.no_grad():  # the weight alone is not enough
        merged_bias.copy_(base.lin1.bias)
    assert difference(model(inputs()), before) > 1e-3


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
@pytest.mark.parametrize("together", [True, False])
def test_adapters_merge_from_the_base_weight_in_any_order(order: list[str], together: bool) -> None:
    config: dict[str, Any] = {"target_modules": ["lin0", "lin1"], "r_par": 3, "r_seq": 6, "scale": 1.5}
    model = get_peft_model(mlp(), HydraConfig(**config), adapter_name="one")
    model.add_adapter("two", HydraConfig(**config))
    for seed, name in enumerate(("one", "two")):
        randomise(model, seed, 0.4, name)
    model.base_model.set_adapter(["one", "two"])
    expected = model(inputs())
    own = copy.deepcopy(model.base_model.model.lin1.base_layer)
    for names in [order] if together else [[name] for name in order]:
        model.merge_adapter(adapter_names=names)
    assert difference(model(inputs()), expected) <= 1e-12 * (1 + expected.abs().max().item())
    layer = model.base_model.model.lin1
    assert difference(own.weight, layer.base_layer.weight) > 0.1
    twice = own.weight  # what merging onto a merged weight would give
    for name in order:
        twice = twice + weight_delta(twice, layer.branches(name))
    assert difference(twice, layer.base_layer.weight) > 1e-3
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, own.weight)
    assert torch.equal(layer.base_layer.bias, own.bias)


def test_sequential_branches_read_the_base_output_not_the_sum() -> None:
    config: dict[str, Any] = {"target_modules": ["lin1"], "r_par": 0, "r_seq": 4}
    model = get_peft_model(mlp(), HydraConfig(**config), adapter_name="one")
    model.add_adapter("two", HydraConfig(**config))
    for seed, name in enumerate(("one", "two")):
        randomise(model, seed, 0.4, name)
    model.base_model.set_adapter(["one", "two"])
    [layer], x = layers(model), torch.randn(3, 20, dtype=torch.float64)
    assert difference(layer(x), formula(layer, x, ["one", "two"])) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0])
def test_without_a_sequential_branch_it_is_lora(dtype: torch.dtype, scale: float) -> None:
    base = llama(dtype, attention_bias=True)
    hydra = adapted(base, target_modules=TARGETS, r_par=4, r_seq=0, scale=scale)
    lora = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=4, lora_alpha=4 * scale, target_modules=TARGETS),  # type: ignore[arg-type]
    ).eval()
    with torch.no_grad():
        for ours, theirs in zip(
            layers(hydra), (m for m in lora.modules() if hasattr(m, "lora_A")), strict=True
        ):
            theirs.lora_A["default"].weight.copy_(ours.hydra_par_A["default"])
            theirs.lora_B["default"].weight.copy_(ours.hydra_par_B["default"])
    assert difference(hydra(tokens()).logits, lora(tokens()).logits) == 0
    assert difference(hydra(tokens()).logits, base(tokens()).logits) > 0
    if dtype != torch.bfloat16:  # LoRA rounds its delta before it is added, Hydra once, after
        assert (
            relative(hydra.merge_and_unload()(tokens()).logits, lora.merge_and_unload()(tokens()).logits)
            < 1e-6
        )


@pytest.mark.parametrize("bias", [True, False])
def test_a_sequential_branch_of_full_rank_scales_the_output(bias: bool) -> None:
    model = adapted(mlp(bias=bias), target_modules=["lin1"], r_par=0, r_seq=20, scale=0.5)
    [layer], c = layers(model), 3.0
    with torch.no_grad():
        orthogonal, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
        layer.hydra_seq_A["default"].copy_(orthogonal)
        layer.hydra_seq_B["default"].copy_(c * orthogonal.T)
    x = torch.randn(6, 20, dtype=torch.float64)
    y0 = layer.base_layer(x)
    assert difference(layer(x), (1 + 0.5 * c) * y0) <= 1e-14 * (1 + y0.abs().max().item()) * 10


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_lora_by_peft(bias: bool) -> None:
    base = mlp(bias=bias)
    model = adapted(base, target_modules=["lin0", "lin1"], scale=0.35)
    rank = 4 + 3
    config = LoraConfig(
        r=rank,
        lora_alpha=0.35 * rank,
        target_modules=["lin0", "lin1"],
        lora_bias=bias,  # type: ignore[arg-type]
    )
    lora = get_peft_model(copy.deepcopy(base), config).eval()
    without_bias = copy.deepcopy(lora)
    with torch.no_grad():
        for name in ("lin0", "lin1"):
            ours = getattr(model.base_model.model, name)
            down, up = as_lora(getattr(base, name).weight, ours.branches("default"))
            for target in (lora, without_bias):
                theirs = getattr(target.base_model.model, name)
                theirs.lora_A["default"].weight.copy_(down)
                theirs.lora_B["default"].weight.copy_(up)
            if bias:
                theirs = getattr(lora.base_model.model, name)
                delta = bias_delta(getattr(base, name).bias, ours.branches("default"))
                theirs.lora_B["default"].bias.copy_(delta / 0.35)
                getattr(without_bias.base_model.model, name).lora_B["default"].bias.zero_()
    expected = model(inputs())
    assert difference(lora(inputs()), expected) <= 2e-15 * (1 + expected.abs().max().item()) * 10
    if bias:
        assert difference(without_bias(inputs()), expected) > 1e-3
    assert difference(lora.merge_and_unload()(inputs()), expected) <= 1e-13 * (
        1 + expected.abs().max().item()
    )


def test_the_arguments_of_a_merge_stay_as_they_are(generator: torch.Generator) -> None:
    weight, bias = torch.randn(8, 6, generator=generator), torch.randn(8, generator=generator)
    before = weight.clone(), bias.clone()
    new_weight, new_bias = merged_weight(weight, []), merged_bias(bias, [])
    assert torch.equal(new_weight, weight)
    new_weight.zero_()
    new_bias.zero_()
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


def test_a_bfloat16_merge_is_rounded_once(generator: torch.Generator) -> None:
    weight = torch.randn(32, 16, generator=generator).bfloat16()
    adapter = random_branches(4, 3, 32, 16, generator)
    exact = merged_weight(weight.double(), [adapter])
    assert torch.equal(merged_weight(weight, [adapter]), exact.bfloat16())
