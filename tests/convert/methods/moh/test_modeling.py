"""A model whose tokens have some heads only: the checks of the specification, on random weights.

Tolerances: 0.0 where the same products are made in the same order, or by an exact gate; 1e-12 of float64, 2e-5 of
float32 logits where sums are made in another order.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from mhconvert.convert.methods.moh import head_router, modeling_moh
from mhconvert.convert.methods.moh.head_router import HeadRouter
from mhconvert.convert.methods.moh.modeling_moh import MixtureOfHeadAttention
from mhconvert.convert.methods.moh.settings import MoHSettings
from tests.convert.conversions import converted, donor_model, logits, relative, token_ids
from tests.convert.methods.mla.test_families_exact import VARIANTS, by_steps, donor_of

FLOAT32 = 2e-5
ROUTERS = [
    MoHSettings(0.5, 0.25, uniform=True),
    MoHSettings(0.75, 0.5, router="norm", uniform=True),
    MoHSettings(0.75, 0.5, router="norm", shared_heads="first"),
    MoHSettings(0.5, 0.0, uniform=True),
    MoHSettings(0.5, 0.0, route="groups", uniform=True),
    MoHSettings([3, 1], [1, 1], router="norm"),
    MoHSettings(0.5, 0.5, uniform=True),  # fixed pruning
]


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are left out whatever the length."""
    for name in ("LEAST_KEYS", "LEAST_KEYS_OF_A_STEP", "LEAST_KEYS_OF_A_ROW"):
        monkeypatch.setattr(modeling_moh, name, 0)


def masks(model: Any) -> list[Any]:
    """Lists that fill up with each layer's active heads [B, T, H] as the model runs."""
    found: list[list[Tensor]] = []
    for layer in model.model.layers:
        mine: list[Tensor] = []
        found.append(mine)

        def recorded(*given: Any, routing: Any = layer.self_attn.routing, kept: list[Tensor] = mine) -> Any:
            active, gates = routing(*given)
            kept.append(active)
            return active, gates

        layer.self_attn.routing = recorded
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_heads_active_are_the_donor_to_the_bit(variant: str, dtype: torch.dtype) -> None:
    """Check 1, prefill and cached decoding, in every family."""
    donor = donor_of(variant)
    model, ids = converted(donor, MoHSettings(1.0)).to(dtype), token_ids(2, 40, seed=7)
    exact = {name: buffer.clone() for name, buffer in donor.named_buffers() if name.endswith("inv_freq")}
    donor = donor.to(dtype)
    for name, frequencies in exact.items():  # as `from_pretrained` leaves them
        donor.get_buffer(name).data = frequencies
    assert torch.equal(logits(model, ids), logits(donor, ids))
    assert torch.equal(by_steps(model, ids, 20), by_steps(donor, ids, 20))


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaving_heads_out_is_masking_them_in_every_family(variant: str, skipping: None) -> None:
    """Check 4, with windows, norms of queries and keys, biases, partial rotation; check 6 beside it."""
    donor = donor_of(variant)
    model, ids = converted(donor, MoHSettings(0.75)), token_ids(2, 40, seed=7)
    dense = model(input_ids=ids, use_cache=False).logits  # with gradients, every head is computed
    assert relative(logits(model, ids), dense) < FLOAT32
    assert relative(by_steps(model, ids, 20), dense) < FLOAT32
    assert relative(dense, logits(donor, ids)) > 1e-3  # something was left out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([(1, 4), (2, 2), (4, 1), (3, 3)]),
    length=st.integers(1, 23),
    earlier=st.integers(0, 40),
    behind=st.integers(0, 9),
    window=st.sampled_from([None, 1, 7]),
    padded=st.sampled_from([None, "boolean", "additive"]),
)
def test_active_pairs_alone_give_what_a_mask_leaves(
    seed: int,
    groups: tuple[int, int],
    length: int,
    earlier: int,
    behind: int,
    window: int | None,
    padded: str | None,
) -> None:
    """Check 4 in float64: any pattern of heads, also none at all at a token, behind any cache that is in use, or before
    the empty rest of one."""
    kv_heads, size = groups
    generator = torch.Generator().manual_seed(seed)
    donor = donor_model(seed, heads=kv_heads * size, kv_heads=kv_heads, hidden=16 * kv_heads * size)
    attention = MixtureOfHeadAttention(donor.model.layers[0].self_attn, converted_config(donor), 0)
    attention.window = window

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if (
        padded is None and length > 1
    ):  # transformers gives a mask where there is something before several tokens
        earlier = 0
    if padded is None and length == 1:
        behind = 0
    seen = length + earlier + behind
    query, key = random(2, kv_heads * size, length, 16), random(2, kv_heads, seen, 16)
    value, active = random(2, kv_heads, seen, 16), random(2, length, kv_heads * size) > 0
    distance = torch.arange(earlier, earlier + length)[:, None] - torch.arange(seen)
    visible = (distance >= 0) & (distance < (window or seen))
    visible = visible.expand(2, 1, -1, -1).clone()
    mask = None
    if padded:
        visible[1, :, :, : min(3, earlier)] = False
        visible[..., earlier : earlier + length] |= torch.eye(length, dtype=torch.bool)
        mask = (
            visible
            if padded == "boolean"
            else torch.zeros(visible.shape).double().masked_fill(~visible, -1e300)
        )
    active[:, :, 0] = True  # one that every token has
    found = attention.active_attention(query, key, value, active, mask) * active.unsqueeze(-1)
    scores = query @ key.repeat_interleave(size, 1).mT * attention.scaling
    every = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(size, 1)
    expected = every.transpose(1, 2) * active.unsqueeze(-1)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("kernel", ["present", "absent"])
