"""Fusing heads: what attention cannot see is not lost, and what is lost is least.

Tolerance: float64 decompositions, 1e-9 of what is compared; 1e-5 where a model computes in float32.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhconvert.convert.attention.linalg import realified
from mhconvert.convert.attention.weights import AttentionWeights, LayerStatistics, complex_pairs
from mhconvert.convert.methods.dha.grouping import best_clusters
from mhconvert.convert.methods.dha.heads import Heads
from mhconvert.convert.methods.dha.surgery import cluster_map, fuse

EXACT = 1e-9
WIDTH, HIDDEN = 8, 24


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(heads: int, kv_heads: int, seed: int = 0) -> AttentionWeights:
    q, k = rows(heads, WIDTH, HIDDEN, seed=seed), rows(kv_heads, WIDTH, HIDDEN, seed=seed + 1)
    v, o = rows(kv_heads, WIDTH, HIDDEN, seed=seed + 2), rows(HIDDEN, heads, WIDTH, seed=seed + 3)
    return AttentionWeights(q, k, v, o)


def statistics(heads: int, seed: int = 0) -> LayerStatistics:
    x = rows(200, HIDDEN, seed=seed) * torch.linspace(0.2, 2, HIDDEN, dtype=torch.float64) + 0.3
    moment = x.mT @ x / len(x)
    return LayerStatistics(moment, moment, x.mean(0), torch.ones(heads, WIDTH // 2, dtype=torch.complex128))


def turned_twins(seed: int) -> AttentionWeights:
    """Four heads: 0 and 2, 1 and 3 are the same up to a turn in each RoPE plane (K, with its query) and any rotation
    of the value (with its rows of o_proj)."""
    weights = layer(4, 4, seed)
    q, k, v, o = (t.clone() for t in (weights.q, weights.k, weights.v, weights.o))
    for twin, first in ((2, 0), (3, 1)):
        angle = rows(WIDTH // 2, seed=seed + 10 + twin) * 3
        turn = realified(torch.diag_embed(torch.polar(torch.ones_like(angle), angle)))
        k[twin] = turn @ k[first]
        rotation = torch.linalg.qr(rows(WIDTH, WIDTH, seed=seed + 20 + twin)).Q
        v[twin] = rotation @ v[first]
        q[twin], o[:, twin] = turn @ rows(WIDTH, HIDDEN, seed=seed + 30 + twin), o[:, twin]
    return AttentionWeights(q, k, v, o)


def scores(weights: AttentionWeights, k_map: list[int], x: Tensor, shift: Tensor) -> Tensor:
    """(H, n, n): Re Σ conj(q) exp(−iθΔ) k for one distance, `shift` (F,) its angles."""
    turn = torch.polar(torch.ones_like(shift), -shift)
    q, k = (
        complex_pairs(weights.q) @ x.mT.to(torch.complex128),
        complex_pairs(weights.k) @ x.mT.to(torch.complex128),
    )
    return torch.einsum("fhn,f,fhm->hnm", q.conj(), turn, k[:, k_map]).real


def outputs(weights: AttentionWeights, v_map: list[int], x: Tensor) -> Tensor:
    """(H, n, D): what o_proj makes of each head's values."""
    values = torch.einsum("hdD,nD->hnd", weights.v[v_map], x)
    return torch.einsum("Ehd,hnd->hnE", weights.o, values)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("seed", [0, 40, 80])
