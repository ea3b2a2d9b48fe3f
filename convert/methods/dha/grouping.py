"""Partitions heads into clusters of small total cost: exactly where heads are few, else by local search. Pure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from functools import cache

Cluster = tuple[int, ...]
Cost = Callable[[Cluster], float]

EXACT_HEADS = 9  # 511 subsets, of which some 100 have to be priced, and 19,683 ways to split them
RESTARTS = 8


def best_clusters(count: int, clusters: int, cost: Cost, equal: bool = False) -> list[Cluster]:
    """`count` heads in `clusters` clusters of least total cost, in the order of their first heads.

    Exact up to EXACT_HEADS heads, the best of several local searches beyond.

    Args:
        cost: of a cluster: the least error that one head for all of its members can have. So it is no less than the
            costs of its parts together, by which the exact search skips clusters.
        equal: whether all clusters have one size; `clusters` then has to divide `count`.
    """
    assert 1 <= clusters <= count
    assert not equal or count % clusters == 0
    size = count // clusters if equal else None
    if count <= EXACT_HEADS:
        return _exact(count, clusters, cost, size)
    return _search(count, clusters, cost, size)


def _exact(count: int, clusters: int, cost: Cost, size: int | None) -> list[Cluster]:
    """By dynamic programming: of the heads that are left, the cluster of the first one is chosen.

    Clusters are tried in the order of their least possible costs, until these are more than the best split's.
    """
    least = cache(at_least(cost))

    @cache
    def best(left: Cluster, number: int) -> tuple[float, tuple[Cluster, ...]]:
        if number == 1:
            return cost(left), (left,)
        best_split: tuple[float, tuple[Cluster, ...]] | None = None
        sizes = [size] if size else range(1, len(left) - number + 2)
        choices = []
        for others in itertools.chain.from_iterable(itertools.combinations(left[1:], n - 1) for n in sizes):
            cluster, rest = (left[0], *others), tuple(h for h in left[1:] if h not in others)
            behind = least(rest) if number == 2 else 0.0
            choices.append((least(cluster) + behind, behind, cluster, rest))
        for bound, behind, cluster, rest in sorted(choices):
            if best_split is not None and bound >= best_split[0]:
                break
            lost = cost(cluster)
            if best_split is not None and lost + behind >= best_split[0]:
                continue
            more, chosen = best(rest, number - 1)
            if best_split is None or lost + more < best_split[0]:
                best_split = (lost + more, (cluster, *chosen))
        assert best_split is not None
        return best_split

    return list(best(tuple(range(count)), clusters)[1])


def at_least(cost: Cost) -> Cost:
    """A lower bound of a cluster's cost from the costs of its pairs.

    A cost is a sum over the heads of a cluster, each of which occurs in n − 1 of the pairs; and a head that all members
    share is one that a pair could have.
    """
    pairs = of_all_pairs(cost)
    return lambda cluster: pairs(cluster) / max(1, len(cluster) - 1)


def pairwise(cost: Cost) -> Cost:
    """An estimate of a cluster's cost from the costs of its pairs.

    It is exact for two heads, and for heads with nothing in common. Where more than two share a part it can be wrong
    by tens of percent either way.
    """
    pairs = of_all_pairs(cost)
    return lambda cluster: pairs(cluster) * 2 / len(cluster)


def of_all_pairs(cost: Cost) -> Cost:
    """The costs of a cluster's pairs together."""
    of_pair = cache(cost)
    return lambda cluster: sum(map(of_pair, itertools.combinations(cluster, 2)))


def _search(count: int, clusters: int, cost: Cost, size: int | None) -> list[Cluster]:
    """The best of several local optima, which move and exchange heads as long as the estimated cost falls.

    Starts are random, and without `size` one more merges the cheapest clusters. Optima are compared by the true cost.
    """
    known = cache(pairwise(cost))
    draw = random.Random(0)
    starts = [] if size else [_merged(count, clusters, known)]
    for _ in range(RESTARTS):
        heads = draw.sample(range(count), count)
        starts.append([tuple(sorted(heads[i::clusters])) for i in range(clusters)])
    optima = {tuple(sorted(_improved(start, known, size is not None))) for start in starts}
    return list(min(sorted(optima), key=lambda split: sum(map(cost, split))))


def _merged(count: int, clusters: int, cost: Cost) -> list[Cluster]:
    """`clusters` clusters of `count` heads: the pair whose union costs least more is united until so many are left."""
    split: list[Cluster] = [(head,) for head in range(count)]
    while len(split) > clusters:
        pair = min(
            itertools.combinations(split, 2),
            key=lambda two: cost(_union(*two)) - cost(two[0]) - cost(two[1]),
        )
        split = [c for c in split if c not in pair] + [_union(*pair)]
    return split


def _improved(split: Sequence[Cluster], cost: Cost, same_sizes: bool) -> list[Cluster]:
    """The local optimum that is reached by always making the move or exchange that saves most."""
    now = list(split)
    while True:
        best: tuple[float, int, int, Cluster, Cluster] | None = None
        for i, j in itertools.permutations(range(len(now)), 2):
            a, b = now[i], now[j]
            before = cost(a) + cost(b)
            for new_a, new_b in _neighbours(a, b, same_sizes):
                saved = before - cost(new_a) - cost(new_b)
                if saved > 1e-12 * before and (best is None or saved > best[0]):
                    best = (saved, i, j, new_a, new_b)
        if best is None:
            return now
        _, i, j, now[i], now[j] = best


def _neighbours(a: Cluster, b: Cluster, same_sizes: bool) -> list[tuple[Cluster, Cluster]]:
    """What two clusters become by exchanging a head, or unless they keep their sizes, by moving one of a to b."""

    def without(cluster: Cluster, head: int) -> Cluster:
        return tuple(h for h in cluster if h != head)

    swaps = [
        (_union(without(a, x), (y,)), _union(without(b, y), (x,)))
        for x, y in itertools.product(a, b)
        if a < b
    ]
    moves = [] if same_sizes or len(a) == 1 else [(without(a, x), _union(b, (x,))) for x in a]
    return swaps + moves


def _union(a: Cluster, b: Cluster) -> Cluster:
    return tuple(sorted(a + b))


def clusters(head_map: Sequence[int]) -> list[Cluster]:
    """The query heads of each fused head, in the fused heads' order."""
    return [tuple(h for h, n in enumerate(head_map) if n == one) for one in range(max(head_map) + 1)]