def test_a_prompt_of_several_blocks_is_what_a_mask_leaves(
    window: int | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check 4 in float64, also where torch does not tell the denominators with which blocks are merged."""
    assert modeling_moh.FLASH is not None
    calls: list[int] = []

    def recorded(*given: Any, flash: Any = modeling_moh.FLASH, **options: Any) -> Any:
        calls.append(given[0].shape[2])
        return flash(*given, **options)

    monkeypatch.setattr(modeling_moh, "FLASH", recorded if kernel == "present" else None)
    donor = donor_model(0, heads=4, kv_heads=2)
    attention = MixtureOfHeadAttention(donor.model.layers[0].self_attn, converted_config(donor), 0)
    attention.window = window
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 700, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    active = torch.rand(1, 700, 4, generator=generator) < 0.7
    found = attention.active_attention(query * 9, key, value, active, None) * active.unsqueeze(-1)
    distance = torch.arange(700)[:, None] - torch.arange(700)
    visible = (distance >= 0) & (distance < (window or 700))
    scores = (query * 9 @ key.repeat_interleave(2, 1).mT * attention.scaling).masked_fill(
        ~visible, -torch.inf
    )
    expected = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2) * active.unsqueeze(-1)
    assert (found - expected).abs().max() < 1e-12
    assert bool(calls) == (kernel == "present" and window is None)


def converted_config(donor: Any) -> Any:
    return converted(donor, MoHSettings(1.0)).config


@pytest.mark.parametrize("choice", ROUTERS, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefill_and_decoding_choose_the_same_heads(
    choice: MoHSettings, implementation: str, skipping: None
) -> None:
    """Check 6; and check 2: every token has exactly its number of heads."""
    donor = donor_model(2, heads=4, kv_heads=2)
    model, ids = converted(donor, choice), token_ids(2, 24)
    model.set_attn_implementation(implementation)
    whole = masks(model)
    expected = logits(model, ids)
    prefill = [torch.cat(found, 1) for found in whole]
    for found in whole:
        found.clear()
    assert relative(by_steps(model, ids, 9), expected) < FLOAT32
    size = 4 // model.config.routing_units
    for found, before, count in zip(whole, prefill, model.config.active_heads, strict=True):
        assert torch.equal(torch.cat(found, 1), before)
        assert torch.equal(before.sum(-1), torch.full((2, 24), count * size))


@pytest.mark.parametrize("choice", ROUTERS, ids=str)
def test_left_padding_changes_no_choice_and_no_logit(choice: MoHSettings, skipping: None) -> None:
    """Check 7."""
    model, ids = converted(donor_model(3, heads=4, kv_heads=2), choice), token_ids(2, 20)
    whole = masks(model)
    expected = logits(model, ids)
    plain = [found.pop() for found in whole]
    padding = torch.full((2, 5), 1)
    seen = torch.cat((torch.zeros_like(padding), torch.ones_like(ids)), 1)
    longer = torch.cat((padding, ids), 1)
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    found = logits(model, longer, attention_mask=seen, position_ids=positions)[:, 5:]
    assert relative(found, expected) < FLOAT32
    for mine, before in zip(whole, plain, strict=True):
        assert torch.equal(mine.pop()[:, 5:], before)


def router(kind: str = "norm", seed: int = 0, **fields: Any) -> tuple[HeadRouter, Any]:
    """Of four heads of 16: head 1 is shared, two of the others are chosen."""
    config = copy.deepcopy(converted_config(donor_model(heads=4, kv_heads=2)))
    config.head_router, config.shared_heads, config.active_heads = kind, [[1], [1]], [3, 3]
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return HeadRouter(config, 0).eval(), config


@pytest.mark.parametrize("kind", ["norm", "learned"])
def test_of_equal_scores_the_first_heads_are_chosen(kind: str) -> None:
    """Check 2: also where everything ties, exactly as many heads, and the same ones however many tokens there are."""
    route, _ = router(kind)
    for parameter in route.parameters():
        parameter.data.zero_()
    hidden, query = torch.randn(2, 5, 64), torch.ones(2, 5, 64)
    with torch.no_grad():
        active, gates = route(hidden, query)
        alone, _ = route(hidden[:, 3:4], query[:, 3:4])
    assert torch.equal(active, torch.tensor([True, True, True, False]).expand(2, 5, 4))
    assert torch.equal(alone, active[:, 3:4])
    assert gates is None or torch.equal(gates, active.float())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_by_norms_hangs_on_their_order_alone(seed: int) -> None:
    """Check 3: scaling, the released code's division by the spread and softmax, and RoPE change no choice."""
    route, _ = router()
    query = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(seed))
    hidden = torch.zeros(2, 30, 64)
    with torch.no_grad():
        active = route(hidden, query)[0]
        assert torch.equal(route(hidden, 3.7 * query)[0], active)
        heads = query.unflatten(-1, (4, 16))
        angle = torch.randn(2, 30, 1, 8)
        first, second = heads.chunk(2, dim=-1)
        turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
        assert torch.equal(route(hidden, torch.cat(turned, -1).flatten(2))[0], active)
    norms = heads[:, :, [0, 2, 3]].norm(dim=-1)
    released = (norms / norms.std(-1, keepdim=True)).softmax(-1).topk(2).indices
    expected = torch.zeros(2, 30, 3, dtype=torch.bool).scatter(-1, released, True)
    assert torch.equal(active[..., [0, 2, 3]], expected)
    assert active[..., 1].all()