def test_heads_that_are_equal_but_turned_are_found_and_lose_nothing(seed: int) -> None:
    """Checks 6 and 7; the plain mean of the same heads fails, which shows that the turns hide the equality."""
    weights = turned_twins(seed)
    heads = Heads(weights, statistics(4, seed), scale=0.3, output_bias=False)
    keys = best_clusters(4, 2, heads.keys_lost)
    values = best_clusters(4, 2, heads.values_lost)
    assert keys == [(0, 2), (1, 3)] == values
    fused = fuse(heads, keys, values)
    x, shift = rows(30, HIDDEN, seed=seed + 5), rows(WIDTH // 2, seed=seed + 6)
    own = list(range(4))
    assert relative(scores(fused.weights, fused.k_map, x, shift), scores(weights, own, x, shift)) < EXACT
    assert relative(outputs(fused.weights, fused.v_map, x), outputs(weights, own, x)) < EXACT

    mean = replace(
        weights,
        k=torch.stack([weights.k[list(c)].mean(0) for c in keys]),
        v=torch.stack([weights.v[list(c)].mean(0) for c in values]),
    )
    assert relative(scores(mean, cluster_map(keys), x, shift), scores(weights, own, x, shift)) > 0.3
    assert relative(outputs(mean, cluster_map(values), x), outputs(weights, own, x)) > 0.3


def test_copied_heads_are_fused_without_loss() -> None:
    """Check 5: a grouped-query donor as multi-head attention, and back to as many heads as it had."""
    grouped = layer(6, 2)
    expanded = replace(grouped, k=grouped.k[grouped.group], v=grouped.v[grouped.group])
    heads = Heads(expanded, statistics(6), scale=0.3, output_bias=False)
    keys, values = best_clusters(6, 2, heads.keys_lost), best_clusters(6, 2, heads.values_lost)
    assert keys == [(0, 1, 2), (3, 4, 5)] == values
    fused = fuse(heads, keys, values)
    x, shift = rows(30, HIDDEN, seed=5), rows(WIDTH // 2, seed=6)
    group = grouped.group.tolist()
    assert relative(scores(fused.weights, fused.k_map, x, shift), scores(grouped, group, x, shift)) < EXACT
    assert relative(outputs(fused.weights, fused.v_map, x), outputs(grouped, group, x)) < EXACT


def test_the_donors_own_groups_are_its_weights_to_the_bit() -> None:
    weights = layer(6, 3)
    own = [(0, 1), (2, 3), (4, 5)]
    fused = fuse(Heads(weights, statistics(6), scale=0.3), own, own)
    for name in ("q", "k", "v", "o"):
        assert torch.equal(getattr(fused.weights, name), getattr(weights, name))
    assert torch.equal(fused.o_bias, torch.zeros(HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize("seed", [0, 7])
def test_a_gauge_fold_alone_changes_nothing(seed: int) -> None:
    """Check 8: the turn that aligns a key head and the map that aligns a value head, heads apart."""
    weights = turned_twins(seed)
    heads = Heads(weights, statistics(4, seed), scale=0.3)
    key, mixing = heads.fused_key((0, 2))
    folded = replace(
        weights,
        k=torch.stack([realified(torch.diag_embed(m)) @ key for m in mixing]),
        q=weights.q[[0, 2]],
    )
    x, shift = rows(20, HIDDEN, seed=1), rows(WIDTH // 2, seed=2)
    expected = scores(weights, [0, 1, 2, 3], x, shift)[[0, 2]]
    assert relative(scores(folded, [0, 1], x, shift), expected) < EXACT


@pytest.mark.parametrize("seed", [0, 3, 9])
def test_mixing_keys_before_rope_is_mixing_them_after(seed: int) -> None:
    """Check 9: one complex number a plane commutes with RoPE; a factor for each element of a pair does not."""
    k, x = rows(2, WIDTH, HIDDEN, seed=seed), rows(12, HIDDEN, seed=seed + 1)
    angle = torch.outer(torch.arange(12.0, dtype=torch.float64), rows(WIDTH // 2, seed=seed + 2))

    def turn(heads: Tensor) -> Tensor:  # (2, 12, d)
        first, second = heads.chunk(2, -1)
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
        )

    keys = torch.einsum("gdD,nD->gnd", k, x)
    tied = torch.complex(rows(2, WIDTH // 2, seed=seed + 3), rows(2, WIDTH // 2, seed=seed + 4))
    maps = realified(torch.diag_embed(tied))
    before = turn(torch.einsum("gde,gne->gnd", maps, keys)).sum(0)
    after = torch.einsum("gde,gne->nd", maps, turn(keys))
    assert relative(before, after) < EXACT
    untied = rows(2, 1, WIDTH, seed=seed + 5)
    assert relative(turn(untied * keys).sum(0), (untied * turn(keys)).sum(0)) > 0.1


@given(seed=st.integers(0, 1000), pair=st.sampled_from([(0, 1), (0, 2), (1, 2), (0, 1, 2)]))
@settings(max_examples=20, deadline=None)
def test_the_cost_of_a_cluster_is_the_error_that_it_makes(seed: int, pair: tuple[int, ...]) -> None:
    """Measured on the text that the moments are of, energies of o_proj's output; and no other head does better."""
    weights = layer(3, 3, seed)
    heads = Heads(weights, statistics(3, seed), scale=0.3, output_bias=False)
    value, maps, _ = heads.fused_value(pair)
    moment = heads.statistics.key_moment

    def lost(maps: Tensor, value: Tensor) -> float:
        total = 0.0
        for place, head in enumerate(pair):
            error = weights.o[:, head] @ (weights.v[head] - maps[place] @ value)
            total += float(torch.einsum("Ed,de,Ee->", error, moment, error))
        return total

    found = lost(maps, value)
    assert found == pytest.approx(heads.values_lost(pair), rel=1e-6)
    mean = weights.v[list(pair)].mean(0)
    assert found < lost(torch.eye(WIDTH, dtype=torch.float64).expand(len(pair), -1, -1), mean)
    energy, pairs = heads.query_energy, complex_pairs(weights.k)
    key, mixing = heads.fused_key(pair)
    fused = complex_pairs(key.unsqueeze(0))[:, 0]
    of_keys = 0.0
    for place, head in enumerate(pair):
        error = pairs[:, head] - mixing[place].unsqueeze(1) * fused
        square = torch.einsum("fD,DE,fE->f", error.conj(), moment.to(error.dtype), error).real
        of_keys += float((energy[:, head] * square).sum())
    assert of_keys == pytest.approx(heads.keys_lost(pair), rel=1e-6)


def test_means_move_into_the_bias_where_there_is_one() -> None:
    """Values that vary in as many directions as a head has, about means: all of it is kept with a bias, not without."""
    weights = layer(4, 4)
    x = rows(100, WIDTH, seed=3) @ rows(WIDTH, HIDDEN, seed=4) + rows(HIDDEN, seed=5)
    moment, phases = x.mT @ x / len(x), torch.ones(4, WIDTH // 2, dtype=torch.complex128)
    seen = LayerStatistics(moment, moment, x.mean(0), phases)
    clusters = [(0, 1), (2, 3)]
    errors = []
    for bias in (False, True):
        fused = fuse(Heads(weights, seen, 0.3, bias), clusters, clusters)
        found = outputs(fused.weights, fused.v_map, x).sum(0) + fused.o_bias
        errors.append(relative(found, outputs(weights, [0, 1, 2, 3], x).sum(0)))
    assert errors[0] > 1e-3
    assert errors[1] < EXACT


def brute_force(count: int, clusters: int, cost: Any, size: int | None) -> float:
    best = float("inf")
    for labels in itertools.product(range(clusters), repeat=count):
        split = [tuple(h for h, n in enumerate(labels) if n == c) for c in range(clusters)]
        if all(split) and (size is None or all(len(c) == size for c in split)):
            best = min(best, sum(map(cost, split)))
    return best


@given(seed=st.integers(0, 500), count=st.integers(2, 6), clusters=st.integers(1, 4), equal=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_exact_search_is_exhaustive_search(seed: int, count: int, clusters: int, equal: bool) -> None:
    if clusters > count or (equal and count % clusters):
        return
    heads = rows(count, 3, seed=seed)

    def cost(cluster: tuple[int, ...]) -> float:
        """Of the line that is nearest to the members, as fused keys and values are nearest subspaces."""
        return float(torch.linalg.svdvals(heads[list(cluster)])[1:].square().sum())

    found = best_clusters(count, clusters, cost, equal)
    assert sorted(itertools.chain(*found)) == list(range(count))
    assert len(found) == clusters
    size = count // clusters if equal else None
    assert sum(map(cost, found)) == pytest.approx(brute_force(count, clusters, cost, size))


@pytest.mark.parametrize(("count", "clusters"), [(16, 4), (12, 3), (32, 8)])
@pytest.mark.parametrize("equal", [True, False])
def test_the_search_of_many_heads_finds_what_belongs_together(count: int, clusters: int, equal: bool) -> None:
    """Heads on points of a line, in disorder; the paper's listing accepts what is worse and keeps its last state."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    place = {int(head): index * clusters // count * 10.0 + index * 0.1 for index, head in enumerate(order)}

    def cost(cluster: tuple[int, ...]) -> float:
        return sum((place[a] - place[b]) ** 2 for a, b in itertools.combinations(cluster, 2))

    found = best_clusters(count, clusters, cost, equal)
    size = count // clusters
    expected = {tuple(sorted(order[i * size : (i + 1) * size].tolist())) for i in range(clusters)}
    assert set(found) == expected