def test_scales_and_offsets_of_norms_decide() -> None:
    """A head with large queries wins by nature, and not once its score is offset."""
    query = torch.ones(1, 4, 64)
    query[..., :16] *= 100
    neutral, _ = router()
    offset, _ = router(norm_scale=[[1.0] * 3] * 2, norm_offset=[[-9.0, 0.0, 0.0]] * 2)
    with torch.no_grad():
        assert neutral(torch.zeros(1, 4, 64), query)[0][..., 0].all()
        assert not offset(torch.zeros(1, 4, 64), query)[0][..., 0].any()


@pytest.mark.parametrize("shared", [[], [1], [0, 3]])
def test_the_gates_of_an_untrained_learned_router_are_exactly_one(shared: list[int]) -> None:
    """Check 10: where the coefficients' maps are zero; scores are not."""
    count = len(shared) + 1
    route, _ = router("learned", shared_heads=[shared] * 2, active_heads=[count] * 2)
    for name, parameter in route.named_parameters():
        if not name.startswith("score"):
            parameter.data.zero_()
    with torch.no_grad():
        active, gates = route(torch.randn(3, 50, 64), torch.randn(3, 50, 64))
    assert gates is not None
    assert torch.equal(gates, active.float())
    assert torch.equal(active.sum(-1), torch.full((3, 50), count))


def test_gates_are_exactly_one_for_any_number_of_heads() -> None:
    """For 41, 47 and others the number times its float32 reciprocal is not 1."""
    donor = donor_model(heads=64, kv_heads=2, hidden=128)
    config = copy.deepcopy(converted_config(donor))
    for count in range(2, 62):
        config.shared_heads, config.active_heads = [[3, 9]] * 2, [2 + count] * 2
        route = HeadRouter(config, 0).eval()
        for parameter in route.maps.parameters():
            parameter.data.zero_()
        active, gates = route(torch.randn(1, 3, 128), torch.zeros(1, 3, 128))
        assert torch.equal(gates, active.float())


def test_tensors_kept_for_later_calls_are_in_no_checkpoint_and_hinder_no_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the first call was one of inference mode."""
    monkeypatch.setattr(head_router, "KEPT", {})
    route, _ = router("learned", shared_heads=[[0, 3]] * 2, active_heads=[3] * 2)
    names, x = set(route.state_dict()), torch.randn(2, 7, 64)
    with torch.inference_mode():
        _, expected = route(x, x)
    assert head_router.KEPT
    assert set(route.state_dict()) == names == {name for name, _ in route.named_parameters()}
    _, gates = route.train()(x, x)
    gates.square().sum().backward()
    assert all(parameter.grad is not None for parameter in route.parameters())
    torch.testing.assert_close(gates, expected)


def test_coefficients_are_the_two_stages_of_the_paper() -> None:
    """2 α1 · h_s softmax(W_s x) of shared heads, 2 α2 · K softmax(W_r x) over the chosen: §1.5 of the released code."""
    route, _ = router("learned", shared_heads=[[0, 3]] * 2, active_heads=[3] * 2)
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        active, gates = route(x, torch.zeros(2, 7, 64))
        stage = (x @ route.maps["stage"].weight.mT).softmax(-1) * 2
        shared = (x @ route.maps["shared"].weight.mT).softmax(-1) * 2 * stage[..., :1]
    assert gates is not None
    torch.testing.assert_close(gates[..., [0, 3]], shared)
    torch.testing.assert_close(
        gates[..., [1, 2]].sum(-1), stage[..., 1]
    )  # one of two is chosen: its share is 1
    assert torch.equal(gates > 0, active)


@pytest.mark.parametrize("shared", [[], [1], [0, 3]])
@pytest.mark.parametrize("chosen", [1, 2])
def test_a_single_token_is_routed_as_it_is_among_others(shared: list[int], chosen: int) -> None:
    """Its choice is made of numbers, and that of several tokens of tensors."""
    route, _ = router("learned", shared_heads=[shared] * 2, active_heads=[len(shared) + chosen] * 2)
    torch.nn.init.normal_(route.score.bias)
    x = torch.randn(1, 20, 64)
    with torch.no_grad():
        active, gates = route(x, x)
        alone = [route(token, token) for token in x.split(1, dim=1)]
    assert torch.equal(torch.cat([each for each, _ in alone], dim=1), active)
    torch.testing.assert_close(torch.cat([each for _, each in alone], dim=1), gates)
    assert gates.std() > 0.01
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert route(x[:, :1], x[:, :1])[1].dtype == gates.dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_maps_of_a_router_with_a_hook_are_called() -> None:
    """An adapter or an offloaded weight is more than what the one product of all maps reads."""
    route, _ = router("learned", shared_heads=[[1]] * 2, active_heads=[2] * 2)
    x = torch.randn(1, 6, 64)
    with torch.no_grad():
        plain = route(x, x)[0]
        hook = route.score.register_forward_hook(lambda module, given, output: -output)
        several, alone = route(x, x)[0], torch.cat([route(t, t)[0] for t in x.split(1, dim=1)], dim=1)
        hook.remove()
        for parameter in route.score.parameters():
            parameter.neg_()
        assert torch.equal(several, route(x, x)[0])
    assert torch.equal(several, alone)
    assert not torch.equal(several, plain)


def test_a_head_that_is_never_chosen_might_as_well_have_no_output_rows() -> None:
    """Check 5."""
    model, ids = (
        converted(donor_model(heads=4, kv_heads=4), MoHSettings(0.75, 0.75, uniform=True)),
        token_ids(2, 20),
    )
    expected = logits(model, ids)
    for layer, shared in zip(model.model.layers, model.config.shared_heads, strict=True):
        [never] = set(range(4)) - set(shared)
        layer.self_attn.o_proj.weight.data[:, never * 16 : (never + 1) * 16] = 0
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("kind", ["norm", "learned"])
def test_gradients_reach_the_scores_of_heads_that_were_not_chosen(kind: str) -> None:
    """Check 9: gates of 0 and 1 forward; back, the gradient of a gate is ⟨∂L/∂(g O), O⟩ at every head."""
    donor = donor_model(4, heads=4, kv_heads=2)
    model = converted(donor, MoHSettings(0.75, 0.25, router=kind, uniform=True))  # type: ignore[arg-type]
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 9, 64)
    place = model.model.rotary_emb(
        x, torch.arange(1, 10)[None]
    )  # behind the first token, which has all heads
    kept: dict[str, Tensor] = {}

    def dense(*given: Any, compute: Any = attention.dense_attention) -> Any:
        output, weights = compute(*given)
        kept["outputs"] = output.detach()
        return output, weights

    def routing(*given: Any, route: Any = attention.routing) -> Any:
        active, gates = route(*given)
        gates.retain_grad()
        kept["gates"], kept["active"] = gates, active
        return active, gates

    attention.dense_attention, attention.routing = dense, routing
    attention.o_proj.register_forward_pre_hook(
        lambda _, given: given[0].retain_grad() or kept.update(gated=given[0])
    )
    attention.requires_grad_(True).train()
    attention(x, place)[0].square().sum().backward()
    assert torch.equal(kept["gates"].detach(), kept["active"].float())
    assert kept["gated"].grad is not None
    assert kept["gates"].grad is not None
    expected = (kept["gated"].grad.unflatten(-1, (4, 16)) * kept["outputs"]).sum(-1)
    torch.testing.assert_close(kept["gates"].grad, expected)
    assert kept["gates"].grad[~kept["active"]].abs().min() > 0
    learns = attention.router.score.weight if kind == "learned" else attention.q_proj.weight
    assert learns.grad is not None
    assert learns.grad.abs().max() > 0


def test_a_layer_that_is_fitted_keeps_its_choices() -> None:
    """Outside training a choice is a choice: the scores get no gradient from the layer's error."""
    model = converted(donor_model(4, heads=4, kv_heads=2), MoHSettings(0.75, 0.25, uniform=True))
    attention = model.model.layers[0].self_attn.requires_grad_(True)
    x = torch.randn(2, 9, 64)
    attention(x, model.model.rotary_emb(x, torch.arange(9)[None]))[0].square().sum().backward()
    assert attention.router.score.weight.grad is None
    assert attention.q_proj.weight.grad.abs().max() > 0


def test_a_balanced_load_costs_what_the_paper_says() -> None:
    """Check 8: K / R; more where a head that is likely is also the one that is chosen; padding counts for nothing."""
    model = converted(donor_model(heads=4, kv_heads=4), MoHSettings(0.5, 0.0, uniform=True)).train()
    ids = token_ids(2, 12)
    model(input_ids=ids)
    even, uneven = torch.full((2, 12, 4), 0.25), torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(2, 12, 4)
    halves = torch.zeros(2, 12, 4, dtype=torch.bool)
    halves[:, ::2, :2] = True
    halves[:, 1::2, 2:] = True
    routers = [m for m in model.modules() if isinstance(m, HeadRouter)]
    for one in routers:
        one.last = even, halves
    assert model.load_balance().item() == pytest.approx(0.5)
    for one in routers:
        one.last = uneven, halves
    assert model.load_balance().item() == pytest.approx(0.5)  # the load itself is balanced
    always = torch.tensor([True, True, False, False]).expand(2, 12, 4)
    for one in routers:
        one.last = uneven, always
    assert model.load_balance().item() == pytest.approx(0.8)
    seen = torch.ones(2, 12)
    seen[:, :6] = 0
    changed = uneven.clone()
    changed[:, :6] = 9.0
    for one in routers:
        one.last = changed, always
    assert model.load_balance(seen).item() == pytest.approx(0.8)


def test_the_cache_is_the_donors_and_may_be_static(skipping: None) -> None:
    donor = donor_model(5, heads=4, kv_heads=2)
    model, ids = converted(donor, MoHSettings(0.5, 0.25, uniform=True)), token_ids(2, 12)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    static = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache)
    assert cache.layers[0].keys.shape == (2, 2, 12, 16)
    assert isinstance(StaticCache(config=model.config, max_cache_len=8), StaticCache)


def test_a_kv_head_that_no_token_reads_is_not_touched(skipping: None) -> None:
    """Groups: NaN in the cache of the groups that a step leaves out do not reach its output."""
    model = converted(donor_model(heads=4, kv_heads=2), MoHSettings(0.5, 0.5, route="groups", uniform=True))
    ids = token_ids(1, 12)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        for layer, shared in zip(cache.layers, model.config.shared_heads, strict=True):
            [unread] = {0, 1} - set(shared)
            layer.keys[:, unread] = torch.nan
            layer.values[:, unread] = torch.nan
        output = model(input_ids=ids[:, -1:], past_key_values=cache).logits
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("route", ["heads", "groups"])
def test_gradient_checkpointing_routes_alike(route: str) -> None:
    donor = donor_model(6, heads=4, kv_heads=2)
    model = converted(donor, MoHSettings(0.5, 0.0, route=route, uniform=True)).train()  # type: ignore[arg-type]
    model.requires_grad_(True)
    ids, found = token_ids(2, 16), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        (model(input_ids=ids, labels=ids).loss + 0.1 * model.load_balance()).backward()
        found.append(model.model.layers[0].self_attn.router.score.weight.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("choice", ROUTERS, ids=str)
def test_autocast_leaves_heads_out_too(choice: MoHSettings, skipping: None) -> None:
    model, ids = converted(donor_model(2, heads=4, kv_heads=2), choice), token_ids(2, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = by_steps(model, ids, 12)
    assert relative(found.float(), logits(model, ids)) < 0.15  # bfloat16, and a choice that it turns over


def test_autocast_reads_a_long_prompt_without_a_cache() -> None:
    """Several blocks, whose values are of another dtype than the keys."""
    model, ids = converted(donor_model(2, heads=4, kv_heads=2), ROUTERS[0]), token_ids(1, 1100)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(input_ids=ids, use_cache=False).logits
    assert relative(found.float(), expected) < 0.15  # bfloat16, and a choice that it turns over


def test_a_mask_for_each_head_goes_to_the_kernel(skipping: None) -> None:
    model, ids = converted(donor_model(2, heads=4, kv_heads=2), ROUTERS[0]), token_ids(1, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(1, 4, 12, 12)
    assert relative(logits(model, ids, attention_mask=mask), logits(model, ids)) < FLOAT32


def test_a_model_is_copied_after_a_step_of_training() -> None:
    model, ids = converted(donor_model(heads=4, kv_heads=2), ROUTERS[0]).train(), token_ids(2, 12)
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    again = copy.deepcopy(model).eval()
    assert torch.equal(logits(again, ids), logits(model.eval(), ids))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shared_heads": [[0]]}, "shared_heads has 1 layers and the model 2"),
        (
            {"shared_heads": [[0, 0], [1]]},
            r"shared_heads, layer 0: \[0, 0\] are not different ones of 4 heads",
        ),
        ({"active_heads": [3, 5]}, "active_heads, layer 1: 5 is not from 1 to 4"),
        ({"norm_scale": [[1.0] * 3] * 2}, "norm_scale and norm_offset go together"),
        (
            {"norm_scale": [[1.0] * 3, [1.0]], "norm_offset": [[1.0] * 3] * 2},
            "norm_scale, layer 1: 1 numbers for 3 routed heads",
        ),
    ],
)
def test_a_config_that_does_not_fit_says_where(fields: dict[str, Any], words: str) -> None:
    config = converted_config(donor_model(heads=4, kv_heads=2))
    values = config.to_dict() | {"shared_heads": [[0], [1]], "active_heads": [2, 3]} | fields
    with pytest.raises(Exception, match=words):
        type(config)(**values)


@pytest.mark.parametrize("choice", ROUTERS[:5], ids=str)
def test_the_first_token_has_all_heads_and_the_field_says_whether(
    choice: MoHSettings, skipping: None
) -> None:
    """Prompts, steps and left padding; without the field, as configurations before it were, it has its share."""
    donor, ids = donor_model(2, heads=4, kv_heads=2), token_ids(2, 24)
    model = converted(donor, choice)
    expected = logits(model, ids)
    assert relative(expected[:, 0], logits(donor, ids)[:, 0]) < FLOAT32
    assert relative(expected[:, 1], logits(donor, ids)[:, 1]) > 1e-3
    assert relative(by_steps(model, ids, 1), expected) < FLOAT32
    assert (
        relative(model.eval()(input_ids=ids).logits, expected) < FLOAT32
    )  # with gradients, every head is computed
    pads = torch.tensor([[0] * 3 + [1] * 24] * 2)
    padded = torch.cat((ids[:, :3], ids), dim=1)
    positions = (pads.cumsum(1) - 1).clamp_min(
        0
    )  # as `generate` gives them; without, the first token is at 3
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=pads, position_ids=positions).logits[:, 3:]
    assert relative(found, expected) < FLOAT32
    for layer in model.model.layers:
        layer.self_attn.whole_start = False
    assert not type(model.config)().whole_start
    assert relative(logits(model, ids)[:, 0], expected[:, 0]) > 1e-3
